"""Quest against pages and bounds computed token by token in numpy, and against exact scores if pages hold one token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.quest import Quest, QuestState, page_extremes, upper_bounds
from pqbench.method import Budget, ConfigError, Geometry, Selection
from pqbench.store.device import DeviceStore
from tests.support import Case, append, case, finish, output_of, rows_of, start, tokens_of

BUDGET = Budget(sink=3, window=5, tokens=25, ratio=None)


def pages_of(first: int, stop: int, size: int) -> list[range]:
    """The tokens of each page; the last page may be incomplete."""
    return [range(begin, min(begin + size, stop)) for begin in range(first, stop, size)]


def bound(q: np.ndarray, keys: np.ndarray) -> float:
    """Quest's bound on q.k for the keys ``[n, D]`` of a page, by its definition."""
    return sum(max(x * column.min(), x * column.max()) for x, column in zip(q, keys.T, strict=True))


def bounds(data: Case, current: int, pages: list[range]) -> np.ndarray:
    """Bounds of every page for the query at ``current``, float64 ``[B, H, G, pages]``."""
    q, keys = data.q[:, :, :, current].double().numpy(), data.keys.double().numpy()
    found = np.zeros((*q.shape[:3], len(pages)))
    for b, h, g, p in np.ndindex(*found.shape):
        found[b, h, g, p] = bound(q[b, h, g], keys[b, h, pages[p].start : pages[p].stop])
    return found


def taken(scores: np.ndarray, pages: list[range], count: int) -> set[int]:
    """The first ``count`` tokens of the best pages ``[pages]``; the last page is cut off."""
    tokens: list[int] = []
    for page in sorted(range(len(pages)), key=lambda p: (-scores[p], p)):
        tokens += pages[page]
    return set(tokens[:count])


def seen_by(selection: Selection, store: DeviceStore, b: int, h: int, g: int) -> set[int]:
    """The tokens to which one query head attends."""
    tokens = tokens_of(selection, store)[b, h]
    mine = tokens if selection.visible is None else tokens[selection.visible[b, h, g]]
    assert len(set(mine.tolist())) == len(mine)
    return set(mine.tolist())


@given(
    size=st.integers(1, 20),
    count=st.integers(1, 45),
    width=st.integers(1, 12),
    group=st.integers(1, 4),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_no_key_of_a_page_exceeds_its_bound(
    size: int, count: int, width: int, group: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, group, width, generator=generator)
    keys = torch.randn(2, 3, count, width, generator=generator) * scale
    low, high = page_extremes(keys, size)
    found = upper_bounds(q, low, high).double().numpy()
    exact = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), keys.double().numpy())
    pages = pages_of(0, count, size)
    assert found.shape == (2, 3, group, len(pages))
    for p, page in enumerate(pages):
        inside = exact[..., page.start : page.stop]
        assert (found[..., p] >= inside.max(-1) - 1e-5 * scale).all()
        for b, h, g in np.ndindex(2, 3, group):
            defined = bound(q[b, h, g].double().numpy(), keys[b, h, page.start : page.stop].double().numpy())
            assert np.isclose(found[b, h, g, p], defined, atol=1e-5 * scale)
        if len(page) == 1:
            assert np.allclose(found[..., p], inside[..., 0], atol=1e-5 * scale)


@given(
    prompt=st.integers(1, 60),
    size=st.integers(1, 18),
    rule=st.sampled_from(["sum", "max", "query head"]),
    group=st.integers(1, 3),
    sink=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(1, 8)),
    tokens=st.integers(12, 40),
    seed=st.integers(0, 99),
)
def test_selections_equal_a_naive_loop_over_pages(
    prompt: int, size: int, rule: str, group: int, sink: int, window: int | None, tokens: int, seed: int
) -> None:
    data = case(prompt, 4, group=group, width=8, seed=seed, batch=1)
    budget = Budget(sink=sink, window=window, tokens=tokens, ratio=None)
    method = Quest(budget, size, "sum" if rule == "query head" else rule, rule == "query head")
    state, store = start(method, data)
    for step in range(4):
        selection = state.select(append(state, store, data, step), store)
        length = prompt + step + 1
        split = budget.resolve(length, prompt)
        pages = pages_of(*split.middle(length), size)
        each = bounds(data, length - 1, pages)
        always = {*range(split.sink), *range(length - split.window, length)}
        for h, g in np.ndindex(2, group):
            scores = each[0, h, g] if rule == "query head" else getattr(each[0, h], rule)(0)
            assert seen_by(selection, store, 0, h, g) == always | taken(scores, pages, split.top_k)


