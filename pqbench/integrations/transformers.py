"""The way in from transformers: ``model.generate(**inputs, custom_generate=decoding_with(method))``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from pqbench.engine.decode import decode
from pqbench.engine.prefill import prefill
from pqbench.errors import ConfigError
from pqbench.method import Method

# What generate() adds by itself and our loop decides by itself.
_OURS = frozenset({"attention_mask", "use_cache", "logits_to_keep", "cache_position"})
_UNAVAILABLE = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def decoding_with(method: Method) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A decoding function for ``generate(custom_generate=...)`` that runs ``method``.

    Stopping criteria and the generation config's lengths and end tokens are honoured. The result is ``[B, S + new]``,
    or an object with that as ``sequences`` where ``return_dict_in_generate`` is set.

    Raises:
        ConfigError: when asked to sample, to search with beams, to process logits, to return scores or states, or to
            read anything but token ids and their mask, such as images.
    """

    def decoding(
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        check_options(generation_config, logits_processor)
        mask = model_kwargs.get("attention_mask")
        check_inputs(input_ids, mask, model_kwargs)
        new = generation_config.max_length - input_ids.shape[1]
        finished = stopping(stopping_criteria, input_ids) if stopping_criteria else None
        prefilled = prefill(model, input_ids, [method], mask, reserve=new)
        generation = decode(prefilled, 0, new, finished=finished, config=generation_config)
        sequences = torch.cat([input_ids, generation.tokens], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    return decoding


def check_options(config: GenerationConfig, logits_processor: Any) -> None:
    """Raises ConfigError when generation is asked for something besides greedy tokens."""
    if config.do_sample or (config.num_beams or 1) > 1 or logits_processor:
        raise ConfigError("pqbench decodes greedily: set do_sample=False, num_beams=1 and no logits processors")
    for name in _UNAVAILABLE:
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ConfigError(f"pqbench returns tokens alone: set {name}=False")


def check_inputs(input_ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]) -> None:
    """Raises ConfigError for inputs that change what the model computes and that our loop would not pass on. Those that
    say nothing new are let through: an empty cache, token types that are all zero, the usual positions."""
    for name, value in inputs.items():
        if value is None or value is False or name in _OURS:
            continue
        if isinstance(value, Mapping) and not value:
            continue
        if isinstance(value, Cache) and value.get_seq_length() == 0:
            continue
        if name == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any()):
            continue
        if name == "position_ids" and isinstance(value, Tensor) and torch.equal(value, usual(input_ids, mask)):
            continue
        raise ConfigError(f"{name} is given, but pqbench reads token ids and attention_mask alone: leave it out")


def usual(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions ``[B, S]`` of a left-padded batch as our loop counts them."""
    present = torch.ones_like(input_ids) if mask is None else mask.long()
    return (present.cumsum(-1) - 1).clamp(min=0)


def stopping(criteria: Callable[..., Any], prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """Stopping criteria of transformers as :func:`pqbench.engine.decode.decode` takes them: bool ``[B]`` for the
    tokens so far; ``prompt`` ``[B, S]`` is what the criteria see before those."""

    def finished(tokens: Tensor) -> Tensor:
        stopped = torch.as_tensor(criteria(torch.cat([prompt, tokens], 1), None), device=tokens.device)
        return stopped.expand(len(tokens))

    return finished
