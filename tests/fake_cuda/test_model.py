"""Prefill and decode of a whole model on the fake device: a Llama of two layers with the heads of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from pqbench.generation import decode  # noqa: E402
from pqbench.prompt import Setting, prefill  # noqa: E402
from tests.fake_cuda.device import CUDA, Device, fake_device  # noqa: E402
from tests.fake_cuda.drive import METHODS, TIERS, method_of  # noqa: E402
from tests.fake_cuda.tally import COPY, SYNC, Counts  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LAYERS = 2
NEW = 5


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device."""
    with fake_device(monkeypatch) as made:
        yield made


def model() -> PreTrainedModel:
    """The model; its weights take no memory."""
    with CUDA:
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).eval()


def run(device: Device, name: str, tier: str, overlap: bool, new: int = NEW, **fields: Any) -> tuple[Counts, Counts]:
    """What prefill and decode of ``new`` tokens cost."""
    setting = Setting(TIERS[tier], overlap)
    ids = torch.zeros(1, 2048, dtype=torch.long, device=CUDA)
    with device.tally.part() as first:
        prefilled = prefill(model(), ids, [method_of(name, **fields)], None, None, new, setting)
    with device.tally.part() as later:
        generation = decode(prefilled, 0, new, min_new_tokens=new, spend=True)
    generation.settle()
    prefilled.close()
    assert generation.tokens.shape == (1, new)
    assert generation.tokens.device == CUDA
    return first, later


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_decodes(name: str, tier: str, overlap: bool, device: Device) -> None:
    _, later = run(device, name, tier, overlap)
    assert not device.tally.faults
    assert later.of(SYNC, within="pqbench/prompt.py") <= 2 * NEW, later.listed(SYNC)  # the clock, once or twice a step
    assert later.of(SYNC, within="pqbench/store/") + later.of(SYNC, within="methods/") == 0, later.listed(SYNC, COPY)
