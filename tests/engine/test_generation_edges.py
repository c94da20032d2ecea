"""Ends, padding, the call from transformers, refusals, and cleanup after an exception."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from methods.streaming_llm import StreamingLLM
from pqbench import Method, decode, decoding_with, generate, prefill
from pqbench.engine.attention import NAME
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError, ModelError
from pqbench.method import Budget, Geometry, LayerState
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import SHAPE, left_padded, prompt_of, randomize, tiny_model

NEW = 12
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
WHOLE = Budget(sink=8, ratio=1.0)


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, new: int = NEW, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, **options)[:, ids.shape[1] :]


@pytest.fixture
def ending() -> Iterator[PreTrainedModel]:
    """A Llama of its own, so that a test may set its end tokens without effect on other tests."""
    model = deepcopy(tiny_model("llama"))
    yield model
    assert model.config._attn_implementation != NAME


def batch_that_ends(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch of two prompts, and their continuations without end tokens."""
    ids, mask = left_padded(prompt_of(20, 4), prompt_of(31, 5))
    return ids, mask, greedy(model, ids, mask)


@pytest.mark.parametrize("pad", [0, None])
def test_ends_stop_and_pad_as_in_transformers(ending: PreTrainedModel, pad: int | None) -> None:
    ids, mask, free = batch_that_ends(ending)
    for position in (0, 3, 7):
        for row in range(2):
            ending.generation_config.eos_token_id = int(free[row, position])
            ending.generation_config.pad_token_id = pad
            expected = greedy(ending, ids, mask)
            for method in (Full(), PQCache(WHOLE, b=3), H2O(WHOLE)):
                assert torch.equal(generate(ending, ids, method, mask, NEW), expected)


def test_several_end_tokens(ending: PreTrainedModel) -> None:
    ids, mask, free = batch_that_ends(ending)
    ending.generation_config.eos_token_id = [int(free[0, 2]), int(free[1, 5])]
    assert torch.equal(generate(ending, ids, Full(), mask, NEW), greedy(ending, ids, mask))


def test_both_ended_stops_early(ending: PreTrainedModel) -> None:
    ids = prompt_of(20, 4)
    free = greedy(ending, ids)
    ending.generation_config.eos_token_id = int(free[0, 4])
    first = free[0].tolist().index(int(free[0, 4]))
    tokens = generate(ending, ids, Full(), max_new_tokens=NEW)
    assert tokens[0].tolist() == free[0, : first + 1].tolist()


def test_extra_ends_end_a_sequence(ending: PreTrainedModel) -> None:
    ids, mask, free = batch_that_ends(ending)
    ending.generation_config.eos_token_id = int(free[0, 6])
    extra = int(free[1, 2])
    expected = greedy(ending, ids, mask, eos_token_id=[int(free[0, 6]), extra])
    prefilled = prefill(ending, ids, [Full()], mask)
    assert torch.equal(decode(prefilled, 0, NEW, extra_ends=[extra]).tokens, expected)
    assert torch.equal(decode(prefilled, 0, NEW).tokens, greedy(ending, ids, mask))


@pytest.mark.parametrize("least", [1, 4, NEW])
def test_min_new_tokens_keeps_ends_out(ending: PreTrainedModel, least: int) -> None:
    ids, mask, free = batch_that_ends(ending)
    ends = [int(free[0, 1]), int(free[1, 3])]
    ending.generation_config.eos_token_id = ends[:1]
    expected = greedy(ending, ids, mask, min_new_tokens=least, eos_token_id=ends)
    tokens = decode(prefill(ending, ids, [Full()], mask), 0, NEW, min_new_tokens=least, extra_ends=ends[1:]).tokens
    assert torch.equal(tokens, expected)
    assert not torch.isin(tokens[:, :least], torch.tensor(ends)).any()


