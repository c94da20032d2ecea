"""Greedy decoding of a prefilled prompt by one method: the loop every benchmark and timing goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_high

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pqbench.engine.arguments import check_call, check_count, outlives_exit
from pqbench.engine.attention import attached
from pqbench.engine.batch import check_indices, check_length, check_logits
from pqbench.engine.clock import Spans
from pqbench.engine.cohort import Group, Meter
from pqbench.engine.graphs.steps import GraphedSteps
from pqbench.engine.layers import LayeredCache
from pqbench.engine.prefill import Prefilled, Setting, forward, prefill
from pqbench.engine.sampling import Sampler, Sampling
from pqbench.errors import ConfigError
from pqbench.method import Method

__all__ = ["Generation", "decode", "end_tokens", "generate", "pad_token", "prefill"]


@dataclass(frozen=True)
class Generation:
    """What one method produced from one prompt, and what it cost. Tokens after the end are the padding token.

    Attributes:
        tokens: ``[B, new]``.
        ttft_s: seconds to the first token.
        steps_s: seconds of every decode step; the first includes waiting for an index built in the background.
        observe_s, build_s: seconds of the method's own work during and after prefill.
        pending_s: seconds between first token and first step: the index, unless it was built in the background.
        phased: which of the steps had their phases timed although that costs time itself, see
            :class:`pqbench.engine.clock.EventClock`; none where it costs nothing.
        replays: with ``graphs``, the steps that replayed a captured one; None without.
    """

    tokens: Tensor
    ttft_s: float
    steps_s: list[float]
    observe_s: float
    build_s: float
    pending_s: float
    cache: LayeredCache
    phased: frozenset[int] = field(default_factory=frozenset)
    replays: frozenset[int] | None = None

    @property
    def usual_steps_s(self) -> list[float]:
        """Seconds of the steps that are like any other: not the first, not those that were slowed by timing their
        phases, and with ``graphs`` none but the replays, as long as there are any."""
        if self.replays:
            return [self.steps_s[i] for i in sorted(self.replays)]
        later = list(enumerate(self.steps_s))[1:] or list(enumerate(self.steps_s))
        return [seconds for i, seconds in later if i not in self.phased] or [seconds for _, seconds in later]

    @property
    def index_s(self) -> float:
        """Seconds the method's own index took: watching the prefill, and building it, in the background or not."""
        return self.observe_s + self.build_s

    @property
    def tt2t_s(self) -> float:
        """Time to second token: the index must be ready and one step done."""
        return self.ttft_s + self.pending_s + (self.steps_s[0] if self.steps_s else 0.0)

    @property
    def tpot_s(self) -> float:
        """Median seconds of the usual decode steps."""
        return median_high(self.usual_steps_s) if self.steps_s else float("nan")

    @property
    def corrected_heads(self) -> float | None:
        """Share of KV heads that selected anew with their own query; None without selection ahead."""
        facts = [group.state.facts for group in self.groups()]
        shares = [known["corrected_heads"] for known in facts if "corrected_heads" in known]
        return fmean(shares) if shares else None

    def settle(self) -> None:
        """Wait for every transfer that decoding left under way."""
        for group in self.groups():
            group.store.settle()

    def groups(self) -> list[Group]:
        """The groups of every layer, with their stores, states and meters."""
        return groups_of(self.cache)

    def meters(self) -> list[Meter]:
        """The meters of every layer and group."""
        return [group.meter for group in self.groups()]


