"""SnapKV against votes counted query by query, and against a simulation that keeps lists of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.snapkv import SnapKV
from pqbench.method import Budget, ConfigError
from tests.support import Case, append, case, finish, softmax, start, tokens_of

BUDGET = Budget(sink=3, window=6, tokens=20, ratio=None)


def votes(data: Case, observation: int, group: slice = slice(None)) -> np.ndarray:
    """The probability that each prompt token receives from the last queries, one query at a time: ``[B, H, S]``."""
    total = np.zeros(data.keys[:, :, : data.prompt, 0].shape)
    for t in range(max(0, data.prompt - observation), data.prompt):
        q, keys = data.q[:, :, group, t].double().numpy(), data.keys[:, :, : t + 1].double().numpy()
        total[:, :, : t + 1] += softmax(np.einsum("bhgd,bhsd->bhgs", q, keys) * data.scaling).sum(2)
    return total


def pool(row: np.ndarray, kernel: int, kind: str) -> list[float]:
    """Pooling by its definition: positions beyond the edges count as zeros for the mean, and are ignored by the
    maximum."""
    half = kernel // 2
    out = []
    for at in range(len(row)):
        near = row[max(0, at - half) : at + half + 1]
        out.append(float(near.max()) if kind == "max" else float(near.sum()) / kernel)
    return out


def best(scores: list[float], count: int) -> set[int]:
    """The largest scores, with ties by age. Sums in float32 and float64 may order almost equal scores differently, so
    scores are compared to nine digits."""
    return set(sorted(range(len(scores)), key=lambda i: (-round(scores[i], 9), i))[:count])


def expected_after_prefill(data: Case, method: SnapKV, b: int, h: int) -> set[int]:
    """The kept tokens: sinks, the window without the next token, and the highest pooled votes between them."""
    split = method.budget.resolve(data.prompt + 1, data.prompt)
    edge = data.prompt - (split.window - 1)
    middle = votes(data, method.observation)[b, h, split.sink : edge]
    top = best(pool(middle, method.kernel, method.pooling), split.top_k)
    return {*range(split.sink), *(split.sink + i for i in top), *range(edge, data.prompt)}


@given(
    prompt=st.integers(1, 70),
    observation=st.integers(1, 80),
    kernel=st.sampled_from([1, 3, 5, 7]),
    kind=st.sampled_from(["avg", "max"]),
    window=st.integers(1, 9),
    sink=st.integers(0, 4),
    top=st.integers(0, 20),
    chunk=st.integers(1, 70),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_kept_tokens_equal_a_naive_loop(
    prompt: int,
    observation: int,
    kernel: int,
    kind: str,
    window: int,
    sink: int,
    top: int,
    chunk: int,
    group: int,
    seed: int,
) -> None:
    data = case(prompt, 1, group=group, seed=seed, spread=2.0)
    budget = Budget(sink=sink, window=window, tokens=sink + window + top, ratio=None)
    method = SnapKV(budget, observation, kernel, kind)
    _, store = start(method, data, chunk)
    for b, h in np.ndindex(2, 2):
        mine = store.positions[b, h].tolist()
        assert len(set(mine)) == len(mine)
        assert set(mine) == expected_after_prefill(data, method, b, h)


def test_votes_are_columns_of_the_last_rows_of_the_full_causal_softmax() -> None:
    """If all tokens are observed queries, these are H2O's column sums."""
    data = case(40, 1)
    full = np.zeros((2, 2, 2, 40, 40))
    for t in range(40):
        full[:, :, :, t, : t + 1] = data.probabilities(t + 1)
    for observation in (1, 7, 40, 99):
        assert np.allclose(votes(data, observation), full[:, :, :, max(0, 40 - observation) :].sum((2, 3)))


@pytest.mark.parametrize("chunk", [1, 2, 5, 31, 44, 45])
def test_observed_queries_may_span_blocks_of_the_prefill(chunk: int) -> None:
    data = case(45, 1)
    method = SnapKV(BUDGET, observation=12, kernel=3)
    whole, parts = start(method, data)[1], start(method, data, chunk)[1]
    assert (whole.positions == parts.positions).all()
    assert (whole.positions != start(SnapKV(BUDGET, 11, 3), data)[1].positions).any()  # each of the twelve counts