class Stop(StoppingCriteria):
    """Ends a sequence at one of some tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("length", [20, 130])
def test_custom_generate_equals_generate(model: PreTrainedModel, length: int) -> None:
    ids = prompt_of(length)
    expected = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    small = Budget(sink=4, ratio=0.3, minimum=12)
    for method in (Full(), PQCache(WHOLE, b=3), StreamingLLM(WHOLE)):
        tokens = model.generate(ids, **GREEDY, custom_generate=decoding_with(method))
        assert torch.equal(tokens, expected)
    tokens = model.generate(ids, **GREEDY, custom_generate=decoding_with(PQCache(small, b=3)))
    assert torch.equal(tokens[:, length:], generate(model, ids, PQCache(small, b=3), max_new_tokens=NEW))


def test_custom_generate_of_a_padded_batch_with_ends(ending: PreTrainedModel) -> None:
    ids, mask, free = batch_that_ends(ending)
    for end in (int(free[0, 3]), int(free[1, 5])):
        ending.generation_config.eos_token_id = end
        tokens = ending.generate(ids, attention_mask=mask, **GREEDY, custom_generate=decoding_with(Full()))
        assert torch.equal(tokens[:, ids.shape[1] :], greedy(ending, ids, mask))


def test_custom_generate_honours_the_calls_own_ends(ending: PreTrainedModel) -> None:
    """The end and padding tokens of a call replace those of the model."""
    ids, mask, free = batch_that_ends(ending)
    ending.generation_config.eos_token_id = int(free[0, 0])
    options = {"eos_token_id": int(free[0, 5]), "pad_token_id": 77}
    tokens = ending.generate(ids, attention_mask=mask, **GREEDY, custom_generate=decoding_with(Full()), **options)
    assert torch.equal(tokens[:, ids.shape[1] :], greedy(ending, ids, mask, **options))


def test_custom_generate_honours_stopping_criteria_per_sequence(ending: PreTrainedModel) -> None:
    ids, mask, free = batch_that_ends(ending)
    for tokens in ([int(free[0, 2])], [int(free[0, 2]), int(free[1, 6])]):
        options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([Stop(tokens)]), "pad_token_id": 0}
        ending.generation_config.eos_token_id = next(t for t in range(1, 128) if t not in free)
        expected = greedy(ending, ids, mask, **options)  # without an end token it would not pad
        assert (expected[0, 3:] == 0).all()
        mine = ending.generate(ids, attention_mask=mask, **GREEDY, custom_generate=decoding_with(Full()), **options)
        assert torch.equal(mine[:, ids.shape[1] :], expected)


class FailingState(LayerState):
    """Fails in the middle of a forward pass."""

    def append(self, kv: Any) -> None:
        raise ZeroDivisionError("on purpose")


class Failing(Method):
    """Makes states that fail."""

    def layer(self, geometry: Geometry) -> LayerState:
        return FailingState(geometry)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_model_is_restored_after_success_and_after_an_exception(ending: PreTrainedModel, name: str) -> None:
    ending.set_attn_implementation(name)
    ids = prompt_of(20)
    before = greedy(ending, ids)
    generate(ending, ids, Full(), max_new_tokens=2)
    assert ending.config._attn_implementation == name
    with pytest.raises(ZeroDivisionError):
        generate(ending, ids, Failing(), max_new_tokens=2)
    assert ending.config._attn_implementation == name
    assert torch.equal(greedy(ending, ids), before)
    assert torch.equal(generate(ending, ids, Full(), max_new_tokens=NEW), before)


def test_soft_capping_is_refused_by_name() -> None:
    model = randomize(Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=16, query_pre_attn_scalar=16)))
    assert model.config.attn_logit_softcapping
    with pytest.raises(ModelError, match="soft-capping"):
        generate(model, prompt_of(8), Full(), max_new_tokens=2)
    assert model.config._attn_implementation != NAME


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        ([[1, 1, 0, 1, 1]], "holes"),
        ([[1, 1, 1, 1, 0]], "left"),
        ([[0, 1, 1, 0, 0]], "left"),
        ([[0, 0, 0, 0, 0]], "empty"),
        ([[1, 1, 1, 1]], "attention_mask"),
    ],
)
def test_masks_that_cannot_be_served(llama: PreTrainedModel, mask: list[list[int]], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        generate(llama, prompt_of(5), Full(), torch.tensor(mask))


@pytest.mark.parametrize("shape", [(1, 0), (0,)])
def test_an_empty_prompt_is_refused(llama: PreTrainedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        generate(llama, torch.zeros(shape, dtype=torch.long), Full())


def test_a_context_beyond_the_model_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="limit of 2048"):
        generate(llama, prompt_of(2040), Full(), max_new_tokens=9)
    with pytest.raises(ConfigError, match="limit of 2048"):
        prefill(llama, prompt_of(2049), [Full()])


def test_keys_that_are_not_finite_are_refused_for_every_method(ending: PreTrainedModel) -> None:
    with torch.no_grad():
        ending.model.layers[0].self_attn.k_proj.weight[3] = float("nan")
    for method in (Full(), H2O(WHOLE), StreamingLLM(WHOLE), PQCache(WHOLE, b=8)):
        with pytest.raises(ConfigError, match="NaN"):
            generate(ending, prompt_of(20), method, max_new_tokens=3)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Switch the garbage collector off: memory must not depend on it, since tensors do not make the collector run."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("tier", [DeviceTier(), HostTier(link="local", cache_tokens=32, cache_block=8, debug=True)])
def test_closing_a_prompt_frees_what_was_decoded_and_the_prompts_before_it(tier: Tier) -> None:
    model, ids = tiny_model("llama"), prompt_of(40)
    chosen = [Full(), PQCache(Budget(sink=3, window=6, tokens=20, ratio=None), b=2, codes_on="host")]
    freed = []
    for _ in range(2):
        prefilled = prefill(model, ids, chosen, setting=Setting(tier))
        for method in range(2):
            generation = decode(prefilled, method, NEW)
            generation.settle()
            freed.append(weakref.ref(generation.cache))
            del generation
        prefilled.close()
        assert all(cache() is None for cache in freed[-2:])
        freed.append(weakref.ref(prefilled))
    assert freed[2]() is None