@outlives_exit
@torch.inference_mode()
def decode(
    prefilled: Prefilled,
    method: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    finished: Callable[[Tensor], Tensor] | None = None,
    question: Sequence[int] = (),
    extra_ends: Sequence[int] = (),
    config: GenerationConfig | None = None,
    spend: bool = False,
    sampler: Sampler | None = None,
) -> Generation:
    """Decode a prefilled prompt by one of its methods, greedily unless there is a ``sampler``.

    Args:
        finished: sees the tokens so far ``[B, n]`` after every step and says which sequences end there, bool ``[B]``.
        question: prompt tokens that were not prefilled; they go through the method one by one before the first answer
            token, and their time, with that of the index, counts as time to first token.
        extra_ends: token ids that end a sequence besides the configured ones.
        config: end and padding tokens; None takes the model's own.
        spend: use up the method's state instead of a copy, see :meth:`Prefilled.fork`.
        sampler: chooses the tokens; with None the likeliest token is chosen.

    Raises:
        ConfigError: no such method, fewer than one token wanted, a model that computes NaN, or a context that would
            cross a length at which the model's rotary frequencies change.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_place(prefilled, method)
    model = prefilled.model
    prefilled.check_reach(len(question) + max_new_tokens - 1)
    config = model.generation_config if config is None else config
    more = torch.tensor(extra_ends, dtype=torch.long, device=model.device)
    end = End(torch.cat([end_tokens(config, model.device), more]), min_new_tokens, pad_token(config), finished)
    if prefilled.beside is None:
        prefilled.finish(method)
    spending = Spans(prefilled.clock)
    with spending:
        cache = prefilled.fork(method, spend=spend)
    steps = Steps(prefilled, cache, len(question), len(question) + max_new_tokens - 1)
    tokens: list[Tensor] = []
    logits, done = prefilled.logits, torch.zeros_like(prefilled.lengths, dtype=torch.bool)
    with attached(model):
        for known in question:
            logits = steps.ask(torch.full_like(done, known, dtype=torch.long))
        while True:
            token = sampler(tokens, logits) if sampler else choose(logits, end.forbidden(len(tokens)))
            tokens.append(token.masked_fill(done, end.filler) if end.possible(len(tokens)) else token)
            last = len(tokens) == max_new_tokens
            if not last and end.possible(len(tokens)):
                done = end.reached(done, tokens)
                last = bool(done.all())  # the one read of the device in a step, and none where no end can come
            if last:
                break
            logits = steps.step(tokens[-1])
    observe, build = prefilled.observe_seconds[method], prefilled.build(method)
    check_indices([check for group in groups_of(cache) for check in group.state.checks])
    check_logits(logits)  # once: NaN in a token's keys stays, since the window holds it
    pending = 0.0 if prefilled.beside is not None else build
    if spend:  # compaction by an evicting method; without spending it would be the time of copies
        pending += spending.total
    ttft, seconds = prefilled.seconds + observe, steps.spans.each
    if len(question):
        ttft, pending = ttft + pending + steps.asked.total, 0.0
    return Generation(
        torch.stack(tokens, 1), ttft, seconds, observe, build, pending, cache, steps.phased, steps.replays
    )


@dataclass(frozen=True)
class End:
    """When sequences end, and what fills them afterwards.

    Attributes:
        tokens: ids ``[n]`` that end a sequence, possibly none.
        earliest: tokens before an end may come.
        filler: the token of a sequence after its end.
        finished: sees the tokens so far ``[B, n]`` and says which sequences end there, bool ``[B]``; None for none.
    """

    tokens: Tensor
    earliest: int
    filler: int
    finished: Callable[[Tensor], Tensor] | None

    def forbidden(self, count: int) -> Tensor | None:
        """Tokens that may not follow ``count`` tokens."""
        return self.tokens if count < self.earliest else None

    def possible(self, count: int) -> bool:
        """Whether some sequence may have ended within ``count`` tokens; otherwise the device need not be asked."""
        return self.finished is not None or (len(self.tokens) > 0 and count > self.earliest)

    def reached(self, done: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Which sequences have ended, bool ``[B]``: those ``done`` before, and those that end with the last token."""
        done = done | torch.isin(tokens[-1], self.tokens)
        return done if self.finished is None else done | self.finished(torch.stack(list(tokens), 1))