def test_kernel_of_one_is_no_pooling_and_wider_ones_keep_neighbours() -> None:
    data = case(60, 1, spread=2.0)
    raw = votes(data, 32)
    single = start(SnapKV(BUDGET, kernel=1), data)[1].positions
    assert (single == start(SnapKV(BUDGET, kernel=1, pooling="avg"), data)[1].positions).all()
    wide = start(SnapKV(BUDGET, kernel=5), data)[1].positions
    for b, h in np.ndindex(2, 2):
        top = best(list(raw[b, h, 3:55]), 11)
        assert set(single[b, h].tolist()) == {0, 1, 2, *(3 + i for i in top), *range(55, 60)}
        peak = 3 + int(raw[b, h, 3:55].argmax())
        assert set(range(max(peak - 2, 3), min(peak + 3, 55))) <= set(wide[b, h].tolist())
    assert (single != wide).any()


def test_average_counts_zeros_beyond_the_edges_and_maximum_does_not() -> None:
    """All middle tokens receive the same votes, so only the two at the edges are averaged with a zero."""
    data = case(24, 1)
    data.q[:] = 0
    budget = Budget(sink=3, window=2, tokens=3 + 2 + 18, ratio=None)  # 18 of the middle's 20
    for kind, out in (("avg", {3, 22}), ("max", {21, 22})):  # equal votes go to the older token
        positions = start(SnapKV(budget, 1, 3, kind), data)[1].positions
        for b, h in np.ndindex(2, 2):
            assert set(range(24)) - set(positions[b, h].tolist()) == out


@pytest.mark.parametrize(
    "budget",
    [BUDGET, Budget(sink=3, ratio=0.4, minimum=8), Budget(sink=2, window=1, tokens=9, ratio=None)],
    ids=["tokens", "growing", "window of one"],
)
def test_what_was_voted_for_stays_and_later_tokens_leave_by_age(budget: Budget) -> None:
    data = case(45, 25, spread=2.0)
    method = SnapKV(budget, observation=8, kernel=3)
    state, store = start(method, data)
    held = {(b, h): sorted(expected_after_prefill(data, method, b, h)) for b, h in np.ndindex(2, 2)}
    split = budget.resolve(46, 45)
    voted = {key: {t for t in tokens if t < 45 - (split.window - 1)} for key, tokens in held.items()}
    for step in range(25):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        tokens = tokens_of(selection, store)
        for (b, h), mine in held.items():
            mine.append(45 + step)
            assert set(tokens[b, h].tolist()) == set(mine)
            assert len(mine) == budget.resolve(46 + step, 45).total
            later = [t for t in mine if t not in voted[b, h]]
            for _ in range(len(mine) + 1 - budget.resolve(47 + step, 45).total):
                mine.remove(later.pop(0))  # lists are in order of age
        finish(state, store, selection, q, data)
    for (b, h), tokens_voted in voted.items():
        assert tokens_voted <= set(store.positions[b, h].tolist())


def test_generated_tokens_all_stay_as_published() -> None:
    data = case(45, 12)
    state, store = start(SnapKV(BUDGET, evict_generated=False), data)
    after = store.positions.clone()
    for step in range(12):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert tokens_of(selection, store).shape[2] == 20 + step  # one more than the budget's in every step
        finish(state, store, selection, q, data)
    assert (store.positions[:, :, :19] == after).all()
    assert (store.positions[:, :, 19:] == after.new_tensor(range(45, 57))).all()


def test_nothing_is_held_after_prefill_but_a_number() -> None:
    data = case(45, 1)
    state, _ = start(SnapKV(BUDGET), data, chunk=10)
    assert state.index_bytes == state.resident_bytes == 0
    assert not any(hasattr(value, "nbytes") for value in vars(state).values())


@pytest.mark.parametrize(
    ("options", "word"),
    [({"observation": 0}, "observation"), ({"kernel": 4}, "odd"), ({"kernel": -1}, "odd"), ({"pooling": "sum"}, "avg")],
)
def test_wrong_options_are_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SnapKV(**options)  # type: ignore[arg-type]
