"""Prefill once, decode greedily for as many methods as wanted: the loop every benchmark and timing goes through."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.attention import attached, rotary_frequencies
from pqbench.batch import check_length, check_logits, check_prompt, group_rows
from pqbench.cache import (
    DecodeLayer,
    Group,
    LayeredCache,
    Meter,
    Observer,
    PrefillLayer,
    Rows,
    copy_sliding,
    layer_types,
    sliding_layers,
)  # fmt: skip
from pqbench.errors import ConfigError
from pqbench.method import Geometry, Method
from pqbench.store.base import Store

Keep = dict[tuple[int, int], Tensor | None]  # (layer, group) -> rows an evicting method keeps at the end of prefill


@dataclass
class Prefilled:
    """A prompt's keys and values with every method's state, ready to be decoded by each method in turn."""

    model: PreTrainedModel
    methods: Sequence[Method]
    mask: Tensor | None  # [B, S] bool, None without padding
    lengths: Tensor  # [B] tokens of each prompt
    logits: Tensor  # [B, V] after the last prompt token
    groups: list[Rows]
    layers: dict[int, PrefillLayer]
    sliding: dict[int, CacheLayerMixin]
    seconds: float  # dense prefill, observers excluded
    observe_seconds: list[float]
    build_seconds: list[float] = field(default_factory=list)
    keeps: dict[int, Keep] = field(default_factory=dict)

    def build(self, method: int) -> float:
        """Finish the prefill of one method: build its index, once. Returns the seconds this took."""
        if method not in self.keeps:
            began = now(self.model)
            self.keeps[method] = {
                (i, g): observer.state.finish_prefill(layer.store(observer.rows))
                for i, layer in self.layers.items()
                for g, observer in enumerate(self.observers(layer, method))
            }
            self.build_seconds[method] = now(self.model) - began
        return self.build_seconds[method]

    def observers(self, layer: PrefillLayer, method: int) -> list[Observer]:
        """A method's observers in one layer, one per group."""
        return layer.observers[method * len(self.groups) : (method + 1) * len(self.groups)]

    def fork(self, method: int) -> LayeredCache:
        """A cache that goes on from the prompt with one method and leaves the prompt untouched."""
        self.build(method)
        ours = {
            i: DecodeLayer([self.group(method, i, g) for g in range(len(self.groups))], layer.seen)
            for i, layer in self.layers.items()
        }
        return self.cache(ours)

    def cache(self, ours: Mapping[int, CacheLayerMixin]) -> LayeredCache:
        """A cache of our layers and of sliding layers that go on from the prompt."""
        layers = {**copy_sliding(self.sliding), **ours}
        return LayeredCache([layers[i] for i in range(len(layers))])

    def group(self, method: int, layer: int, group: int, shared: Store | None = None) -> Group:
        """A built method at work on one group of one layer, with its own copy of the state. It reads from ``shared``
        when that is given and the method evicts nothing, else from a store of its own."""
        observer, keep = self.observers(self.layers[layer], method)[group], self.keeps[method][layer, group]
        store = shared if shared is not None and keep is None else self.layers[layer].store(observer.rows)
        if keep is not None:
            store = store.keep(keep)
        return Group(observer.rows, store, copy.deepcopy(observer.state))


