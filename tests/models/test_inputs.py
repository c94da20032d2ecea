"""Inputs other than token ids are passed on or refused by name, but never ignored."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from pqbench import Budget, decoding_with
from pqbench.errors import ConfigError
from pqbench.support.miniature import small_model
from tests.support import prompt_of

NEW = 6
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


@lru_cache
def small(kind: str) -> PreTrainedModel:
    return small_model(kind)


def ours(model: PreTrainedModel, **inputs: Any) -> Any:
    return model.generate(prompt_of(20), **GREEDY, custom_generate=decoding_with(Full()), **inputs)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3", "bert"])
def test_text_alone_is_served(kind: str) -> None:
    model = small(kind)
    inputs = {"token_type_ids": torch.zeros(1, 20, dtype=torch.long)} if kind != "qwen3" else {}
    assert torch.equal(ours(model, **inputs), model.generate(prompt_of(20), **GREEDY, **inputs))


def test_images_are_refused() -> None:
    model = small_model("gemma3", mm_tokens_per_image=4)
    with pytest.raises(ConfigError, match=r"pixel_values|mm_encoder_outputs"):
        ours(model, pixel_values=torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_type_ids", torch.ones(1, 20, dtype=torch.long)),
        ("position_ids", torch.arange(5, 25)[None]),
        ("encoder_hidden_states", torch.zeros(1, 4, 64)),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=name):
        ours(small("bert"), **{name: value})


@pytest.mark.parametrize("tokens", [0, 10])
def test_a_cache_of_the_caller_is_refused(tokens: int) -> None:
    """Transformers would fill an empty cache, and continue from a filled one."""
    model = small("qwen3")
    cache = DynamicCache(config=model.config)
    if tokens:
        with torch.no_grad():
            model(prompt_of(tokens), past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match="past_key_values"):
        ours(model, past_key_values=cache)


def test_usual_positions_are_not_news() -> None:
    model = small("qwen3")
    expected = model.generate(prompt_of(20), **GREEDY)
    assert torch.equal(ours(model, position_ids=torch.arange(20)[None]), expected)


@pytest.mark.parametrize("method", [Full(), H2O(Budget(sink=4, ratio=1.0))])
def test_an_output_object_where_one_is_asked_for(method: Any) -> None:
    model = small("qwen3")
    options = {**GREEDY, "return_dict_in_generate": True}
    found = model.generate(prompt_of(20), **options, custom_generate=decoding_with(method))
    assert torch.equal(found.sequences, model.generate(prompt_of(20), **options).sequences)
    with pytest.raises(ConfigError, match="output_logits"):
        model.generate(prompt_of(20), **options, output_logits=True, custom_generate=decoding_with(method))
