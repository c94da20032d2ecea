"""H2O against the full causal matrix, and against a simulation that evicts token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.h2o import H2O, H2OState
from pqbench.method import Budget
from pqbench.store.device import DeviceStore
from tests.support import Case, append, case, finish, softmax, start, weights_of


def column_sums(data: Case, length: int) -> np.ndarray:
    """Column sums of the full causal softmax, over all queries and the query group: ``[B, H, S]``."""
    sums = np.zeros((*data.keys.shape[:2], length))
    for stop in range(1, length + 1):
        sums[:, :, :stop] += data.probabilities(stop).sum(2)
    return sums


def by_position(state: H2OState, store: DeviceStore) -> np.ndarray:
    order = store.positions.argsort(-1)
    return state.scores.view().gather(2, order).numpy()


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_scores_are_column_sums_after_prefill_and_after_steps_without_eviction(chunk: int | None) -> None:
    data = case(40, 9)
    state, store = start(H2O(Budget(sink=2, ratio=1.0)), data, chunk)
    assert isinstance(state, H2OState)
    assert state.scores.view().dtype == torch.float32
    assert np.allclose(by_position(state, store), column_sums(data, 40), atol=1e-4)
    for step in range(9):
        q = append(state, store, data, step)
        finish(state, store, state.select(q, store), q, data)
    scores = by_position(state, store)
    assert np.allclose(scores, column_sums(data, 49), atol=1e-4)
    assert np.allclose(scores.sum(-1), 49 * 2)  # the probabilities of each query of each head add up to one


@pytest.mark.parametrize("seed", range(3))
def test_evictions_equal_a_simulation_and_the_size_is_constant(seed: int) -> None:
    budget = Budget(sink=2, window=5, tokens=14, ratio=None)
    prompt, steps = 40, 20
    data = case(prompt, steps, seed=seed, spread=2.0)
    state, store = start(H2O(budget), data)
    sums = column_sums(data, prompt)
    for b, h in np.ndindex(2, 2):
        # 14 tokens with the next one: 2 sinks, 4 recent, 7 heavy.
        heavy = 2 + np.argsort(-sums[b, h, 2 : prompt - 4])[:7]
        assert set(store.positions[b, h].tolist()) == {0, 1, *heavy, *range(prompt - 4, prompt)}
    held = {(b, h): {t: sums[b, h, t] for t in store.positions[b, h].tolist()} for b, h in np.ndindex(2, 2)}
    for step in range(steps):
        q = append(state, store, data, step)
        current = prompt + step
        selection = state.select(q, store)
        assert store.length == 14
        for (b, h), scores in held.items():
            scores[current] = 0.0
            tokens = sorted(scores)
            keys = data.keys[b, h, tokens].double().numpy()
            received = softmax(q[b, h].double().numpy() @ keys.T * data.scaling).sum(0)
            for token, share in zip(tokens, received, strict=True):
                scores[token] += share
            candidates = [t for t in tokens if 2 <= t <= current - 4]
            del scores[min(candidates, key=lambda t: scores[t])]
        finish(state, store, selection, q, data)
        for (b, h), scores in held.items():
            assert set(store.positions[b, h].tolist()) == set(scores)
    assert isinstance(state, H2OState)
    for (b, h), scores in held.items():
        assert np.allclose(by_position(state, store)[b, h], [scores[t] for t in sorted(scores)], atol=1e-4)


def test_weights_follow_rows_after_the_store_reordered_them() -> None:
    data = case(30, 6)
    state, store = start(H2O(Budget(sink=2, window=3, tokens=10, ratio=None)), data)
    assert isinstance(state, H2OState)
    for step in range(6):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        before = dict(zip(store.positions[0, 0].tolist(), state.scores.view()[0, 0].tolist(), strict=True))
        weights = weights_of(selection, store, q, data)[0, 0].sum(0)
        added = dict(zip(store.positions[0, 0].tolist(), weights.tolist(), strict=True))
        finish(state, store, selection, q, data)
        for token, score in zip(store.positions[0, 0].tolist(), state.scores.view()[0, 0].tolist(), strict=True):
            assert score == pytest.approx(before[token] + added[token], abs=1e-5)
