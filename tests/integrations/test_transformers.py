"""Inside ``model.generate``, options of transformers work as usual, or are refused by name in one line."""

from __future__ import annotations

from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from methods.full import Full
from methods.pqcache import PQCache
from methods.quest import Quest
from pqbench import Method, decoding_with
from pqbench.errors import ConfigError
from pqbench.method import Budget
from pqbench.models.sources import byte_tokenizer
from tests.support import left_padded, prompt_of, tiny_model

NEW = 12
WHOLE = Budget(sink=8, ratio=1.0)
METHODS: list[Method] = [Full(), PQCache(WHOLE, b=3), Quest(WHOLE)]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}


class Heard(BaseStreamer):
    """A streamer that keeps all tokens."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.parts.append("end")


class Prefer(LogitsProcessor):
    """Raises the score of one token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, torch.tensor([9]), torch.full((len(scores), 1), 3.0))


def both(model: PreTrainedModel, method: Method, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    """The result of transformers, and its result with our loop; sampled tokens use the same seed."""
    answers = []
    for route in ({}, {"custom_generate": decoding_with(method)}):
        torch.manual_seed(4)
        answers.append(model.generate(*inputs, **options, **route))
    return answers[0], answers[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 1.8, "top_k": 100, "top_p": 0.7},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 4},
        {"bad_words_ids": [[5], [9]]},
        {"suppress_tokens": [17, 20]},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "dynamic"},
        {"use_cache": True},
        {"max_new_tokens": 1},
        {"max_length": 36, "max_new_tokens": None},
        {"prefix_allowed_tokens_fn": lambda _, ids: [3, 4, 5 + len(ids) % 7]},
        {"logits_processor": LogitsProcessorList([Prefer()])},
        {"attention_mask": torch.ones(1, 30, dtype=torch.long)},
        {"position_ids": torch.arange(30)[None]},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_an_option_works_as_in_transformers(llama: PreTrainedModel, method: Method, options: dict[str, Any]) -> None:
    theirs, ours = both(llama, method, prompt_of(30), **{**GREEDY, **options})
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_beams", {"num_beams": 2}),
        ("num_beams", {"num_beams": 3, "do_sample": True, "num_return_sequences": 2}),
        ("assistant_model", {"assistant_model": "itself"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("dola_layers", {"dola_layers": "low"}),
        ("assistant_early_exit", {"assistant_early_exit": 1}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("cache_implementation", {"cache_implementation": "static"}),
        ("cache_implementation", {"cache_implementation": "offloaded"}),
        ("position_ids", {"position_ids": torch.arange(5, 35)[None]}),
        ("output_scores", {"output_scores": True, "return_dict_in_generate": True}),
        ("output_logits", {"output_logits": True, "return_dict_in_generate": True}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ],
)
def test_an_option_that_our_loop_does_not_follow_is_named(
    llama: PreTrainedModel, name: str, options: dict[str, Any]
) -> None:
    options = {key: llama if value == "itself" else value for key, value in options.items()}
    with pytest.raises(ConfigError, match=name) as caught:
        llama.generate(prompt_of(30), **{**GREEDY, **options}, custom_generate=decoding_with(Full()))
    assert "\n" not in str(caught.value)


def test_embeddings_are_refused_by_name(llama: PreTrainedModel) -> None:
    embedded = llama.get_input_embeddings()(prompt_of(30))
    with pytest.raises(ConfigError, match="inputs_embeds"):
        llama.generate(inputs_embeds=embedded, **GREEDY, custom_generate=decoding_with(Full()))


@pytest.mark.parametrize("given", [prompt_of(30)[0], prompt_of(30).tolist(), prompt_of(30)[0].tolist()])
@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_prompts_without_a_batch_or_a_tensor_are_refused(llama: PreTrainedModel, given: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="input_ids must be a tensor"):
        llama.generate(**{name: given}, **GREEDY, custom_generate=decoding_with(Full()))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_a_streamer_hears_what_it_hears_from_transformers(llama: PreTrainedModel, sampled: bool, ended: bool) -> None:
    model = deepcopy(llama)
    options = {**GREEDY, "do_sample": sampled}
    if ended:
        torch.manual_seed(4)
        model.generation_config.eos_token_id = int(model.generate(prompt_of(30), **options)[0, 35])
    heard = []
    for route in ({}, {"custom_generate": decoding_with(PQCache(WHOLE, b=3))}):
        torch.manual_seed(4)
        streamer = Heard()
        model.generate(prompt_of(30), **options, streamer=streamer, **route)
        heard.append(streamer.parts)
    assert heard[0] == heard[1]
    assert heard[1][-1] == "end"
    assert len(heard[1]) == 2 + (6 if ended else NEW)


def test_text_comes_while_tokens_are_still_decoded(llama: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)  # type: ignore[arg-type]
    answers: list[Tensor] = []

    def work() -> None:
        answers.append(
            llama.generate(prompt_of(30), **GREEDY, streamer=streamer, custom_generate=decoding_with(Full()))
        )

    thread = Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(answers[0][0, 30:])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_stop_strings_find_their_tokenizer(llama: PreTrainedModel, method: Method) -> None:
    tokenizer = byte_tokenizer()
    free = llama.generate(prompt_of(30), **GREEDY)[0, 30:]
    stop = next(text for text in map(tokenizer.decode, free[2:]) if text.isascii())
    options = {**GREEDY, "stop_strings": [stop], "tokenizer": tokenizer}
    theirs, ours = both(llama, method, prompt_of(30), **options)
    assert torch.equal(ours, theirs)
    assert theirs.shape[1] < 30 + NEW
    with pytest.raises(ValueError, match="tokenizer"):
        llama.generate(prompt_of(30), **GREEDY, stop_strings=[stop], custom_generate=decoding_with(method))


@pytest.mark.parametrize("eos", [None, 5])
def test_stop_strings_of_a_padded_batch(llama: PreTrainedModel, eos: int | None) -> None:
    model, tokenizer = deepcopy(llama), byte_tokenizer()
    ids, mask = left_padded(prompt_of(20, 4), prompt_of(31, 5))
    free = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    model.generation_config.eos_token_id = next(t for t in range(1, 128) if t not in free) if eos else None
    stop = next(text for text in map(tokenizer.decode, free[0, 1:]) if text.isascii())
    options = {**GREEDY, "stop_strings": [stop], "tokenizer": tokenizer}
    theirs, ours = both(model, Full(), ids, attention_mask=mask, **options)
    assert torch.equal(ours, theirs)


def test_a_time_limit_ends_generation(llama: PreTrainedModel) -> None:
    for options in ({"max_time": 1e-9}, {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e-9)])}):
        found = llama.generate(prompt_of(30), **GREEDY, **options, custom_generate=decoding_with(Full()))
        assert found.shape[1] == 31


