"""InfLLM's own prefill against numpy, token by token; and runs with methods that share a dense prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods.full import Full
from methods.infllm import InfLLM, InfLLMState
from pqbench import generate, prefill
from pqbench.method import Budget, ConfigError
from tests.methods.test_infllm import block_vectors, clipped_attention, received
from tests.support import Case, case, left_padded, prompt_of, turned

NEW = 8


def own(budget: Budget, **options: int | bool) -> InfLLM:
    return InfLLM(budget, **{"block_size": 4, "representatives": 2, "exec_block": 16, **options}, prefill="infllm")  # type: ignore[arg-type]


def visible(data: Case, method: InfLLM, first: int, end: int) -> list[list[np.ndarray]]:
    """Tokens before an execution block to which it attends, for each sequence and head: sinks, the best blocks for the
    summed queries of the execution block, and all tokens that are in no block yet."""
    split, size = method.budget.resolve(end, data.prompt), method.block_size
    whole = max(0, first + 1 - split.window - split.sink) // size
    stop = split.sink + whole * size
    # No later query adds attention to blocks outside the window.
    vectors = (
        block_vectors(
            data,
            received(data, method.budget.resolve(data.prompt, data.prompt).window, first),
            split.sink,
            stop,
            size,
            method.representatives,
        )
        if whole
        else None
    )
    frequencies = data.frequencies.double().numpy()
    q = data.q[:, :, :, first:end].double().numpy()
    angles = [split.window - 1 - i for i in range(first, end)]
    summed = np.sum([turned(q[:, :, :, n], angle, frequencies) for n, angle in enumerate(angles)], axis=0)
    found = []
    for b in range(len(q)):
        scores = None if vectors is None else np.einsum("hgd,hkd->hk", summed[b], vectors[b])
        if scores is not None and not method.per_head:
            scores = np.broadcast_to(scores.sum(0), scores.shape)
        rows = []
        for h in range(q.shape[1]):
            ranked = [] if scores is None else np.argsort(-scores[h], kind="stable").tolist()
            best = ranked[: -(-split.top_k // size)]
            middle = [split.sink + size * k + i for k in best for i in range(size)][: split.top_k]
            rows.append(np.array([*range(split.sink), *middle, *range(stop, end)]))
        found.append(rows)
    return found


@settings(max_examples=12)
@given(
    prompt=st.integers(1, 60),
    window=st.integers(1, 30),
    top_k=st.integers(0, 20),
    per_head=st.booleans(),
    exec_block=st.sampled_from([9, 16, 200]),
    seed=st.integers(0, 50),
)
def test_every_query_sees_sinks_blocks_and_its_window(
    prompt: int, window: int, top_k: int, per_head: bool, exec_block: int, seed: int
) -> None:
    data = case(prompt, 1, seed=seed)
    method = own(Budget(3, window, 3 + window + top_k, ratio=None), exec_block=exec_block, per_head=per_head)
    state = method.layer(data.geometry)
    assert isinstance(state, InfLLMState)
    output = state.prefill(data.q[:, :, :, :prompt], data.keys[:, :, :prompt], data.values[:, :, :prompt])
    for first in range(0, prompt, exec_block):
        end = min(first + exec_block, prompt)
        tokens, width = visible(data, method, first, end), method.budget.resolve(end, prompt).window
        for i in range(first, end):
            for b, h in np.ndindex(2, 2):
                seen = tokens[b][h][tokens[b][h] <= i]
                one = np.broadcast_to(seen, (2, 2, len(seen))).copy()
                expected = clipped_attention(data, data.q[:, :, :, i].double().numpy(), one, width, i)[b, h]
                assert np.allclose(output[b, h, :, i].numpy(), expected, atol=1e-4)


def test_a_window_for_everything_is_dense_prefill(model: PreTrainedModel) -> None:
    ids, mask = left_padded(prompt_of(61, 1), prompt_of(120, 2), prompt_of(61, 3))
    method = own(Budget(sink=0, window=4096, ratio=1.0))
    expected = generate(model, ids, Full(), mask, NEW)
    assert torch.equal(generate(model, ids, method, mask, NEW), expected)
    assert torch.equal(generate(model, ids, method, mask, NEW, chunk=16), expected)


def test_chunks_of_whole_execution_blocks_change_nothing(llama: PreTrainedModel) -> None:
    ids, method = prompt_of(130), own(Budget(sink=4, window=20, tokens=40, ratio=None))
    whole = generate(llama, ids, method, max_new_tokens=NEW)
    assert not torch.equal(whole, generate(llama, ids, Full(), max_new_tokens=NEW))
    assert torch.equal(generate(llama, ids, method, max_new_tokens=NEW, chunk=32), whole)


def test_prompts_may_be_longer_than_what_the_model_was_trained_on(llama: PreTrainedModel) -> None:
    ids, method = prompt_of(2100), own(Budget(sink=4, window=64, tokens=128, ratio=None), exec_block=512)
    assert generate(llama, ids, method, max_new_tokens=NEW).shape == (1, NEW)
    with pytest.raises(ConfigError, match="limit of 2048"):
        generate(llama, ids, InfLLM(method.budget), max_new_tokens=NEW)


def test_it_shares_no_prefill(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="InfLLM has a prefill of its own"):
        prefill(llama, prompt_of(20), [Full(), own(Budget())])


@pytest.mark.parametrize("options", [{"prefill": "sparse"}, {"exec_block": 0}])
def test_wrong_options_are_named(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"infllm.prefill must be dense or infllm and infllm.exec_block"):
        InfLLM(**options)  # type: ignore[arg-type]
