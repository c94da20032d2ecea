"""Greedy decoding of a prefilled prompt by one method: the loop every benchmark and timing goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pqbench.attention import attached
from pqbench.batch import check_length, check_logits
from pqbench.cache import LayeredCache
from pqbench.errors import ConfigError
from pqbench.group import Group, Meter
from pqbench.method import Method
from pqbench.prompt import Prefilled, Setting, forward, now, prefill

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
    """

    tokens: Tensor
    ttft_s: float
    steps_s: list[float]
    observe_s: float
    build_s: float
    pending_s: float
    cache: LayeredCache

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
        """Median seconds per decode step after the first."""
        later = sorted(self.steps_s[1:] or self.steps_s)
        return later[len(later) // 2] if later else float("nan")

    def settle(self) -> None:
        """Wait for every transfer that decoding left under way."""
        for group in self.groups():
            group.store.settle()

    def groups(self) -> list[Group]:
        """The groups of every layer, with their stores, states and meters."""
        return [group for layer in self.cache.selective.values() for group in layer.groups]

    def meters(self) -> list[Meter]:
        """The meters of every layer and group."""
        return [group.meter for group in self.groups()]


@torch.inference_mode()
def decode(
    prefilled: Prefilled, method: int, max_new_tokens: int, min_new_tokens: int = 0,
    finished: Callable[[Tensor], Tensor] | None = None, question: Sequence[int] = (), extra_ends: Sequence[int] = (),
    config: GenerationConfig | None = None, spend: bool = False,
) -> Generation:  # fmt: skip
    """Greedy decoding of a prefilled prompt by one of its methods.

    Args:
        finished: sees the tokens so far ``[B, n]`` after every step and says which sequences end there, bool ``[B]``.
        question: prompt tokens that were not prefilled; they go through the method one by one before the first answer
            token, and their time, with that of the index, counts as time to first token.
        extra_ends: token ids that end a sequence besides the configured ones.
        config: end and padding tokens; None takes the model's own.
        spend: use up the method's state instead of a copy, see :meth:`Prefilled.fork`.

    Raises:
        ConfigError: fewer than one token wanted, a model that computes NaN, or a context that would cross a length at
            which the model's rotary frequencies change.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    model = prefilled.model
    prefilled.check_reach(len(question) + max_new_tokens - 1)
    config = model.generation_config if config is None else config
    more = torch.tensor(extra_ends, dtype=torch.long, device=model.device)
    ends = torch.cat([end_tokens(config, model.device), more])
    pending = 0.0 if prefilled.workers is not None else prefilled.build(method)
    began = now(model)
    cache, mask, position = prefilled.fork(method, spend=spend), prefilled.mask, prefilled.lengths[:, None]
    if spend:  # compaction by an evicting method; without spending it would be the time of copies
        pending += now(model) - began
    filler = pad_token(config)
    done = torch.zeros_like(prefilled.lengths, dtype=torch.bool)
    tokens: list[Tensor] = []
    steps, asked, logits = [], 0.0, prefilled.logits
    with attached(model):
        for known in question:
            token = torch.full_like(done, known, dtype=torch.long)
            logits, mask, seconds = _step(prefilled, cache, token, mask, position)
            position, asked = position + 1, asked + seconds
        while True:
            token = choose(logits, ends if len(tokens) < min_new_tokens else None)
            tokens.append(token.masked_fill(done, filler))
            done = done | torch.isin(token, ends)
            if finished is not None:
                done = done | finished(torch.stack(tokens, 1))
            if len(tokens) == max_new_tokens or bool(done.all()):
                break
            logits, mask, seconds = _step(prefilled, cache, tokens[-1], mask, position)
            position = position + 1
            steps.append(seconds)
    check_logits(logits)  # once: NaN in a token's keys stays, since the window holds it
    observe, build = prefilled.observe_seconds[method], prefilled.build(method)
    ttft = prefilled.seconds + observe
    if len(question):
        ttft, pending = ttft + pending + asked, 0.0
    return Generation(torch.stack(tokens, 1), ttft, steps, observe, build, pending, cache)


def _step(
    prefilled: Prefilled, cache: LayeredCache, token: Tensor, mask: Tensor | None, position: Tensor
) -> tuple[Tensor, Tensor | None, float]:
    """One decode step: logits ``[B, V]``, the mask grown by a column, and the seconds it took."""
    began = now(prefilled.model)
    mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
    logits = forward(prefilled.model, token[:, None], cache, mask, position)
    return logits, mask, now(prefilled.model) - began


def generate(
    model: PreTrainedModel, input_ids: Tensor, method: Method, attention_mask: Tensor | None = None,
    max_new_tokens: int = 64, chunk: int | None = None, setting: Setting | None = None,
) -> Tensor:  # fmt: skip
    """Greedy continuation ``[B, new]`` of prompts ``[B, S]`` under a method; ends at the model's end-of-sequence token.
    ``setting`` says where KV lives, which kernels compute and what overlaps.

    Raises:
        ConfigError: see :func:`prefill`; also when the context would outgrow the model.
    """
    if not method.own_prefill:
        check_length(model, input_ids.shape[-1] + max_new_tokens, None if setting is None else setting.max_length)
    prefilled = prefill(model, input_ids, [method], attention_mask, chunk, max_new_tokens, setting)
    generation = decode(prefilled, 0, max_new_tokens, spend=True)
    generation.settle()
    prefilled.close()
    return generation.tokens


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
