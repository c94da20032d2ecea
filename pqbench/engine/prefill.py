"""A prompt's dense prefill, once, for as many methods as wanted; what each method builds on it, and where."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.engine.arguments import check_call, check_count, check_vocabulary, outlives_exit
from pqbench.engine.attention import attached
from pqbench.engine.attention import forward as forward
from pqbench.engine.batch import check_blocks, check_indices, check_logits, check_prompt, group_rows
from pqbench.engine.beside import Beside, Finished, IdleCores, Pending, SideStream, tensors_of
from pqbench.engine.clock import Clock, Spans, Streams, clock_of, streams_of
from pqbench.engine.cohort import Group, Observer, Rows
from pqbench.engine.graphs.check import check_batch_captured
from pqbench.engine.layers import DecodeLayer, LayeredCache, PrefillLayer, chain, copy_sliding, sliding_layers
from pqbench.engine.rehearsal import geometry_of, profile
from pqbench.engine.rotary import layer_frequencies
from pqbench.engine.setting import Setting as Setting
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.method import Geometry, Method
from pqbench.models.lengths import check_switch, length_dependent
from pqbench.store.base import Store
from pqbench.store.tiers import Need, Placement


@dataclass(frozen=True)
class Built:
    """A method's finished index in one layer and group.

    Attributes:
        rows: what the method answered, see :meth:`pqbench.store.base.Store.after_prefill`.
        took: the time of all this.
        stores: one to go on with, or none. A store of ``rows`` goes to the first who asks; several methods would each
            hold theirs from the start, so then it is made when asked for. A store of all rows goes to who spends it.
    """

    rows: Tensor | None
    took: Spans
    stores: list[Store]


@dataclass
class Prefilled:
    """A prompt's keys and values with every method's state, ready to be decoded by each method in turn."""

    model: PreTrainedModel
    methods: Sequence[Method]
    groups: list[Rows]
    layers: dict[int, PrefillLayer]
    sliding: dict[int, CacheLayerMixin]
    mask: Tensor | None  # [B, S] bool, None without padding
    lengths: Tensor  # [B] tokens of each prompt
    placement: Placement
    streams: Streams | None = None  # of the device, see Setting
    named: bool = False  # see Setting
    beside: Beside | None = None  # where indices are built while the next layers compute
    graphs: bool = False  # see Setting
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, V] after the last prompt token
    seconds: float = 0.0  # dense prefill, observers excluded
    observe_seconds: list[float] = field(default_factory=list)
    _built: dict[tuple[int, int, int], Pending[Built]] = field(default_factory=dict)  # by method, layer and group
    _spent: set[int] = field(default_factory=set)  # methods whose own state went into a decode

    def check_reach(self, tokens: int) -> None:
        """Raises ConfigError when so many tokens more would cross a length at which rotary frequencies change."""
        if length_dependent(self.model.config) is None:  # else the host would wait for a GPU
            return
        longest = int(self.lengths.max())
        columns = longest if self.mask is None else self.mask.shape[1]  # generate() counts padding
        for first in (longest, columns):
            check_switch(self.model.config, first, first + tokens)

    def start(self, layer: int) -> None:
        """A layer's prompt is complete: build its indices beside what follows, if there is a place for that."""
        if self.beside is None:
            return
        for method, group in self._pairs():
            state, prompt = self.observer(method, layer, group).state, self.layers[layer].prompt(self.groups[group])
            uses = [*prompt.tensors(), *tensors_of(state, {id(state.geometry)})]
            work = partial(self._build, method, layer, group)
            self._built[method, layer, group] = self.beside.submit(work, state.geometry.device, uses)

    def build(self, method: int) -> float:
        """Finish a method's indices, once, wait for them and check them. Returns the seconds that the work took, beside
        the prefill or not.

        Raises:
            ConfigError: an index was made of what it cannot be made of.
        """
        finished = self.finish(method)
        layers = product(self.layers, range(len(self.groups)))
        check_indices([check for i, g in layers for check in self.observer(method, i, g).state.checks])
        return sum(built.took.total for built in finished)

    def finish(self, method: int) -> list[Built]:
        """A method's indices of all layers and groups; on a GPU they may still be under way, ahead of what follows."""
        return [self.built(method, i, g) for i in self.layers for g in range(len(self.groups))]

    def built(self, method: int, layer: int, group: int) -> Built:
        """One layer's index, built now unless that was done beside the prefill. A GPU finishes it before what is queued
        next; otherwise it is waited for."""
        key = method, layer, group
        if key not in self._built:
            self._built[key] = Finished(partial(self._build, *key))
        return self._built[key].result()

    def observer(self, method: int, layer: int, group: int) -> Observer:
        """A method's observer of one group in one layer."""
        return self.layers[layer].observers[method * len(self.groups) + group]

    def fork(self, method: int, *, spend: bool = False) -> LayeredCache:
        """A cache that goes on from the prompt with one method and leaves the prompt untouched. With ``spend`` the
        method's own state goes into it, uncopied: no further fork of this method is possible."""
        if method in self._spent:
            raise RuntimeError("this method's state is spent: prefill again")
        if spend:
            self._spent.add(method)
        make = partial(self.group, method, spend=spend)
        ours = {
            i: DecodeLayer(partial(_each, make, i, len(self.groups)), layer.seen) for i, layer in self.layers.items()
        }
        chain(list(ours.values()))
        if self.beside is None:
            for layer in ours.values():
                layer.groups  # noqa: B018 - made here, so that the first step is timed without
        return self.cache(ours)

    def cache(self, ours: Mapping[int, CacheLayerMixin]) -> LayeredCache:
        """A cache of our layers and of sliding layers that go on from the prompt."""
        layers = {**copy_sliding(self.sliding), **ours}
        return LayeredCache([layers[i] for i in range(len(layers))])

    def group(self, method: int, layer: int, group: int, shared: Store | None = None, *, spend: bool = False) -> Group:
        """A built method at work on one group of one layer, with its own copy of the state. It reads from ``shared``
        when that is given and the method wants its rows as they are, else from a store of its own. With ``spend`` the
        rows that no method will read any more are let go."""
        observer, built = self.observer(method, layer, group), self.built(method, layer, group)
        if built.stores and (spend or built.rows is not None):
            store = built.stores.pop()
        elif shared is not None and built.rows is None:
            store = shared
        else:
            store = self.store(layer, group, method).after_prefill(built.rows, self.methods[method].evicts)
        if spend and len(self.methods) == 1:
            self.layers[layer].release(observer.rows)
        state = observer.state if spend else copy.deepcopy(observer.state)
        return Group(observer.rows, store, state, observer.clock)

    def over_one_store(self, layer: int, methods: Sequence[int]) -> tuple[Store, list[Group]]:
        """A store of all rows of the only group in one layer, and these methods at work over it; those that want their
        rows otherwise have stores of their own."""
        own = {m: self.group(m, layer, 0) for m in methods if self.built(m, layer, 0).rows is not None}
        shared = self.store(layer, 0)  # last: the youngest store of the prompt may write
        return shared, [own[m] if m in own else self.group(m, layer, 0, shared=shared) for m in methods]

    def store(self, layer: int, group: int, method: int | None = None) -> Store:
        """A store over the prompt of one group in one layer, laid out for a method's sinks and window."""
        rows = self.groups[group]
        prompt = self.layers[layer].columns - rows.padding
        split = None if method is None else partial(self.methods[method].split, prompt=prompt)
        return self.layers[layer].prompt(rows).store(split)

    @property
    def clock(self) -> Clock:
        """Of whole steps: of the device that the model begins and ends on."""
        return clock_of(self.model.device, self.streams, named=self.named)

    def close(self) -> None:
        """End what runs in the background; stores over this prompt are of no use afterwards.

        Raises:
            OrderingError: a debugged link found transfers that nobody waited for.
        """
        if self.beside is not None:
            self.beside.close()
        self.placement.close()

    def _pairs(self) -> list[tuple[int, int]]:
        return [(m, g) for m in range(len(self.methods)) for g in range(len(self.groups))]

    @torch.inference_mode()
    def _build(self, method: int, layer: int, group: int) -> Built:
        store, observer = self.store(layer, group, method), self.observer(method, layer, group)
        took, stores = observer.clock.spans("index"), []
        with took:
            rows = observer.state.finish_prefill(store)
            if rows is None or len(self.methods) == 1:
                stores.append(store.after_prefill(rows, self.methods[method].evicts))
                stores[0].usage.open()
        if self.streams is None:  # nothing is under way, so that it can be said at once
            check_indices(observer.state.checks)
        return Built(rows, took, stores)


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
    """Run the prompt, once, in one shot or ``chunk`` tokens at a time: densely, or through the one method that brings a
    prefill of its own.

    Args:
        input_ids: ``[B, S]``, left-padded where lengths differ.
        attention_mask: ``[B, S]``, 0 on padding.
        reserve: decoded tokens that fit before buffers grow.
        setting: how to run it.

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
    mask, columns = check_prompt(model, input_ids, attention_mask, any_length, setting.max_length), input_ids.shape[1]
    check_vocabulary(input_ids, model)
    check_blocks(model, mask, chunk or columns)
    groups = group_rows(mask)
    if setting.graphs:
        check_batch_captured(groups, not bool(mask.all()))
    prefilled = _open(model, methods, groups, mask, columns, reserve, setting)
    both: dict[int, CacheLayerMixin] = {**prefilled.layers, **prefilled.sliding}
    cache = LayeredCache([both[i] for i in range(len(both))])
    positions, chunk = (mask.long().cumsum(-1) - 1).clamp(min=0), chunk or columns
    took = prefilled.clock.spans("prefill")
    with attached(model), took:
        for start in range(0, columns, chunk):
            seen = None if prefilled.mask is None else mask[:, : start + chunk]
            block = slice(start, start + chunk)
            logits = forward(model, input_ids[:, block], cache, seen, positions[:, block])
    check_logits(logits)  # the one time that the host waits: all else has been queued
    prefilled.logits, observers = logits, [layer.observers for layer in prefilled.layers.values()]
    for m in range(len(methods)):
        own = slice(m * len(groups), (m + 1) * len(groups))
        prefilled.observe_seconds.append(sum(o.seconds for listed in observers for o in listed[own]))
    prefilled.seconds = took.total - sum(prefilled.observe_seconds)
    return prefilled


def check_own_prefill(methods: Sequence[Method]) -> bool:
    """Whether the one method prefills by itself. Raises ConfigError when it is not the only one."""
    own = [type(method).__name__ for method in methods if method.own_prefill]
    if own and len(methods) > 1:
        raise ConfigError(f"{own[0]} has a prefill of its own and shares none: run it alone, or with a dense prefill")
    return bool(own)


def _open(
    model: PreTrainedModel,
    methods: Sequence[Method],
    groups: list[Rows],
    mask: Tensor,
    columns: int,
    reserve: int,
    setting: Setting,
) -> Prefilled:
    """Everything a prompt needs before its first token."""
    body, streams = kernels(model.device, setting.body), streams_of(model.device, setting.streams)
    body.use_threads(torch.get_num_threads())
    known = profile(model)
    if setting.tier.offloads and len(devices(model)) > 1:
        raise ConfigError("store=host serves models on one device: use store=device, or a model that fits one GPU")
    placement = setting.tier.open(model.device, setting.body)
    rotary = frequencies(model, methods)
    alone = setting.overlap and len(methods) == 1
    beside: Beside | None = None
    if alone:
        beside = IdleCores.of(body) if streams is None else SideStream(streams)
    prefilled = Prefilled(
        model,
        methods,
        groups,
        {},
        sliding_layers(model.config.get_text_config(decoder=True)),
        None if bool(mask.all()) else mask,
        mask.long().sum(-1),
        placement,
        streams,
        setting.named,
        beside,
        setting.graphs,
    )
    for i in known.layers:
        layer = PrefillLayer(columns, reserve, groups, placement, partial(prefilled.start, i))
        layer.own = any(method.own_prefill for method in methods)
        layer.observers = [
            _observer(method, geometry(model, i, rows, columns, rotary.get(i), setting), rows, setting)
            for method in methods
            for rows in groups
        ]
        prefilled.layers[i] = layer
    need = Need(model.device, len(known.layers), reserve * len(mask))
    setting.tier.check((columns + reserve) * len(mask), known.row_numbers * model.dtype.itemsize, need)
    return prefilled


def _observer(method: Method, known: Geometry, rows: Rows, setting: Setting) -> Observer:
    streams = streams_of(known.device, setting.streams)
    return Observer(rows, method.layer(known), clock_of(known.device, streams, named=setting.named))


def _each(make: Callable[[int, int], Group], layer: int, groups: int) -> list[Group]:
    return [make(layer, group) for group in range(groups)]


def devices(model: PreTrainedModel) -> set[torch.device]:
    """Where the model's layers are: several devices when it was loaded with ``device=auto``."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return {torch.device(f"cuda:{place}" if str(place).isdigit() else place) for place in placed.values()}


def frequencies(model: PreTrainedModel, methods: Sequence[Method]) -> dict[int, Tensor]:
    """Rotary frequencies of every full-attention layer if any of the methods renumbers positions, else of none."""
    wanted = any(method.needs_positions for method in methods)
    return layer_frequencies(model, list(profile(model).layers)) if wanted else {}


def geometry(
    model: PreTrainedModel, layer: int, rows: Rows, columns: int, rotary: Tensor | None, setting: Setting
) -> Geometry:
    """What a method's state of one layer and group needs to know; ``rotary`` are its :func:`frequencies`."""
    full = list(profile(model).layers)
    known = geometry_of(profile(model).layers[layer], layer, rows, columns - rows.padding, setting.body)
    return replace(
        known,
        inverse_frequencies=None if rotary is None else rotary.to(known.device),
        layers=len(full),
        rank=full.index(layer),
        calibration=setting.calibration,
        correction=setting.correction if setting.select_ahead else None,
    )
