"""Decoding of a prefilled prompt by one method. All benchmarks and all timings of generation use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_high

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pqbench.engine.arguments import check_call, check_count, outlives_exit
from pqbench.engine.batch import check_indices, check_length, check_logits
from pqbench.engine.chooser import Chooser, End, end_tokens, pad_token
from pqbench.engine.clock import Spans
from pqbench.engine.cohort import Cohort, check_cohorts
from pqbench.engine.layers import LayeredCache
from pqbench.engine.meter import Meter
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.sampling import Sampler, Sampling
from pqbench.engine.setting import Setting
from pqbench.engine.steps import Steps
from pqbench.errors import ConfigError
from pqbench.method import Method

__all__ = ["Generation", "decode", "generate", "prefill"]


@dataclass(frozen=True)
class Generation:
    """What one method generated from a batch of prompts, and what it cost. After its end, a sequence is filled with the
    padding token.

    Attributes:
        tokens: ``[B, new]``.
        ttft_s: seconds to the first token.
        steps_s: seconds of every decode step; the first includes waiting for an index built in the background.
        observe_s, build_s: seconds of the method's own work during and after prefill.
        pending_s: seconds between the first token and the first decode step. In this time the index is built, unless it
            was built in the background.
        phased: the steps that were slowed because their phases were timed, see
            :class:`pqbench.engine.clock.EventClock`; empty where timing phases costs nothing.
        replays: the steps that replayed a captured step; None without ``graphs``.
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
        """Seconds of the typical steps. With ``graphs`` these are the replays. Otherwise they are the steps after the
        first whose phases were not timed. If a rule would leave no step, it is not applied."""
        if self.replays:
            return [self.steps_s[i] for i in sorted(self.replays)]
        later = list(enumerate(self.steps_s))[1:] or list(enumerate(self.steps_s))
        return [seconds for i, seconds in later if i not in self.phased] or [seconds for _, seconds in later]

    @property
    def index_s(self) -> float:
        """Seconds that the method's own index took: observing the prefill and building the index, in the background or
        not."""
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
        """Share of KV heads that selected again with their own query, from 0 to 1; None without selection ahead."""
        facts = [cohort.state.facts for cohort in self.cohorts()]
        shares = [known["corrected_heads"] for known in facts if "corrected_heads" in known]
        return fmean(shares) if shares else None

    def settle(self) -> None:
        """Wait for every transfer that is still in progress after decoding."""
        for cohort in self.cohorts():
            cohort.store.settle()

    def cohorts(self) -> list[Cohort]:
        """The cohorts of every layer, with their stores, states and meters."""
        return self.cache.cohorts

    def meters(self) -> list[Meter]:
        """The meters of every layer and cohort."""
        return [cohort.meter for cohort in self.cohorts()]


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
        finished: a function that gets the tokens so far ``[B, n]`` after every step and returns which sequences end
            there, bool ``[B]``.
        question: prompt tokens that were not prefilled. The method reads them one by one before the first answer token.
            Their time and the time of building the index count as time to first token.
        extra_ends: token ids that end a sequence, in addition to the configured ones.
        config: configuration with end and padding tokens; None for the model's own.
        spend: decode with the method's own state and not with a copy, see :meth:`Prefilled.fork`.
        sampler: chooses the tokens; with None the likeliest token is chosen.

    Raises:
        ConfigError: the prompt was not prefilled for this method, ``max_new_tokens`` is below 1, the model computes
            NaN, or the context would cross a length at which the model's rotary frequencies change.
        SelectionError: the method selected invalid rows, or attended to more tokens than its budget allows.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_place(prefilled, method)
    most = len(question) + max_new_tokens - 1
    prefilled.check_reach(most)
    end = _end(prefilled.model, config, extra_ends, min_new_tokens, finished)
    if prefilled.beside is None:
        prefilled.finish(method)
    spending = Spans(prefilled.clock)
    with spending:
        cache = prefilled.fork(method, spend=spend)
    chooser = Chooser(end, max_new_tokens, prefilled.lengths, question, sampler)
    with Steps(prefilled, cache, chooser, most, len(question), graphs=prefilled.graphs) as steps:
        steps.run()
    observe, build = prefilled.observe_seconds[method], prefilled.build(method)
    check_indices([check for cohort in cache.cohorts for check in cohort.state.checks])
    check_logits(steps.logits)  # One check is enough: NaN in a token's keys stays in the window.
    check_cohorts(cache.cohorts)
    pending = 0.0 if prefilled.beside is not None else build
    if spend:  # Includes compacting an evicting method's rows. A fork that copies is not timed.
        pending += spending.total
    asked, seconds = steps.seconds(cache.cohorts)
    ttft = prefilled.seconds + observe
    if len(question):
        ttft, pending = ttft + pending + asked, 0.0
    tokens = torch.stack(chooser.tokens, 1)
    return Generation(tokens, ttft, seconds, observe, build, pending, cache, steps.phased, steps.replays)


def _end(
    model: PreTrainedModel,
    config: GenerationConfig | None,
    extra: Sequence[int],
    earliest: int,
    finished: Callable[[Tensor], Tensor] | None,
) -> End:
    """When the sequences of a decode end; see :func:`decode` for the arguments."""
    config = model.generation_config if config is None else config
    more = torch.tensor(extra, dtype=torch.long, device=model.device)
    return End(torch.cat([end_tokens(config, model.device), more]), earliest, pad_token(config), finished)


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
        do_sample: draw the tokens as transformers' ``generate`` does. With the same seed and a budget that holds the
            whole context, the tokens are the same as those of transformers. With False the likeliest token is chosen.
        temperature, top_k, top_p, seed: see :class:`pqbench.engine.sampling.Sampling`.

    Raises:
        ConfigError: see :func:`prefill`; also when the context would outgrow the model, or for a value out of range.
    """
    check_call(model, input_ids, [method], attention_mask)
    check_count("max_new_tokens", max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if not do_sample and sampling != Sampling():
        raise ConfigError(
            "temperature, top_k, top_p and seed have an effect only if tokens are drawn: set do_sample=True as well"
        )
    setting = Setting.of(setting)
    if not method.own_prefill:
        check_length(model, input_ids.shape[-1] + max_new_tokens, setting.max_length)
    with prefill(model, input_ids, [method], attention_mask, chunk, max_new_tokens, setting) as prefilled:
        sampler = sampling.sampler(model, input_ids, attention_mask, max_new_tokens) if do_sample else None
        with sampling.seeded(model.device):
            generation = decode(prefilled, 0, max_new_tokens, spend=True, sampler=sampler)
        generation.settle()
    return generation.tokens


def check_place(prefilled: Prefilled, method: int) -> None:
    """Raises ConfigError when a prefilled prompt has no method with this number."""
    check_count("method", method, 0)
    if method >= len(prefilled.methods):
        raise ConfigError(f"method is {method}: the prompt was prefilled for methods 0 to {len(prefilled.methods) - 1}")
