"""The way in from transformers: ``model.generate(**inputs, custom_generate=decoding_with(method))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pqbench.errors import ConfigError
from pqbench.generation import decode
from pqbench.method import Method
from pqbench.prompt import prefill


def decoding_with(method: Method) -> Callable[..., Tensor]:
    """A decoding function for ``generate(custom_generate=...)`` that runs ``method``.

    Stopping criteria and the generation config's lengths and end tokens are honoured. The result is ``[B, S + new]``.

    Raises:
        ConfigError: when asked to sample, to search with beams or to process logits: decoding is greedy.
    """

    def decoding(
        model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, logits_processor: Any = None,
        stopping_criteria: Any = None, **model_kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if generation_config.do_sample or (generation_config.num_beams or 1) > 1 or logits_processor:
            raise ConfigError("pqbench decodes greedily: set do_sample=False, num_beams=1 and no logits processors")
        new = generation_config.max_length - input_ids.shape[1]
        finished = stopping(stopping_criteria, input_ids) if stopping_criteria else None
        prefilled = prefill(model, input_ids, [method], model_kwargs.get("attention_mask"), reserve=new)
        generation = decode(prefilled, 0, new, finished=finished, config=generation_config)
        return torch.cat([input_ids, generation.tokens], 1)

    return decoding


def stopping(criteria: Callable[..., Any], prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """Stopping criteria of transformers as :func:`pqbench.generation.decode` takes them: bool ``[B]`` for the tokens so
    far; ``prompt`` ``[B, S]`` is what the criteria see before those."""

    def finished(tokens: Tensor) -> Tensor:
        stopped = torch.as_tensor(criteria(torch.cat([prompt, tokens], 1), None), device=tokens.device)
        return stopped.expand(len(tokens))

    return finished
