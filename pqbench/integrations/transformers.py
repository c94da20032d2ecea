"""Decoding by a method from within transformers:
``model.generate(**inputs, custom_generate=decoding_with(method))``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from pqbench.engine.arguments import check_ids, check_method
from pqbench.engine.batch import positions_of
from pqbench.engine.decode import decode
from pqbench.engine.prefill import prefill
from pqbench.engine.sampling import Sampler
from pqbench.errors import ConfigError
from pqbench.method import Method

Answer: TypeAlias = Tensor | GenerateDecoderOnlyOutput

# Arguments that generate() adds by itself. Our loop does not need them.
_OURS = frozenset({"attention_mask", "use_cache", "logits_to_keep", "cache_position"})
# Options of a generation that our loop does not support, with the values that request nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "cache_implementation": (None, "dynamic"),
}
_UNAVAILABLE = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Arguments that generate() drops when it is given a function, and the names under which our loop gets them.
_DROPPED = {
    "streamer": "handed_streamer",
    "tokenizer": "tokenizer",
    "assistant_model": "assistant_model",
    "assistant_tokenizer": "assistant_tokenizer",
}
_COLLECTS = "_extract_generation_mode_kwargs"  # the function of transformers that drops them


def decoding_with(method: Method) -> Callable[..., Answer]:
    """A decoding function for ``generate(custom_generate=...)`` that runs ``method``.

    Sampling, logits processors, stopping criteria, stop strings, a streamer, several return sequences, and the
    generation config's lengths and end tokens work as in transformers. The result is ``[B, S + new]`` or, if
    ``return_dict_in_generate`` is set, an object with this tensor as ``sequences``.

    Raises:
        ConfigError: ``method`` is not an object of a method's class. The returned function raises it, with the name of
            the option, for beam search, an assistant model, returned scores or states, a cache of the caller, and
            inputs other than token ids and their mask, such as images or embeddings.
    """
    check_method(method)
    return Decoding(method)


class Decoding:
    """Decodes by one method inside ``generate``; see :func:`decoding_with`."""

    def __init__(self, method: Method) -> None:
        self.method = method

    @property
    def __signature__(self) -> inspect.Signature:
        """The parameters of a call. ``generate`` reads them to learn which of its arguments to pass on. At that moment
        the arguments that it would drop are added to them, see :func:`hand_over`."""
        hand_over(inspect.currentframe())
        return inspect.signature(self.__call__)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        handed_streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        assistant_model: PreTrainedModel | None = None,
        assistant_tokenizer: Any = None,
        **inputs: Any,
    ) -> Answer:
        """The prompts ``[B, S]`` followed by the new tokens, ``[B, S + new]``. Called by ``generate``."""
        check_options(generation_config, assistant_model)
        mask = inputs.get("attention_mask")
        check_inputs(input_ids, mask, inputs)
        new, draw = generation_config.max_length - input_ids.shape[1], bool(generation_config.do_sample)
        sampler = Sampler(input_ids, logits_processor or LogitsProcessorList(), draw)
        steps = Steps(input_ids, stopping_criteria or StoppingCriteriaList(), streamer or handed_streamer)
        chunk = generation_config.prefill_chunk_size
        with prefill(model, input_ids, [self.method], mask, chunk, reserve=new) as prefilled:
            generation = decode(
                prefilled,
                0,
                new,
                finished=steps.finished if steps.wanted else None,
                config=generation_config,
                spend=True,
                sampler=sampler if draw or sampler.processors else None,
            )
            generation.settle()
        steps.end(generation.tokens)
        sequences = torch.cat([input_ids, generation.tokens], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences


def hand_over(frame: FrameType | None) -> None:
    """Give a decoding function those arguments that ``generate`` passes only to its own decoding functions.

    ``generate`` first takes streamer, tokenizer and assistant model out of its arguments. For a function of the caller,
    it then passes on only those of the remaining arguments that the function names. The missing ones are therefore put
    back among the remaining arguments.

    Args:
        frame: the frame in which the function's parameters are read. Nothing happens if it is not inside ``generate``.

    Raises:
        ConfigError: the prompts are not a tensor ``[B, S]``. Transformers would fail on them before it calls our loop.
    """
    while frame is not None and frame.f_code.co_name != _COLLECTS:
        frame = frame.f_back
    if frame is None:
        return
    collected, remaining = frame.f_locals.get("generation_mode_kwargs"), frame.f_locals.get("kwargs")
    if collected is not None and remaining is not None:
        remaining.update({ours: collected[name] for name, ours in _DROPPED.items() if name in collected})
        prompts = frame.f_back.f_locals.get("inputs") if frame.f_back else None
        prompts = remaining.get("input_ids") if prompts is None else prompts
        if prompts is not None:  # otherwise the prompts are embeddings, which check_inputs refuses
            check_ids(prompts)


class Steps:
    """The work after each step of a decode: stopping criteria are checked, and a streamer gets the token."""

    def __init__(self, prompt: Tensor, criteria: StoppingCriteriaList, streamer: BaseStreamer | None) -> None:
        """``prompt`` ``[B, S]`` holds the tokens that criteria see before the new tokens."""
        self._prompt, self._criteria, self._streamer = prompt, criteria, streamer
        self._stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._streamed = 0

    @property
    def wanted(self) -> bool:
        """Whether there are stopping criteria or a streamer."""
        return len(self._criteria) > 0 or self._streamer is not None

    def finished(self, tokens: Tensor) -> Tensor:
        """Which sequences have ended, bool ``[B]``, given the tokens so far ``[B, n]``. As in transformers, if there is
        no end token, every sequence continues until all have ended, because nothing would pad them."""
        self._stream(tokens)
        if self._criteria:
            self._stopped = self._stopped | stopping(self._criteria, self._prompt)(tokens)
        return self._stopped if self._pads else self._stopped.all().expand(len(tokens))

    def end(self, tokens: Tensor) -> None:
        """End the decode, whose new tokens are ``[B, new]``."""
        self._stream(tokens)
        if self._streamer is not None:
            self._streamer.end()

    def _stream(self, tokens: Tensor) -> None:
        if self._streamer is not None:
            for token in tokens[:, self._streamed :].cpu().unbind(1):
                self._streamer.put(token)
            self._streamed = tokens.shape[1]


def check_options(config: GenerationConfig, assistant_model: PreTrainedModel | None = None) -> None:
    """Raises ConfigError for an option of ``generate`` that our loop does not support. The message names the option."""
    if assistant_model is not None:
        raise ConfigError("assistant_model is given, but pqbench decodes by itself: leave it out")
    for name, neutral in _REFUSED.items():
        value = getattr(config, name, None)
        if not any(value is one or (type(value) is type(one) and value == one) for one in neutral):
            raise ConfigError(f"{name} is {value!r}, which pqbench does not support: leave it out")
    for name in _UNAVAILABLE:
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ConfigError(f"pqbench returns only tokens: set {name}=False")


def check_inputs(input_ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]) -> None:
    """Raises ConfigError for inputs that change what the model computes and that our loop would not pass on. Inputs
    that change nothing are allowed: the empty cache that ``generate`` makes, token types that are all zero, and the
    usual positions."""
    for name, value in inputs.items():
        if value is None or value is False or name in _OURS:
            continue
        if isinstance(value, Mapping) and not value:
            continue
        if isinstance(value, Cache):
            if value.get_seq_length() == 0 and not getattr(value, "_is_user_defined", False):
                continue
            raise ConfigError(
                f"{name} is given, but pqbench keeps keys and values in a store of its own, which would neither read "
                "nor fill it: leave it out"
            )
        if name == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any()):
            continue
        if name == "position_ids" and isinstance(value, Tensor) and torch.equal(value, usual(input_ids, mask)):
            continue
        raise ConfigError(f"{name} is given, but pqbench reads only token ids and attention_mask: leave it out")


def usual(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """The usual positions ``[B, S]`` of a left-padded batch, which our loop uses too."""
    return positions_of(torch.ones_like(input_ids) if mask is None else mask)


def stopping(criteria: Callable[..., Any], prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """Stopping criteria of transformers in the form that :func:`pqbench.engine.decode.decode` needs: a function of the
    tokens so far ``[B, n]`` that returns bool ``[B]``. ``prompt`` ``[B, S]`` holds the tokens that the criteria see
    before those."""

    def finished(tokens: Tensor) -> Tensor:
        stopped = torch.as_tensor(criteria(torch.cat([prompt, tokens], 1), None), device=tokens.device)
        return stopped.expand(len(tokens))

    return finished
