"""Prefill and decode of a whole model on the fake device: a Llama of two layers with the heads of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from pqbench.engine import rehearsal, rotary
from pqbench.engine.decode import decode
from pqbench.engine.prefill import prefill
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from tests.fake_cuda.budgets import CHECK, COSTS
from tests.fake_cuda.device import CUDA, Device, fake_device
from tests.fake_cuda.drive import METHODS, STEPS, TIERS, method_of
from tests.fake_cuda.tally import COPY, SYNC, Counts

SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LAYERS, PROMPT, NEW = 2, 2048, 6
# The choice of tokens waits in every step to see whether the answer has ended, because the tests watch each step.
# The check of a selection waits once in each layer, only in the first step, as tests/fake_cuda/budgets.py verifies.
LOOP = ("pqbench/engine/chooser.py", *CHECK)


@dataclass
class Run:
    """The counts of a prefill, and the number of waits so far after each decoded token."""

    prefill: Counts
    decode: Counts
    waits: list[int]

    @property
    def later_waits(self) -> int:
        """The waits of the last steps, since the first steps wait for an index and make buffers."""
        return self.waits[-1] - self.waits[2]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device, on which every model passes its rehearsal, and every decode the comparison with the budget that
    ends it: fake tensors hold no numbers."""

    def shapes_alone(*arguments: Any) -> Any:
        """Fake tensors have no logits that could be compared, and no mask of torch's own class."""
        *given, ids, mask, _ = arguments
        return rehearsal._by_layers(*given, ids, mask, ids[:, 0], rehearsal._COLUMNS)[1]

    monkeypatch.setattr("pqbench.engine.decode.check_cohorts", lambda _: None)
    monkeypatch.setattr(rehearsal, "_compared", shapes_alone)
    monkeypatch.setattr(rotary, "_found", lambda keys, _, frequencies, *__: frequencies[0].to(keys.device))
    with fake_device(monkeypatch) as made:
        yield made


def model(layers: int) -> PreTrainedModel:
    """The model; its weights take no memory."""
    with CUDA:
        config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def run(device: Device, name: str, tier: str, overlap: bool, layers: int = LAYERS, **fields: Any) -> Run:
    """Prefill, and decode a few tokens."""
    setting = Setting(TIERS[tier], overlap)
    ids, waits = torch.zeros(1, PROMPT, dtype=torch.long, device=CUDA), []

    def watched(tokens: Tensor) -> Tensor:
        waits.append(device.tally.counts.of(SYNC, without=LOOP))
        return torch.zeros(len(tokens), dtype=torch.bool, device=CUDA)

    made = model(layers)
    profile(made)  # a rehearsal, once for a model; it compares what fake tensors do not hold
    with device.tally.part() as first:
        prefilled = prefill(made, ids, [method_of(name, **fields)], None, None, NEW, setting)
    with device.tally.part() as later:
        generation = decode(prefilled, 0, NEW, NEW, watched, spend=True)
    generation.settle()
    prefilled.close()
    assert generation.tokens.shape == (1, NEW)
    assert generation.tokens.device == CUDA
    return Run(first, later, waits)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits(name: str, tier: str, overlap: bool, device: Device) -> None:
    done = run(device, name, tier, overlap)
    assert not device.tally.faults
    each = COSTS[name][list(TIERS).index(tier)].waits // STEPS  # of a layer and step
    assert done.later_waits <= each * LAYERS * (NEW - 3), done.decode.listed(SYNC, COPY)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["pqcache", "pqcache_plus"])
def test_no_step_waits_for_codes_on_the_host(name: str, tier: str, overlap: bool, device: Device) -> None:
    done = run(device, name, tier, overlap, codes_on="host")
    assert not device.tally.faults
    assert done.later_waits == 0, done.decode.listed(SYNC, COPY)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["full", "pqcache"])
def test_a_prefill_waits_as_often_for_many_layers_as_for_few(name: str, tier: str, device: Device) -> None:
    few, many = (run(device, name, tier, True, layers) for layers in (1, 4))
    assert few.prefill.of(SYNC) == many.prefill.of(SYNC), many.prefill.listed(SYNC, COPY)
    assert few.waits[-1] == many.waits[-1], many.decode.listed(SYNC, COPY)


@pytest.mark.parametrize("tier", TIERS)
def test_an_index_is_built_beside_the_next_layers_from_the_rows_on_the_gpu(tier: str, device: Device) -> None:
    run(device, "pqcache", tier, True)
    streams = {stream for stream, kernel in device.tally.streams if kernel == "sum_clusters"}
    assert streams
    assert "default" not in streams
    assert device.tally.host_work == {}