class Steps:
    """The decode steps of one method after a prompt, with their times.

    Attributes:
        asked: seconds of the tokens that were given.
        spans: seconds of every other step.
    """

    def __init__(self, prefilled: Prefilled, cache: LayeredCache, given: int, most: int) -> None:
        """At most so many steps, whose first ``given`` tokens are the question's."""
        self.asked = prefilled.clock.spans("question")
        self.spans = prefilled.clock.spans("step", listed=True)
        self._prefilled, self._cache = prefilled, cache
        # Methods know by their groups what is padding. Transformers' own layers do not, and it would look at the mask
        # in every step.
        self._mask = prefilled.mask if prefilled.sliding else None
        self._position, self._given, self._count = prefilled.lengths[:, None], given, 0
        self._graphed = GraphedSteps(cache, self._logits, most) if prefilled.graphs else None

    def ask(self, token: Tensor) -> Tensor:
        """Logits ``[B, V]`` after a given token ``[B]``."""
        with self.asked:
            return self._forward(token)

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[B, V]`` after a token ``[B]`` that was chosen."""
        with self.spans:
            return self._forward(token)

    @property
    def phased(self) -> frozenset[int]:
        """Which of :attr:`spans` had their phases timed at the cost of time: see :class:`Generation`."""
        clock = self._prefilled.clock
        if self._graphed is not None:
            return frozenset()
        steps = range(self._count - self._given) if clock.every > 1 else ()
        return frozenset(step for step in steps if clock.samples(self._given + step))

    @property
    def replays(self) -> frozenset[int] | None:
        """Which of :attr:`spans` replayed a captured step: see :class:`Generation`."""
        if self._graphed is None:
            return None
        return frozenset(step - self._given for step in self._graphed.replays if step >= self._given)

    def _forward(self, token: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        if self._graphed is None:
            logits = self._logits(self._cache, token, self._position)
        else:
            logits = self._graphed.logits(token, self._position)
        self._position, self._count = self._position + 1, self._count + 1
        return logits

    def _logits(self, cache: LayeredCache, token: Tensor, position: Tensor) -> Tensor:
        return forward(self._prefilled.model, token[:, None], cache, self._mask, position)


def groups_of(cache: LayeredCache) -> list[Group]:
    """The groups of every layer of a decode."""
    return [group for layer in cache.selective.values() for group in layer.groups]


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    chunk: int | None = None,
    setting: Setting | None = None,
    *,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue prompts ``[B, S]`` under a method. Returns the new tokens ``[B, new]``; they end at the model's
    end-of-sequence token.

    Args:
        setting: where KV lives, which kernels compute and what overlaps.
        do_sample: draw the tokens as transformers' ``generate`` does; with the same seed and a budget that holds the
            whole context they are the same. Otherwise the likeliest token is chosen.
        temperature, top_k, top_p, seed: see :class:`pqbench.engine.sampling.Sampling`.

    Raises:
        ConfigError: see :func:`prefill`; also when the context would outgrow the model, or for a value out of range.
    """
    check_call(model, input_ids, [method], attention_mask)
    check_count("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if not do_sample and sampling != Sampling():
        raise ConfigError(
            "temperature, top_k, top_p and seed concern tokens that are drawn: set do_sample=True as well"
        )
    setting = Setting.of(setting)
    if not method.own_prefill:
        check_length(model, input_ids.shape[-1] + max_new_tokens, setting.max_length)
    prefilled = prefill(model, input_ids, [method], attention_mask, chunk, max_new_tokens, setting)
    sampler = sampling.sampler(model, input_ids, attention_mask, max_new_tokens) if do_sample else None
    with sampling.seeded(model.device):
        generation = decode(prefilled, 0, max_new_tokens, spend=True, sampler=sampler)
    generation.settle()
    prefilled.close()
    return generation.tokens


def check_place(prefilled: Prefilled, method: int) -> None:
    """Raises ConfigError when there is no method of this number in a prefilled prompt."""
    check_count("method", method, 0)
    if method >= len(prefilled.methods):
        raise ConfigError(f"method is {method}: the prompt was prefilled for methods 0 to {len(prefilled.methods) - 1}")


def changes_of_greedy(model: PreTrainedModel) -> list[str]:
    """The settings of a model's generation configuration that change what greedy decoding chooses in transformers; this
    loop knows none of them but end tokens."""
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
    """Greedy token ``[B]``; ``forbidden`` tokens are out of the question."""
    if forbidden is not None and len(forbidden):
        logits = logits.index_fill(1, forbidden, float("-inf"))
    return logits.argmax(-1)


def pad_token(config: GenerationConfig | None) -> int:
    """What fills a sequence after its end, as in transformers: the padding token, else the first end token."""
    pad = None if config is None else config.pad_token_id
    ends = end_tokens(config)
    return int(pad) if pad is not None else int(ends[0]) if len(ends) else 0


def end_tokens(config: GenerationConfig | None, device: torch.device | None = None) -> Tensor:
    """End-of-sequence ids of a configuration, ``[n]``, possibly none."""
    ends = config.eos_token_id if config is not None else None
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(listed, dtype=torch.long, device=device)