@pytest.mark.parametrize("seed", range(3))
def test_pages_of_one_token_rank_by_the_exact_scores(seed: int) -> None:
    """Each query head then selects its own most probable tokens, like the oracle per query head."""
    data = case(80, 3, group=3, seed=seed, spread=2.0)
    state, store = start(Quest(BUDGET, 1, per_query_head=True), data)
    for step in range(3):
        selection = state.select(append(state, store, data, step), store)
        length = 81 + step
        exact = data.probabilities(length)
        for b, h, g in np.ndindex(2, 2, 3):
            best = 3 + np.argsort(-exact[b, h, g, 3 : length - 5])[:17]
            assert seen_by(selection, store, b, h, g) == {0, 1, 2, *best, *range(length - 5, length)}


def test_pages_of_one_token_and_one_query_head_per_key_head_are_the_oracle() -> None:
    data = case(80, 1, group=1, spread=2.0)
    exact = data.probabilities(81)[:, :, 0]
    for group in ("sum", "max"):
        state, store = start(Quest(BUDGET, 1, group), data)
        selection = state.select(append(state, store, data, 0), store)
        for b, h in np.ndindex(2, 2):
            best = 3 + np.argsort(-exact[b, h, 3:76])[:17]
            assert seen_by(selection, store, b, h, 0) == {0, 1, 2, *best, *range(76, 81)}


@pytest.mark.parametrize("budget", [BUDGET, Budget(sink=3, ratio=0.4, minimum=9), Budget(sink=4, ratio=0.5)])
@pytest.mark.parametrize(("size", "prompt"), [(4, 40), (7, 40), (4, 2), (1, 30), (16, 9)])
def test_the_partial_page_follows_every_token(budget: Budget, size: int, prompt: int) -> None:
    """After each step the minima and maxima equal those of pages that are made from scratch, for all pages."""
    data = case(prompt, 40)
    state, store = start(Quest(budget, size), data)
    assert isinstance(state, QuestState)
    for step in range(40):
        q = append(state, store, data, step)
        length = prompt + step + 1
        pages = pages_of(*budget.resolve(length, prompt).middle(length), size)
        assert state.low is not None
        assert state.high is not None
        assert len(state.low) == len(state.high) == len(pages)
        for p, page in enumerate(pages):
            keys = data.keys[:, :, page.start : page.stop].numpy()
            assert np.array_equal(state.low.view()[:, :, p].numpy(), keys.min(2))
            assert np.array_equal(state.high.view()[:, :, p].numpy(), keys.max(2))
        assert state.resident_bytes == state.index_bytes == 2 * len(pages) * 2 * 2 * 16 * 4
        finish(state, store, state.select(q, store), q, data)


def test_query_heads_read_their_union_which_exceeds_the_budget() -> None:
    data = case(80, 1, group=3, spread=2.0)
    state, store = start(Quest(BUDGET, 4, per_query_head=True), data)
    selection = state.select(append(state, store, data, 0), store)
    rows = rows_of(selection, store)
    assert selection.visible is not None
    sizes = []
    for b, h in np.ndindex(2, 2):
        heads = [seen_by(selection, store, b, h, g) for g in range(3)]
        assert [len(head) for head in heads] == [25] * 3
        union = set(rows[b, h][selection.visible[b, h].any(0)].tolist())
        assert union == set.union(*heads)
        assert len(set(rows[b, h].tolist())) == rows.shape[2]  # padding is unique too
        sizes.append(len(union))
    assert rows.shape[2] == max(sizes)
    assert max(sizes) > 25


def test_equal_bounds_go_to_the_older_page() -> None:
    data = case(60, 1)
    data.keys[:] = 1.0
    state, store = start(Quest(BUDGET, 4), data)
    selection = state.select(append(state, store, data, 0), store)
    assert (tokens_of(selection, store).sort(-1).values == torch.tensor([*range(20), *range(56, 61)])).all()


@dataclass
class Layer(Case):
    """A case that is a later layer."""

    rank: int = 0

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, layers=4, rank=self.rank)


@pytest.mark.parametrize("rank", range(4))
def test_dense_layers_attend_to_everything_and_need_no_index(rank: int) -> None:
    plain = case(60, 6)
    data = Layer(plain.q, plain.keys, plain.values, plain.prompt, plain.frequencies, rank)
    state, store = start(Quest(BUDGET, 4, dense_layers=2), data)
    for step in range(6):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        exact = np.allclose(output_of(selection, store, q, data), data.full(61 + step), atol=1e-5)
        assert exact == (selection.indices is None) == (state.index_bytes == 0) == (rank < 2)
        finish(state, store, selection, q, data)


@pytest.mark.parametrize(
    ("options", "word"), [({"page_size": 0}, "page_size"), ({"group": "mean"}, "sum"), ({"dense_layers": -1}, "dense")]
)
def test_wrong_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Quest(**options)
