"""Which token comes next, when a sequence ends, and which token fills a sequence after its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pqbench.engine.sampling import Sampler


class Chooser:
    """A source of tokens for :class:`pqbench.engine.steps.Steps`. It first gives the tokens of a question. After that,
    each call gives the likeliest token or the one that a sampler chooses, until every sequence has ended.

    Attributes:
        tokens: the tokens chosen so far, each ``[B]``.
    """

    def __init__(
        self, end: End, most: int, like: Tensor, question: Sequence[int] = (), sampler: Sampler | None = None
    ) -> None:
        """At most ``most`` tokens are chosen after the ``question``. ``like`` is any tensor ``[B]`` on the model's
        device."""
        self.tokens: list[Tensor] = []
        self._end, self._most, self._question, self._sampler = end, most, iter(question), sampler
        self._done = torch.zeros_like(like, dtype=torch.bool)

    def __call__(self, logits: Tensor) -> Tensor | None:
        known = next(self._question, None)
        if known is not None:
            return torch.full_like(self._done, known, dtype=torch.long)
        count, end = len(self.tokens), self._end
        sampler = self._sampler
        token = sampler(self.tokens, logits) if sampler else choose(logits, end.forbidden(count))
        self.tokens.append(token.masked_fill(self._done, end.filler) if end.possible(count) else token)
        last = count + 1 == self._most
        if not last and end.possible(count + 1):
            self._done = end.reached(self._done, self.tokens)
            last = bool(self._done.all())  # The only read from the device in a step.
        return None if last else self.tokens[-1]


@dataclass(frozen=True)
class End:
    """When sequences end, and what fills them afterwards.

    Attributes:
        tokens: ids ``[n]`` that end a sequence, possibly none.
        earliest: number of tokens that every sequence gets before one of ``tokens`` may end it.
        filler: the token that fills a sequence after its end.
        finished: a function that gets the tokens so far ``[B, n]`` and returns which sequences end there, bool ``[B]``;
            None if only ``tokens`` end a sequence.
    """

    tokens: Tensor
    earliest: int
    filler: int
    finished: Callable[[Tensor], Tensor] | None

    def forbidden(self, count: int) -> Tensor | None:
        """Ids that must not be chosen after ``count`` tokens; None if every token may be chosen."""
        return self.tokens if count < self.earliest else None

    def possible(self, count: int) -> bool:
        """Whether some sequence may have ended within ``count`` tokens. If not, nothing is read from the device."""
        return self.finished is not None or (len(self.tokens) > 0 and count > self.earliest)

    def reached(self, done: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Which sequences have ended, bool ``[B]``: those ``done`` before, and those that end with the last token."""
        done = done | torch.isin(tokens[-1], self.tokens)
        return done if self.finished is None else done | self.finished(torch.stack(list(tokens), 1))


def changes_of_greedy(model: PreTrainedModel) -> list[str]:
    """The settings of a model's generation configuration that change what greedy decoding chooses in transformers.
    Decoding here ignores all such settings except end tokens."""
    config = model.generation_config
    neutral = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "bad_words_ids": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "sequence_bias": None,
        "exponential_decay_length_penalty": None,
        "encoder_repetition_penalty": 1.0,
        "min_length": 0,
        "min_new_tokens": None,
    }
    found = {name: getattr(config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in found.items() if value is not None and value != neutral[name]]


def choose(logits: Tensor, forbidden: Tensor | None) -> Tensor:
    """The likeliest tokens ``[B]`` by logits ``[B, V]``. Ids in ``forbidden`` are never chosen."""
    if forbidden is not None and len(forbidden):
        logits = logits.index_fill(1, forbidden, float("-inf"))
    return logits.argmax(-1)


def pad_token(config: GenerationConfig | None) -> int:
    """The token that fills a sequence after its end, as in transformers: the padding token or, if there is none, the
    first end token."""
    pad = None if config is None else config.pad_token_id
    ends = end_tokens(config)
    return int(pad) if pad is not None else int(ends[0]) if len(ends) else 0


def end_tokens(config: GenerationConfig | None, device: torch.device | None = None) -> Tensor:
    """End-of-sequence ids of a configuration, ``[n]``, possibly none."""
    ends = config.eos_token_id if config is not None else None
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(listed, dtype=torch.long, device=device)
