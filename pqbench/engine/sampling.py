"""Tokens that are drawn at random or chosen by processed scores. Transformers' own processors process the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from pqbench.engine.arguments import check_count
from pqbench.errors import ConfigError
from pqbench.typed import allowed, shown


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token as transformers' ``generate`` does.

    Attributes:
        prompt: ``[B, S]``, token ids that processors see before the new tokens.
        processors: the changes made to the scores, such as temperature, top-k and top-p.
        draw: draw from the distribution of the scores with torch's generator; if False, take the highest score.
    """

    prompt: Tensor
    processors: LogitsProcessorList
    draw: bool

    def __call__(self, tokens: Sequence[Tensor], logits: Tensor) -> Tensor:
        """The next token ``[B]``, given all new tokens so far, each ``[B]``, and the logits ``[B, V]`` after them."""
        seen = torch.cat([self.prompt, *(token[:, None] for token in tokens)], 1)
        scores = self.processors(seen, logits.to(torch.float32, copy=True))
        if self.draw:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from a model's distribution. An option that is None is taken from the model's generation
    configuration or, if it is not set there, from the defaults of transformers.

    Attributes:
        temperature: above 0; the logits are divided by it.
        top_k: only this many of the likeliest tokens can be drawn.
        top_p: only the likeliest tokens whose probabilities together reach this value can be drawn, in (0, 1].
        seed: seed of torch's generators, whose former state is restored afterwards; None draws from their present
            state.

    Raises:
        ConfigError: a value outside of its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            most = 1.0 if name == "top_p" else float("inf")
            if value is not None and not (allowed(value, float) and 0 < value <= most):
                limits = "in (0, 1]" if name == "top_p" else "above 0"
                raise ConfigError(f"{name} is {shown(value)}: use a number {limits}")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.seed is not None:
            check_count("seed", self.seed, 0)

    def sampler(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, new: int) -> Sampler:
        """The sampler that transformers builds from these options, for prompts ``[B, S]`` and at most ``new``
        tokens."""
        found: list[Sampler] = []

        def keep(_: PreTrainedModel, prompt: Tensor, logits_processor: LogitsProcessorList, **__: Any) -> Tensor:
            found.append(Sampler(prompt, logits_processor, True))
            return prompt

        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        model.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            max_new_tokens=new,
            custom_generate=keep,
            **{name: value for name, value in options.items() if value is not None},
        )
        return found[0]

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Inside this context, torch's generators start from :attr:`seed`. Without a seed nothing changes."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield
