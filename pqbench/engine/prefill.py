"""The prefill of a prompt. It runs once for any number of methods, and every method observes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.engine.arguments import check_call, check_count, check_vocabulary, outlives_exit
from pqbench.engine.attention import attached, forward
from pqbench.engine.batch import check_blocks, check_logits, check_prompt
from pqbench.engine.beside import Beside, IdleCores, SideStream
from pqbench.engine.clock import clock_of, streams_of
from pqbench.engine.cohort import Observer, Rows
from pqbench.engine.graphs.check import check_batch_captured
from pqbench.engine.layers import LayeredCache, PrefillLayer, sliding_layers
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from pqbench.engine.shapes import PromptShape, devices, frequencies, geometry, needs, working_bytes
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.method import Geometry, Method


@outlives_exit
@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    methods: Sequence[Method],
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    reserve: int = 256,
    setting: Setting | None = None,
) -> Prefilled:
    """Prefill a batch of prompts once, in one shot or ``chunk`` tokens at a time. Attention is dense, unless the only
    method has a prefill of its own.

    Args:
        input_ids: ``[B, S]``, token ids, padded on the left where lengths differ.
        attention_mask: ``[B, S]``, 0 on padding.
        reserve: number of decoded tokens that fit before buffers grow.
        setting: how to run the prefill and the decoding after it.

    Raises:
        ModelError: a model that no method can serve exactly, or that one of these methods cannot serve.
        ConfigError: an empty prompt, padding that is not on the left, a prompt longer than the model allows, a model
            that computes NaN, a tier that this machine does not have or that cannot hold the prompt, a method with a
            prefill of its own that is not alone, or a setting that the model, a method or the batch cannot follow.
    """
    check_call(model, input_ids, methods, attention_mask)
    if chunk is not None:
        check_count("chunk", chunk)
    setting = Setting.of(setting)
    setting.check({type(method).__name__: method for method in methods}, model)
    any_length = check_own_prefill(methods)
    mask = check_prompt(model, input_ids, attention_mask, any_length, setting.max_length)
    check_vocabulary(input_ids, model)
    chunk = chunk or mask.shape[1]
    check_blocks(model, mask, chunk)
    shape = PromptShape.of(mask)
    if setting.graphs:
        check_batch_captured(shape.cohorts, shape.padded)
    prefilled = _open(model, methods, shape, reserve, setting, chunk)
    with ExitStack() as unfinished:
        unfinished.push(prefilled)
        _add_layers(prefilled, shape, reserve, setting)
        _run(prefilled, input_ids, mask, shape, chunk)
        unfinished.pop_all()  # From here on the caller closes it.
    return prefilled


def _run(prefilled: Prefilled, input_ids: Tensor, mask: Tensor, shape: PromptShape, chunk: int) -> None:
    """Let the model read the prompts ``[B, S]``, ``chunk`` tokens at a time."""
    both: dict[int, CacheLayerMixin] = {**prefilled.layers, **prefilled.sliding}
    cache = LayeredCache([both[i] for i in range(len(both))])
    positions = shape.positions
    took = prefilled.clock.spans("prefill")
    with attached(prefilled.model), took:
        for start in range(0, shape.columns, chunk):
            seen = None if prefilled.mask is None else mask[:, : start + chunk]
            block = slice(start, start + chunk)
            logits = forward(prefilled.model, input_ids[:, block], cache, seen, positions[:, block])
    check_logits(logits)  # The only time that the host waits: everything before this has only been queued.
    prefilled.logits = logits
    for m in range(len(prefilled.methods)):
        own = [observer for layer in prefilled.layers.values() for observer in layer.observers[m]]
        prefilled.observe_seconds.append(sum(observer.seconds for observer in own))
    prefilled.seconds = took.total - sum(prefilled.observe_seconds)


def check_own_prefill(methods: Sequence[Method]) -> bool:
    """Whether the only method has a prefill of its own. Raises ConfigError when such a method is not the only one."""
    own = [type(method).__name__ for method in methods if method.own_prefill]
    if own and len(methods) > 1:
        raise ConfigError(
            f"{own[0]} has a prefill of its own and cannot share one: run it alone, or with a dense prefill"
        )
    return bool(own)


def _open(
    model: PreTrainedModel,
    methods: Sequence[Method],
    shape: PromptShape,
    reserve: int,
    setting: Setting,
    chunk: int,
) -> Prefilled:
    """Check that there is room for a prompt, and open the place where it will be stored.

    Raises:
        ConfigError: this model or this machine cannot use the tier.
        RoomError: a device or the host has too little memory.
    """
    backend, streams = kernels(model.device, setting.backend), streams_of(model.device, setting.streams)
    backend.use_threads(torch.get_num_threads())
    if setting.tier.offloads and len(devices(model)) > 1:
        raise ConfigError("store=host serves models on one device: use store=device, or a model that fits one GPU")
    row = model.dtype.itemsize
    for numbers, need in needs(profile(model), reserve * len(shape.mask), working_bytes(model, shape, chunk)):
        setting.tier.check((shape.columns + reserve) * len(shape.mask), numbers * row, need)
    placement = setting.tier.open(model.device, setting.backend)
    beside: Beside | None = None
    if setting.overlap and len(methods) == 1:
        beside = IdleCores.of(backend) if streams is None else SideStream(streams)
    return Prefilled(
        model,
        methods,
        shape.cohorts,
        {},
        sliding_layers(model.config.get_text_config(decoder=True)),
        shape.mask if shape.padded else None,
        shape.lengths,
        placement,
        streams,
        setting.named,
        beside,
        setting.graphs,
    )


def _add_layers(prefilled: Prefilled, shape: PromptShape, reserve: int, setting: Setting) -> None:
    """Add the layers that hold the prompt, with an observer for every method."""
    model, methods = prefilled.model, prefilled.methods
    rotary = frequencies(model, methods)
    for i in profile(model).layers:
        layer = PrefillLayer(shape.columns, reserve, shape.cohorts, prefilled.placement, partial(prefilled.start, i))
        layer.own = any(method.own_prefill for method in methods)
        facts = [geometry(model, i, rows, shape.columns, rotary.get(i), setting) for rows in shape.cohorts]
        layer.observers = [
            [_observer(method, *place, setting) for place in zip(facts, shape.cohorts, strict=True)]
            for method in methods
        ]
        prefilled.layers[i] = layer


def _observer(method: Method, known: Geometry, rows: Rows, setting: Setting) -> Observer:
    streams = streams_of(known.device, setting.streams)
    return Observer(rows, method.layer(known), clock_of(known.device, streams, named=setting.named))
