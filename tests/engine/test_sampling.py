"""Sampled tokens: with the same seed and a budget for all tokens, they are those that transformers draws."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.magicpig import MagicPIG
from methods.oracle import Oracle
from methods.pqcache import PQCache
from methods.pyramidkv import PyramidKV
from methods.quest import Quest
from methods.random_tokens import RandomTokens
from methods.snapkv import SnapKV
from methods.sparq import SparQ
from methods.streaming_llm import StreamingLLM
from methods.tova import TOVA
from pqbench import Method, generate
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.method import Budget
from pqbench.store.tiers import HostTier
from tests.support import left_padded, prompt_of

NEW = 16
WHOLE = Budget(sink=8, ratio=1.0)
# InfLLM is left out because it renumbers positions, MagicPIG and vAttention because they always attend to a sample.
METHODS: list[Method] = [
    Full(),
    H2O(WHOLE),
    Oracle(WHOLE),
    PQCache(WHOLE, b=3),
    PyramidKV(WHOLE),
    Quest(WHOLE),
    RandomTokens(WHOLE),
    SnapKV(WHOLE),
    SparQ(WHOLE),
    StreamingLLM(WHOLE),
    TOVA(WHOLE),
]


def drawn(model: PreTrainedModel, ids: Any, mask: Any = None, seed: int = 0, **options: Any) -> torch.Tensor:
    """The tokens that transformers draws."""
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(seed)
    found = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=NEW, **options)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("method", METHODS, ids=[type(method).__name__ for method in METHODS])
def test_every_method_draws_what_transformers_draws(llama: PreTrainedModel, method: Method) -> None:
    ids = prompt_of(40)
    for seed in (0, 7):
        found = generate(llama, ids, method, max_new_tokens=NEW, do_sample=True, seed=seed)
        assert torch.equal(found, drawn(llama, ids, seed=seed))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 1.7, "top_k": 128},
        {"top_k": 3},
        {"top_k": 128, "top_p": 0.6},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8},
    ],
)
def test_the_options_mean_what_they_mean_in_transformers(model: PreTrainedModel, options: dict[str, Any]) -> None:
    ids = prompt_of(30)
    found = generate(model, ids, Full(), max_new_tokens=NEW, do_sample=True, seed=5, **options)
    assert torch.equal(found, drawn(model, ids, seed=5, **options))
    other = generate(model, ids, Full(), max_new_tokens=NEW, do_sample=True, seed=6, **options)
    assert not torch.equal(found, other)


def test_the_likeliest_token_alone_is_the_greedy_one(llama: PreTrainedModel) -> None:
    ids = prompt_of(30)
    greedy = generate(llama, ids, Full(), max_new_tokens=NEW)
    assert torch.equal(generate(llama, ids, Full(), max_new_tokens=NEW, do_sample=True, top_k=1), greedy)


def test_padded_batches_ends_and_the_models_own_settings(llama: PreTrainedModel) -> None:
    model = deepcopy(llama)
    ids, mask = left_padded(prompt_of(20, 4), prompt_of(31, 5))
    model.generation_config.temperature = 1.4
    model.generation_config.repetition_penalty = 1.3
    free = drawn(model, ids, mask, seed=3)
    model.generation_config.eos_token_id = int(free[0, 5])
    model.generation_config.pad_token_id = 0
    expected = drawn(model, ids, mask, seed=3)
    assert (expected[0, 6:] == 0).all()
    found = generate(model, ids, PQCache(WHOLE, b=3), mask, NEW, do_sample=True, seed=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [Full(), PQCache(WHOLE, b=3)])
def test_without_a_seed_torchs_generator_goes_on(llama: PreTrainedModel, method: Method) -> None:
    ids = prompt_of(40)
    torch.manual_seed(11)
    found = generate(llama, ids, method, max_new_tokens=NEW, do_sample=True)
    assert torch.equal(found, drawn(llama, ids, seed=11))


@pytest.mark.parametrize("method", [Full(), PQCache(WHOLE, b=3), MagicPIG(WHOLE), RandomTokens(WHOLE)])
def test_neither_a_seed_nor_a_method_moves_torchs_generator(llama: PreTrainedModel, method: Method) -> None:
    ids = prompt_of(40)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    generate(llama, ids, method, max_new_tokens=4, do_sample=True, seed=1)
    generate(llama, ids, method, max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)


def test_where_the_rows_lie_does_not_matter(llama: PreTrainedModel) -> None:
    ids = prompt_of(40)
    setting = Setting(HostTier(link="local"))
    method = PQCache(Budget(sink=4, tokens=24), b=3)
    here = generate(llama, ids, method, max_new_tokens=NEW, do_sample=True, seed=2)
    assert torch.equal(generate(llama, ids, method, None, NEW, None, setting, do_sample=True, seed=2), here)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.5, "do_sample": False}, "do_sample=True"),
        ({"seed": 1, "do_sample": False}, "do_sample=True"),
        ({"temperature": 0}, "temperature is 0: use a number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0.0}, r"top_p is 0.0: use a number in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1.1: use a number in \(0, 1\]"),
        ({"top_p": "x"}, "top_p is 'x'"),
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5: use a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_values_out_of_range_are_named(llama: PreTrainedModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        generate(llama, prompt_of(20), Full(), **{"do_sample": True, **options})
    assert "\n" not in str(caught.value)
