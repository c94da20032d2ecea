"""One prompt gives the same tokens for every method, however its keys and values are held and moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.pqcache import PQCache
from pqbench.engine.decode import decode, generate
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.method import Budget, Method
from pqbench.store.tiers import DeviceTier, HostTier
from tests.engine.test_generation import SMALL, methods
from tests.support import left_padded, prompt_of

NEW = 40  # more than half the ring's margin, so that tokens leave for the host
CACHE: dict[str, Any] = {"cache_tokens": 64, "cache_block": 16, "cache_admit": 2}
SETTINGS = {
    "host": Setting(HostTier(link="local")),
    "host, small ring": Setting(HostTier(link="local", margin=4)),
    "host, nothing beside anything": Setting(HostTier(link="local", background=False), overlap=False),
    "host, lfu": Setting(HostTier(link="local", **CACHE)),
    "host, lru": Setting(HostTier(link="local", **CACHE, cache_policy="lru")),
    "host, cache per head": Setting(HostTier(link="local", **CACHE, cache_per_head=True)),
    "host, poisoned": Setting(HostTier(link="local", **CACHE, debug=True, margin=4)),
    "host, emulated link": Setting(HostTier(link="pcie4", **CACHE)),
    "cpu kernels": Setting(backend="cpu"),
    "host, cpu kernels": Setting(HostTier(link="local", **CACHE), backend="cpu"),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_gives_the_same_tokens(llama: PreTrainedModel, setting: Setting) -> None:
    ids = prompt_of(260, seed=7)
    for name, method in methods(SMALL).items():
        expected = generate(llama, ids, method, max_new_tokens=NEW, setting=Setting(backend="reference", overlap=False))
        assert torch.equal(generate(llama, ids, method, max_new_tokens=NEW, setting=setting), expected), name


@pytest.mark.parametrize("name", ["full", "h2o", "pqcache", "infllm"])
def test_on_every_architecture(model: PreTrainedModel, name: str) -> None:
    ids, method = prompt_of(120, seed=8), methods(SMALL)[name]
    expected = generate(model, ids, method, max_new_tokens=NEW)
    assert torch.equal(generate(model, ids, method, max_new_tokens=NEW, setting=SETTINGS["host, poisoned"]), expected)


def test_left_padded_batches_and_chunks_on_the_host(llama: PreTrainedModel) -> None:
    prompts = [prompt_of(length, seed=length) for length in (150, 90, 150)]
    ids, mask = left_padded(*prompts)
    for name, method in methods(SMALL).items():
        expected = generate(llama, ids, method, mask, NEW)
        setting = SETTINGS["host, poisoned"]
        assert torch.equal(generate(llama, ids, method, mask, NEW, chunk=64, setting=setting), expected), name


def several(model: PreTrainedModel, ids: Tensor, chosen: dict[str, Method], setting: Setting) -> dict[str, Tensor]:
    """The tokens of each method, all from one prefill."""
    prefilled = prefill(model, ids, list(chosen.values()), setting=setting)
    return {name: decode(prefilled, m, NEW).tokens for m, name in enumerate(chosen)}


def test_methods_that_share_a_prompt_on_the_host_do_not_disturb_each_other(llama: PreTrainedModel) -> None:
    ids, chosen = prompt_of(200, seed=9), methods(SMALL)
    shared = several(llama, ids, chosen, SETTINGS["host, poisoned"])
    for name, method in chosen.items():
        assert torch.equal(shared[name], generate(llama, ids, method, max_new_tokens=NEW)), name


def test_a_second_prompt_equals_the_same_prompt_alone(llama: PreTrainedModel) -> None:
    setting, method = SETTINGS["host, poisoned"], PQCache(SMALL, m=2, b=4)
    alone = generate(llama, prompt_of(180, seed=11), method, max_new_tokens=NEW, setting=setting)
    generate(llama, prompt_of(260, seed=10), method, max_new_tokens=NEW, setting=setting)
    assert torch.equal(generate(llama, prompt_of(180, seed=11), method, max_new_tokens=NEW, setting=setting), alone)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 16, 17, 18, 19, 20, 21, 22, 26])
def test_short_prompts_equal_full_attention(llama: PreTrainedModel, length: int) -> None:
    """With at most 2**3 middle tokens, 4 sinks and a window of 6 there is no codebook, and all tokens are attended."""
    method = PQCache(Budget(sink=4, window=6, tokens=26, ratio=None), m=2, b=3)
    ids, new = prompt_of(length, seed=length), max(1, min(8, 19 - length))
    expected = generate(llama, ids, methods(SMALL)["full"], max_new_tokens=new)
    for tier in (DeviceTier(), HostTier(link="local", debug=True)):
        assert torch.equal(generate(llama, ids, method, max_new_tokens=new, setting=Setting(tier)), expected)


@pytest.mark.parametrize("tier", [DeviceTier(), HostTier(link="local", debug=True)])
@pytest.mark.parametrize("cached", [True, False])
def test_codes_that_come_from_the_host_a_layer_ahead_change_nothing(
    llama: PreTrainedModel, tier: Any, cached: bool
) -> None:
    ids = prompt_of(220, seed=12)
    expected = generate(llama, ids, PQCache(SMALL, m=2, b=4), max_new_tokens=NEW)
    method = PQCache(SMALL, m=2, b=4, codes_on="host")
    setting = Setting(tier, overlap=cached)
    assert torch.equal(generate(llama, ids, method, max_new_tokens=NEW, setting=setting), expected)
