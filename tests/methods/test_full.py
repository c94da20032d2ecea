"""Full attention attends to every row and keeps no index."""

from __future__ import annotations

from methods.full import Full
from tests.support import advance, case, start


def test_full_attends_to_every_row_and_has_no_budget() -> None:
    data = case(5, 3)
    state, store = start(Full(), data)
    for step in range(3):
        selection = advance(state, store, data, step)
        assert selection.indices is selection.visible is selection.residual is selection.key_shift is None
    assert (state.index_bytes, state.resident_bytes) == (0, 0)
    assert Full().split(1000, 900) is None
    assert store.seen == store.length == 8
