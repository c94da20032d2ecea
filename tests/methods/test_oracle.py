"""The three oracle rules against brute force over the exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.oracle import Oracle
from pqbench.method import Budget, ConfigError, Selection
from tests.support import Case, append, case, start, tokens_of

BUDGET = Budget(sink=3, window=5, tokens=20, ratio=None)
LENGTH = 81


def select(method: Oracle, data: Case) -> tuple[Selection, np.ndarray]:
    """The selection at :data:`LENGTH`, and the tokens that each query head sees: bool ``[B, H, G, S]``."""
    state, store = start(method, data)
    selection = state.select(append(state, store, data, 0), store)
    tokens = tokens_of(selection, store)
    batch, heads, group = data.q.shape[:3]
    seen = np.zeros((batch, heads, group, LENGTH), dtype=bool)
    visible = torch.ones(1, dtype=torch.bool) if selection.visible is None else selection.visible
    visible = visible.expand(batch, heads, group, tokens.shape[2])
    for b, h, g, n in np.ndindex(*visible.shape):
        assert not (visible[b, h, g, n] and seen[b, h, g, tokens[b, h, n]])
        seen[b, h, g, tokens[b, h, n]] |= bool(visible[b, h, g, n])
    return selection, seen


def data_of(seed: int = 0) -> Case:
    return case(LENGTH - 1, 1, seed=seed, group=3, spread=2.0)


@pytest.mark.parametrize("seed", range(3))
def test_kv_head_rule_takes_the_largest_sums_of_probability(seed: int) -> None:
    data = data_of(seed)
    selection, seen = select(Oracle(BUDGET), data)
    assert selection.visible is None
    sums = data.probabilities(LENGTH).sum(2)
    for b, h in np.ndindex(2, 2):
        best = 3 + np.argsort(-sums[b, h, 3:-5])[:12]
        expected = {0, 1, 2, *best, *range(LENGTH - 5, LENGTH)}
        assert set(np.flatnonzero(seen[b, h, 0])) == expected


@pytest.mark.parametrize("seed", range(3))
def test_query_head_rule_takes_each_heads_own_and_reads_the_union(seed: int) -> None:
    data = data_of(seed)
    selection, seen = select(Oracle(BUDGET, rule="query_head"), data)
    exact = data.probabilities(LENGTH)
    assert selection.indices is not None
    assert selection.visible is not None
    unions = []
    for b, h in np.ndindex(2, 2):
        for g in range(3):
            best = 3 + np.argsort(-exact[b, h, g, 3:-5])[:12]
            assert set(np.flatnonzero(seen[b, h, g])) == {0, 1, 2, *best, *range(LENGTH - 5, LENGTH)}
        union = set(np.flatnonzero(seen[b, h].any(0)))
        visible = selection.visible[b, h].any(0)
        assert set(selection.indices[b, h][visible].tolist()) == union
        unions.append(len(union))
        assert len(set(selection.indices[b, h].tolist())) == selection.indices.shape[2]  # padding is unique too
    assert selection.indices.shape[2] == max(unions)
    assert max(unions) > 20  # heads of a query group differ, so this rule reads more than the budget
    kv_head = select(Oracle(BUDGET), data)[1]
    assert ((exact * seen).sum(-1) >= (exact * kv_head).sum(-1) - 1e-9).all()


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 0.999])
def test_top_p_rule_takes_the_smallest_set(top_p: float) -> None:
    data = data_of()
    _, seen = select(Oracle(BUDGET, rule="top_p", top_p=top_p), data)
    mean = data.probabilities(LENGTH).mean(2)
    sizes = []
    for b, h in np.ndindex(2, 2):
        assert (seen[b, h] == seen[b, h, :1]).all()
        mine = seen[b, h, 0].copy()
        assert mine[:3].all()
        assert mine[-5:].all()
        held = mean[b, h, mine].sum()
        middle = np.flatnonzero(mine[3:-5]) + 3
        if len(middle):
            assert held >= top_p - 1e-6
            assert held - mean[b, h, middle].min() < top_p  # one token fewer is not enough
            assert mean[b, h, middle].min() >= np.delete(mean[b, h, 3:-5], middle - 3).max()
        else:
            assert held >= top_p
        sizes.append(len(middle))
    assert len(set(sizes)) > 1 or top_p == 0.3  # heads differ in how much they need


def test_dropping_tokens_never_raises_mass() -> None:
    data = data_of()
    exact = data.probabilities(LENGTH)
    masses = []
    for tokens in range(8, LENGTH + 1):
        _, seen = select(Oracle(Budget(sink=3, window=5, tokens=tokens, ratio=None)), data)
        masses.append((exact * seen).sum((2, 3)))
    assert (np.diff(np.stack(masses), axis=0) >= -1e-9).all()
    assert np.allclose(masses[-1], 3)


@pytest.mark.parametrize(
    ("options", "word"), [({"rule": "best"}, "kv_head"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p")]
)
def test_wrong_options_are_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Oracle(**options)  # type: ignore[arg-type]