@dataclass(frozen=True)
class Generation:
    """What one method produced from one prompt, and what it cost. Tokens after the end are the padding token."""

    tokens: Tensor  # [B, new]
    ttft_s: float
    steps_s: list[float]
    observe_s: float
    build_s: float
    cache: LayeredCache

    @property
    def index_s(self) -> float:
        """Seconds the method's own index took: watching the prefill, and building afterwards."""
        return self.observe_s + self.build_s

    @property
    def tt2t_s(self) -> float:
        """Time to second token: the index must be ready and one step done."""
        return self.ttft_s + self.build_s + (self.steps_s[0] if self.steps_s else 0.0)

    @property
    def tpot_s(self) -> float:
        """Median seconds per decode step after the first."""
        later = sorted(self.steps_s[1:] or self.steps_s)
        return later[len(later) // 2] if later else float("nan")

    def groups(self) -> list[Group]:
        """The groups of every layer, with their stores, states and meters."""
        return [group for layer in self.cache.selective.values() for group in layer.groups]

    def meters(self) -> list[Meter]:
        """The meters of every layer and group."""
        return [group.meter for group in self.groups()]


def now(model: PreTrainedModel) -> float:
    """Wall clock after everything queued on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, input_ids: Tensor, methods: Sequence[Method], attention_mask: Tensor | None = None,
    chunk: int | None = None, reserve: int = 256,
) -> Prefilled:  # fmt: skip
    """Run the prompt densely, once, in one shot or ``chunk`` tokens at a time.

    Args:
        input_ids: ``[B, S]``, left-padded where lengths differ.
        attention_mask: ``[B, S]``, 0 on padding.
        reserve: decoded tokens that fit before buffers grow.

    Raises:
        ConfigError: an empty prompt, padding that is not on the left, a prompt longer than the model allows, or a model
            that computes NaN.
    """
    mask = check_prompt(model, input_ids, attention_mask)
    groups = group_rows(mask)
    types = layer_types(model.config.get_text_config())
    layers = {i: PrefillLayer(input_ids.shape[1] + reserve) for i, kind in enumerate(types) if kind == "full_attention"}
    rotary = frequencies(model, methods, next(iter(layers))) if layers else None
    for i, layer in layers.items():
        layer.observers = [
            Observer(rows, method.layer(geometry(model, i, rows, input_ids.shape[1], rotary)), lambda: now(model))
            for method in methods
            for rows in groups
        ]
    sliding = sliding_layers(model.config.get_text_config())
    cache = LayeredCache([(layers | sliding)[i] for i in range(len(types))])
    padded = None if bool(mask.all()) else mask
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    began = now(model)
    with attached(model):
        for start in range(0, input_ids.shape[1], chunk or input_ids.shape[1]):
            stop = start + (chunk or input_ids.shape[1])
            seen = None if padded is None else padded[:, :stop]
            logits = forward(model, input_ids[:, start:stop], cache, seen, positions[:, start:stop])
    seconds = now(model) - began
    check_logits(logits)
    observed = [
        sum(o.seconds for layer in layers.values() for o in layer.observers[m * len(groups) : (m + 1) * len(groups)])
        for m in range(len(methods))
    ]
    return Prefilled(
        model,
        methods,
        padded,
        mask.long().sum(-1),
        logits,
        groups,
        layers,
        sliding,
        seconds - sum(observed),
        observed,
        [0.0] * len(methods),
    )


@torch.inference_mode()
def decode(
    prefilled: Prefilled, method: int, max_new_tokens: int, min_new_tokens: int = 0,
    finished: Callable[[Tensor], Tensor] | None = None, question: Sequence[int] = (), extra_ends: Sequence[int] = (),
    config: GenerationConfig | None = None,
) -> Generation:  # fmt: skip
    """Greedy decoding of a prefilled prompt by one of its methods.

    Args:
        finished: sees the tokens so far ``[B, n]`` after every step and says which sequences end there, bool ``[B]``.
        question: prompt tokens that were not prefilled; they go through the method one by one before the first answer
            token, and their time, with that of the index, counts as time to first token.
        extra_ends: token ids that end a sequence besides the configured ones.
        config: end and padding tokens; None takes the model's own.

    Raises:
        ConfigError: fewer than one token wanted, or a model that computes NaN.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    model = prefilled.model
    config = model.generation_config if config is None else config
    more = torch.tensor(extra_ends, dtype=torch.long, device=model.device)
    ends = torch.cat([end_tokens(config, model.device), more])
    cache, mask, position = prefilled.fork(method), prefilled.mask, prefilled.lengths[:, None]
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
    observe, build = prefilled.observe_seconds[method], prefilled.build_seconds[method]
    ttft = prefilled.seconds + observe + asked + (build if len(question) else 0.0)
    return Generation(torch.stack(tokens, 1), ttft, steps, observe, 0.0 if len(question) else build, cache)


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
    max_new_tokens: int = 64, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Greedy continuation ``[B, new]`` of prompts ``[B, S]`` under a method; ends at the model's end-of-sequence token.

    Raises:
        ConfigError: see :func:`prefill`; also when the context would outgrow the model.
    """
    check_length(model, input_ids.shape[-1] + max_new_tokens)
    prefilled = prefill(model, input_ids, [method], attention_mask, chunk, reserve=max_new_tokens)
    return decode(prefilled, 0, max_new_tokens).tokens


def forward(model: PreTrainedModel, ids: Tensor, cache: LayeredCache, mask: Tensor | None, positions: Tensor) -> Tensor:
    """One model call; logits ``[B, V]`` after the last token. Without padding ``mask`` is None."""
    output = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, kv=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    logits: Tensor = output.logits[:, -1]
    return logits


def choose(logits: Tensor, forbidden: Tensor | None) -> Tensor:
    """Greedy token ``[B]``; ``forbidden`` tokens are out of the question."""
    if forbidden is not None and len(forbidden):
        logits = logits.index_fill(1, forbidden, float("-inf"))
    return logits.argmax(-1)


def frequencies(model: PreTrainedModel, methods: Sequence[Method], layer: int) -> Tensor | None:
    """Rotary frequencies of the full-attention layers, of which ``layer`` is one, if any of the methods renumbers."""
    wanted = any(method.needs_positions for method in methods)
    return rotary_frequencies(model, layer, "full_attention") if wanted else None


def geometry(model: PreTrainedModel, layer: int, rows: Rows, columns: int, rotary: Tensor | None) -> Geometry:
    """What a method's state of one layer and group needs to know; ``rotary`` are its :func:`frequencies`."""
    config = model.config.get_text_config()
    attention = model.get_decoder().layers[layer].self_attn
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Geometry(
        layer=layer, batch=rows.count, kv_heads=kv_heads, group=heads // kv_heads, head_dim=width,
        scaling=float(attention.scaling), prompt=columns - rows.padding,
        inverse_frequencies=rotary,
    )  # fmt: skip


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