def test_an_object_where_one_is_asked_for(llama: PreTrainedModel) -> None:
    theirs, ours = both(llama, Quest(WHOLE), prompt_of(30), **GREEDY, return_dict_in_generate=True)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values is None  # the method's own store is none that another model call could read


def test_a_generation_config_is_followed(llama: PreTrainedModel) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=NEW, top_k=30)
    theirs, ours = both(llama, Full(), prompt_of(30), generation_config=config)
    assert torch.equal(ours, theirs)


def test_one_decoding_serves_many_calls_and_threads(llama: PreTrainedModel) -> None:
    """A call leaves no state behind: streamers of other calls receive nothing."""
    decoding, first, second = decoding_with(Full()), Heard(), Heard()
    for streamer in (first, second):
        llama.generate(prompt_of(30), **GREEDY, streamer=streamer, custom_generate=decoding)
    llama.generate(prompt_of(30), **GREEDY, custom_generate=decoding)
    assert first.parts == second.parts
    assert len(first.parts) == 2 + NEW


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (PQCache, r"the method is the class PQCache: pass an object of it, PQCache\(\)"),
        ("pqcache", "the method is the text 'pqcache': pass an object"),
        (None, "the method is None: pass an object"),
        ([Full()], "pass an object of a method's class"),
        (Budget(), "pass an object of a method's class"),
        (tiny_model, "pass an object of a method's class"),
    ],
)
def test_what_is_no_method_is_refused_at_once(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        decoding_with(given)
    assert "\n" not in str(caught.value)
