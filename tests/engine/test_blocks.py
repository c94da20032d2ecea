"""Chunked prefill on a GPU needs no mask and uses flash attention with the same result; tested on the CPU and on meta
tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from methods.full import Full
from pqbench.engine import attention
from pqbench.engine.attention import block_mask, causal_block
from pqbench.engine.prefill import prefill
from tests.support import prompt_of, softmax, tiny_model


class Calls(TorchDispatchMode):
    """Records the names of the operations called inside the block, and the number of elements of their largest
    tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention_itself = func.name() == "aten::scaled_dot_product_attention"  # whole in inference mode
        with self if attention_itself else nullcontext():
            result = (func.decompose if attention_itself else func)(*args, **(kwargs or {}))
        self.names.add(func.name())
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return result


@pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 3)])
def test_a_block_sees_all_keys_up_to_its_own_tokens(heads: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads * group, 5, 8, generator=generator)
    k, v = (torch.randn(2, heads, 17, 8, generator=generator) for _ in range(2))
    output = causal_block(q, k, v, 0.3)
    assert output.shape == (2, 5, heads * group, 8)
    for b, h, i in np.ndindex(2, heads * group, 5):
        seen = 17 - 5 + i + 1
        keys, values = (x[b, h // group, :seen].double().numpy() for x in (k, v))
        expected = softmax(q[b, h, i].double().numpy() @ keys.T * 0.3) @ values
        assert np.allclose(output[b, i, h].numpy(), expected, atol=1e-5)


def test_a_causal_mask_is_left_out_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"batch_size": 1, "q_length": 4, "kv_length": 12, "q_offset": 8}
    assert block_mask(**block, device="cuda") is None
    on_cpu = block_mask(**block, device="cpu")
    assert on_cpu is not None
    assert torch.equal(on_cpu[0, 0], torch.ones(4, 12).tril(8).bool())
    padded = torch.ones(1, 12, dtype=torch.bool)
    padded[0, :3] = False
    monkeypatch.setattr(attention, "sdpa_mask", lambda **_: on_cpu)  # which cannot make one on a GPU here
    needed: list[dict[str, Any]] = [{"attention_mask": padded}, {"local_size": 4}, {"allow_is_causal_skip": False}]
    for options in needed:
        assert block_mask(**block, device="cuda", **options) is on_cpu


def test_blocks_without_a_mask_give_what_one_shot_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = prompt_of(50)
    whole = prefill(model, ids, [Full()])
    monkeypatch.setattr(attention, "block_mask", lambda **_: None)
    masks: list[Any] = []
    dense = attention.dense_attention

    def noted(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, sinks: Any) -> Any:
        masks.append(mask)
        return dense(module, q, k, v, mask, scaling, sinks)

    monkeypatch.setattr("pqbench.engine.layers.dense_attention", noted)
    blocks = prefill(model, ids, [Full()], chunk=16)
    assert masks == [None] * 4 * 2
    assert torch.allclose(blocks.logits, whole.logits, atol=1e-4)


def test_flash_attention_serves_blocks_and_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU build of torch decides this from the tensors; a CPU build has no flash attention, so the answer is set
    here."""
    asked = []

    def can_use(parameters: Any) -> bool:
        asked.append((parameters.query.shape, parameters.key.shape, parameters.attn_mask, parameters.enable_gqa))
        return True

    monkeypatch.setattr(bias, "can_use_flash_attention", can_use)
    q = torch.empty(1, 32, 2048, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, 131072, 128, dtype=torch.bfloat16, device="meta")
    attention._lower_right(2048, 131072)  # made once; torch cannot make one while operations are watched
    with Calls() as calls:
        output = causal_block(q, k, k, 0.1)
    assert asked == [(q.shape, k.shape, None, True)]
    assert output.shape == (1, 2048, 32, 128)
    assert "aten::_scaled_dot_product_flash_attention" in calls.names
    assert calls.largest <= k.numel()  # nothing of n x S, and no repeated keys


@pytest.mark.parametrize("chunk", [None, 128])
def test_a_prefill_makes_nothing_of_the_square_of_a_prompt(chunk: int | None) -> None:
    ids = prompt_of(2000)
    with Calls() as calls:
        prefill(tiny_model("llama"), ids, [Full()], chunk=chunk)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in calls.names
    assert calls.largest <= 2000 * 128 * (1 if chunk is None else 2)  # the feed-forward layers, or a block's mask
