"""StreamingLLM against its definition: keys are kept unrotated, and rotated in every step by their index in the
cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.streaming_llm import StreamingLLM
from pqbench.method import Budget
from tests.support import append, case, finish, output_of, softmax, start, tokens_of, turned


@pytest.mark.parametrize(
    "budget",
    [
        Budget(sink=2, tokens=12, ratio=None),
        Budget(sink=2, ratio=0.3, minimum=8),
        Budget(sink=2, ratio=0.3, grow=False, minimum=8),
    ],
)
@pytest.mark.parametrize("prompt", [2, 10, 40])
def test_output_equals_unrotated_keys_renumbered_by_cache_index(budget: Budget, prompt: int) -> None:
    data = case(prompt, 25)
    frequencies = data.frequencies.double().numpy()
    plain = data.keys.double().numpy().copy()  # before rotary embedding
    plain_q = data.q.double().numpy().copy()
    for position in range(prompt + 25):
        data.keys[:, :, position] = _turn(plain[:, :, position], position, frequencies)
        data.q[:, :, :, position] = _turn(plain_q[:, :, :, position], position, frequencies)
    state, store = start(StreamingLLM(budget, sink=4), data)
    cache = list(range(prompt))  # ours: a list of tokens
    for step in range(25):
        q = append(state, store, data, step)
        cache.append(prompt + step)
        total = budget.resolve(prompt + step + 1, prompt).total
        while len(cache) > total:
            del cache[min(4, len(cache) - 1)]  # the oldest that is no sink
        if len(cache) < total and len(cache) < prompt + step + 1:
            pytest.fail("a token that the budget has room for was dropped")
        selection = state.select(q, store)
        tokens = tokens_of(selection, store)
        assert all(sorted(tokens[b, h].tolist()) == cache for b, h in np.ndindex(2, 2))
        keys = np.stack([turned(plain[:, :, token], index, frequencies) for index, token in enumerate(cache)], 2)
        query = turned(plain_q[:, :, :, prompt + step], len(cache) - 1, frequencies)
        weights = softmax(np.einsum("bhgd,bhnd->bhgn", query, keys) * data.scaling)
        expected = np.einsum("bhgn,bhnd->bhgd", weights, data.values[:, :, cache].double().numpy())
        assert np.allclose(output_of(selection, store, q, data), expected, atol=1e-4)
        finish(state, store, selection, q, data)


def _turn(x: np.ndarray, position: int, frequencies: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(turned(x, position, frequencies)).float()


def test_rolling_positions_differ_from_true_ones_once_tokens_are_gone() -> None:
    data = case(40, 1)
    state, store = start(StreamingLLM(Budget(sink=2, tokens=12, ratio=None)), data)
    q = append(state, store, data, 0)
    selection = state.select(q, store)
    assert selection.key_shift is not None
    moved = {int(t): int(s) for t, s in zip(tokens_of(selection, store)[0, 0], selection.key_shift[0, 0], strict=True)}
    assert moved == {token: 29 if token < 4 else 0 for token in [0, 1, 2, 3, *range(33, 41)]}
