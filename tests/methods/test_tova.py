"""TOVA against a simulation that computes attention rows itself and removes tokens greedily."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.tova import TOVA
from pqbench.method import Budget
from tests.support import Case, append, case, finish, softmax, start, tokens_of

BUDGET = Budget(sink=2, window=4, tokens=14, ratio=None)
PAPER = Budget(sink=0, window=1, tokens=11, ratio=None)


def row(data: Case, b: int, current: int, held: list[list[int]]) -> np.ndarray:
    """Attention of the query at ``current`` over the tokens that each KV head holds, summed over the query group:
    float64 ``[H, n]``."""
    keys, q = data.keys[b].double().numpy(), data.q[b, :, :, current].double().numpy()
    return np.stack([softmax(q[h] @ keys[h, tokens].T * data.scaling).sum(0) for h, tokens in enumerate(held)])


def drop(tokens: list[int], scores: np.ndarray, split: tuple[int, int], seen: int, size: int) -> list[int]:
    """Remove the least attended token outside sinks and recent ones, one at a time, until ``size`` are left."""
    sink, recent = split
    left = dict(zip(tokens, scores, strict=True))
    while len(left) > size:
        candidates = [t for t in left if sink <= t < seen - recent]
        del left[min(candidates, key=lambda t: left[t])]
    return sorted(left)


def simulate(data: Case, budget: Budget, per_head: bool, steps: int) -> list[list[list[set[int]]]]:
    """The tokens held after prefill and after each step, by step, sequence and KV head."""
    batch, heads = data.keys.shape[:2]
    held = [[list(range(data.prompt)) for _ in range(heads)] for _ in range(batch)]
    history = []
    for current in range(data.prompt - 1, data.prompt + steps):
        split = budget.resolve(current + 2, data.prompt)  # the token to come completes it
        for b in range(batch):
            if current >= data.prompt:
                held[b] = [[*tokens, current] for tokens in held[b]]
            received = row(data, b, current, held[b])
            if not per_head:
                received = np.broadcast_to(received.sum(0) / heads, received.shape)
            held[b] = [
                drop(held[b][h], received[h], (split.sink, split.window - 1), current + 1, split.total - 1)
                for h in range(heads)
            ]
        history.append([[set(tokens) for tokens in heads_held] for heads_held in held])
    return history


@given(
    prompt=st.integers(1, 50),
    budget=st.sampled_from([BUDGET, PAPER, Budget(sink=3, ratio=0.4, minimum=8), Budget(sink=4, tokens=9, ratio=None)]),
    per_head=st.booleans(),
    group=st.integers(1, 3),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_tokens_held_equal_greedy_removal(
    prompt: int, budget: Budget, per_head: bool, group: int, chunk: int, seed: int
) -> None:
    steps = 12
    data = case(prompt, steps, group=group, seed=seed, spread=2.0)
    expected = simulate(data, budget, per_head, steps)
    state, store = start(TOVA(budget, per_head), data, chunk)
    for step in range(steps):
        for b, h in np.ndindex(2, 2):
            assert set(store.positions[b, h].tolist()) == expected[step][b][h]
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert tokens_of(selection, store).shape[2] == budget.resolve(prompt + step + 1, prompt).total
        finish(state, store, selection, q, data)
    for b, h in np.ndindex(2, 2):
        assert set(store.positions[b, h].tolist()) == expected[steps][b][h]


def test_heads_of_a_layer_hold_the_same_tokens_unless_told_otherwise() -> None:
    data = case(60, 10, spread=2.0)
    for per_head in (False, True):
        state, store = start(TOVA(BUDGET, per_head), data)
        for step in range(10):
            q = append(state, store, data, step)
            finish(state, store, state.select(q, store), q, data)
        positions = store.positions
        assert (positions[:, 0] == positions[:, 1]).all() != per_head  # in the same rows, too
        assert (positions[0].sort(-1).values != positions[1].sort(-1).values).any()  # sequences have their own


def test_without_sinks_and_window_even_the_newest_token_may_go() -> None:
    data = case(40, 20, spread=2.0)
    state, store = start(TOVA(PAPER), data)
    newest = []
    for step in range(20):
        q = append(state, store, data, step)
        finish(state, store, state.select(q, store), q, data)
        newest.append(40 + step in store.positions[0, 0].tolist())
    assert True in newest
    assert False in newest
    assert 0 not in store.positions[0, 0].tolist() or 1 not in store.positions[0, 0].tolist()


def test_only_the_last_prompt_query_counts() -> None:
    data, other = case(50, 1), case(50, 1)
    other.q[:, :, :, :49] *= -3
    first, second = start(TOVA(BUDGET), data)[1], start(TOVA(BUDGET), other)[1]
    assert (first.positions == second.positions).all()
    other.q[:, :, :, 49] *= -1
    assert (first.positions != start(TOVA(BUDGET), other)[1].positions).any()


@pytest.mark.parametrize("per_head", [False, True])
def test_nothing_is_held_between_steps(per_head: bool) -> None:
    state, _ = start(TOVA(BUDGET, per_head), case(50, 1), chunk=20)
    assert state.index_bytes == state.resident_bytes == 0
    assert not any(hasattr(value, "nbytes") for value in vars(state).values())
