"""InfLLM against an explicit reference: blocks, representatives and clipped positions, token by token in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from methods.infllm import InfLLM, InfLLMState
from pqbench.method import Budget, ConfigError
from pqbench.store.device import DeviceStore
from tests.support import Case, append, case, finish, output_of, softmax, start, tokens_of, turned, weights_of

BUDGET = Budget(sink=3, window=8, tokens=27, ratio=None)


def unrotated(data: Case, token: int) -> np.ndarray:
    """Keys ``[B, H, D]`` before rotary embedding."""
    return turned(data.keys[:, :, token].double().numpy(), -token, data.frequencies.double().numpy())


def clipped_attention(data: Case, q: np.ndarray, tokens: np.ndarray, window: int, current: int) -> np.ndarray:
    """Output ``[B, H, G, D]`` if each token outside the local window is treated as ``window - 1`` tokens away: the
    query is rotated to that position and the key to position zero."""
    frequencies = data.frequencies.double().numpy()
    far = turned(turned(q, -current, frequencies), window - 1, frequencies)
    output = np.zeros(q.shape)
    for b, h in np.ndindex(*q.shape[:2]):
        logits = np.stack(
            [
                q[b, h] @ data.keys[b, h, t].double().numpy()
                if t > current - window
                else far[b, h] @ unrotated(data, t)[b, h]
                for t in tokens[b, h]
            ],
            -1,
        )
        output[b, h] = softmax(logits * data.scaling) @ data.values[b, h, tokens[b, h]].double().numpy()
    return output


def received(data: Case, window: int, prompt: int) -> np.ndarray:
    """The probability that each token got from the queries with it in their local window, ``[B, H, prompt]``."""
    sums = np.zeros((*data.keys.shape[:2], prompt))
    for t in range(prompt):
        first = max(0, t - window + 1)
        q, keys = data.q[:, :, :, t].double().numpy(), data.keys[:, :, first : t + 1].double().numpy()
        sums[:, :, first : t + 1] += softmax(np.einsum("bhgd,bhsd->bhgs", q, keys) * data.scaling).sum(2)
    return sums


def block_vectors(data: Case, sums: np.ndarray, first: int, stop: int, size: int, count: int) -> np.ndarray:
    """The mean of the unrotated representatives of each block, ``[B, H, blocks, D]``; the last block may be
    incomplete."""
    vectors = []
    for begin in range(first, stop, size):
        end = min(begin + size, stop)
        vector = np.zeros((*data.keys.shape[:2], data.keys.shape[3]))
        for b, h in np.ndindex(*vector.shape[:2]):
            best = begin + np.argsort(-sums[b, h, begin:end])[:count]
            vector[b, h] = np.mean([unrotated(data, int(t))[b, h] for t in best], 0)
        vectors.append(vector)
    return np.stack(vectors, 2)


def at_first_step(data: Case, method: InfLLM, chunk: int | None = None) -> tuple[InfLLMState, DeviceStore, np.ndarray]:
    state, store = start(method, data, chunk)
    q = append(state, store, data, 0)
    assert isinstance(state, InfLLMState)
    return state, store, q.double().numpy()


@pytest.mark.parametrize("chunk", [None, 9])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("size", "representatives"), [(4, 2), (7, 3), (16, 1)])
def test_blocks_scores_and_output_equal_the_reference(
    size: int, representatives: int, per_head: bool, chunk: int | None
) -> None:
    data = case(60, 1, spread=2.0)
    method = InfLLM(BUDGET, size, representatives, per_head)
    state, store, q = at_first_step(data, method, chunk)
    current, window, first, stop = 60, 8, 3, 53
    vectors = block_vectors(data, received(data, window, 60), first, stop, size, representatives)
    assert state.vectors is not None
    assert np.allclose(state.vectors.view().numpy(), vectors, atol=1e-4)
    frequencies = data.frequencies.double().numpy()
    far = turned(turned(q, -current, frequencies), window - 1, frequencies)
    scores = np.einsum("bhgd,bhnd->bhn", far, vectors)
    if not per_head:
        scores = np.broadcast_to(scores.sum(1, keepdims=True), scores.shape)
    selection = state.select(first_query(data), store)
    tokens = tokens_of(selection, store).numpy()
    for b, h in np.ndindex(2, 2):
        retrieved: list[int] = []
        for block in np.argsort(-scores[b, h]):
            begin = first + size * int(block)
            retrieved += range(begin, min(begin + size, stop))
        expected = {0, 1, 2, *retrieved[:16], *range(61 - window, 61)}
        assert set(tokens[b, h].tolist()) == expected
    if not per_head:
        assert (np.sort(tokens[:, 0]) == np.sort(tokens[:, 1])).all()  # all heads share the blocks
    expected_output = clipped_attention(data, q, tokens, window, current)
    assert np.allclose(output_of(selection, store, first_query(data), data), expected_output, atol=1e-4)


def first_query(data: Case) -> Tensor:
    """The query of the first decoded token."""
    return data.q[:, :, :, data.prompt]


def test_all_blocks_are_not_full_attention_but_the_clipped_reference() -> None:
    data = case(60, 5)
    method = InfLLM(Budget(sink=3, window=8, ratio=1.0), block_size=4)
    state, store = start(method, data)
    for step in range(5):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        current = 60 + step
        tokens = np.tile(np.arange(current + 1), (2, 2, 1))
        output = output_of(selection, store, q, data)
        assert np.allclose(output, clipped_attention(data, q.double().numpy(), tokens, 8, current), atol=1e-4)
        assert not np.allclose(output, data.full(current + 1), atol=1e-2)
        finish(state, store, selection, q, data)


@pytest.mark.parametrize("window", [59, 60, 61, 62])
def test_full_attention_exactly_when_the_context_fits_the_window(window: int) -> None:
    data = case(60, 1)
    state, store, _ = at_first_step(data, InfLLM(Budget(sink=0, window=window, ratio=1.0), block_size=4))
    output = output_of(state.select(first_query(data), store), store, first_query(data), data)
    assert np.allclose(output, data.full(61), atol=1e-5) == (window >= 61)


def test_the_last_partial_block_is_made_anew_until_it_is_full() -> None:
    data = case(40, 12)
    method = InfLLM(Budget(sink=3, window=8, tokens=20, ratio=None), block_size=5, representatives=1)
    state, store = start(method, data)
    assert isinstance(state, InfLLMState)
    complete: dict[int, np.ndarray] = {}
    for step in range(12):
        q = append(state, store, data, step)
        middle = 40 + step + 1 - 3 - 8
        assert state.vectors is not None
        assert len(state.vectors) == -(-middle // 5)
        scores = state.representatives.scores.view().numpy()
        expected = block_vectors(data, scores, 3, 3 + middle, 5, 1)
        assert np.allclose(state.vectors.view()[:, :, -1].numpy(), expected[:, :, -1], atol=1e-4)
        for block in range(middle // 5):  # complete blocks never change
            vector = state.vectors.view()[:, :, block].numpy().copy()
            assert np.array_equal(complete.setdefault(block, vector), vector)
        finish(state, store, state.select(q, store), q, data)


def test_decoded_tokens_collect_attention_inside_the_window() -> None:
    data = case(40, 10)
    method = InfLLM(BUDGET, block_size=5)
    state, store = start(method, data)
    assert isinstance(state, InfLLMState)
    expected = received(data, 8, 40)
    for step in range(10):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        expected = np.concatenate([expected, np.zeros((2, 2, 1))], 2)
        tokens = tokens_of(selection, store).numpy()
        weights = weights_of(selection, store, q, data).sum(2)
        for b, h, n in np.ndindex(*tokens.shape):
            if tokens[b, h, n] > 40 + step - 8:
                expected[b, h, tokens[b, h, n]] += weights[b, h, n]
        finish(state, store, selection, q, data)
    assert np.allclose(state.representatives.scores.view().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "representatives"), [(0, 1), (4, 0), (4, 5)])
def test_wrong_options_are_named(size: int, representatives: int) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        InfLLM(BUDGET, size, representatives)
