"""A prompt's dense prefill, once, for as many methods as wanted; what each method builds on it, and where."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.attention import attached
from pqbench.attention import forward as forward
from pqbench.batch import check_blocks, check_logits, check_prompt, group_rows
from pqbench.cache import DecodeLayer, LayeredCache, PrefillLayer, chain, copy_sliding, sliding_layers
from pqbench.errors import ConfigError
from pqbench.group import Clock, Group, Observer, Rows
from pqbench.kernels.backend import kernels
from pqbench.kernels.threads import stay_alone, usable_cores
from pqbench.lengths import check_switch
from pqbench.method import Calibration, Geometry, Method
from pqbench.rehearsal import geometry_of, profile
from pqbench.rotary import layer_frequencies
from pqbench.store.base import Store
from pqbench.store.tiers import DeviceTier, Placement, Tier


@dataclass(frozen=True)
class Setting:
    """How prompts are run, whatever the method.

    Attributes:
        tier: where KV lives while decoding.
        overlap: with a single method, build each layer's index in the background while the next layers compute, on a
            GPU or on cores that the model's threads leave idle; the tokens are the same without. With several methods
            no index overlaps, so that their times stay apart.
        body: which kernels compute, see :func:`pqbench.kernels.backend.kernels`.
        calibration: times of this hardware for methods that adapt to it.
        max_length: longest context to run, where that is more than the model was made for; None for the model's own.
    """

    tier: Tier = field(default_factory=DeviceTier)
    overlap: bool = True
    body: str = "auto"
    calibration: Calibration | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Built:
    """A method's finished index in one layer and group.

    Attributes:
        rows: what the method answered, see :meth:`pqbench.store.base.Store.after_prefill`.
        seconds: what all this took.
        stores: one to go on with, or none. A store of ``rows`` goes to the first who asks; several methods would each
            hold theirs from the start, so then it is made when asked for. A store of all rows goes to who spends it.
    """

    rows: Tensor | None
    seconds: float
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
    workers: ThreadPoolExecutor | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, V] after the last prompt token
    seconds: float = 0.0  # dense prefill, observers excluded
    observe_seconds: list[float] = field(default_factory=list)
    _built: dict[tuple[int, int, int], Future[Built]] = field(default_factory=dict)  # by method, layer and group
    _spent: set[int] = field(default_factory=set)  # methods whose own state went into a decode

    def check_reach(self, tokens: int) -> None:
        """Raises ConfigError when so many tokens more would cross a length at which rotary frequencies change."""
        longest = int(self.lengths.max())
        columns = longest if self.mask is None else self.mask.shape[1]  # generate() counts padding
        for first in (longest, columns):
            check_switch(self.model.config, first, first + tokens)

    def start(self, layer: int) -> None:
        """A layer's prompt is complete: build its indices beside what follows, if there are workers."""
        if self.workers is not None:
            for method, group in self._pairs():
                self._built[method, layer, group] = self.workers.submit(self._build, method, layer, group)

    def build(self, method: int) -> float:
        """Finish a method's indices, once. Returns the seconds the work took, in the background or not."""
        return sum(self.built(method, i, g).seconds for i in self.layers for g in range(len(self.groups)))

    def built(self, method: int, layer: int, group: int) -> Built:
        """One layer's index; waits for it or, without workers, builds it now."""
        future = self._built.get((method, layer, group))
        if future is None:
            future = self._built[method, layer, group] = Future()
            try:
                future.set_result(self._build(method, layer, group))
            except Exception as error:  # noqa: BLE001 - kept for every later caller
                future.set_exception(error)
        return future.result()

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
        if self.workers is None:
            for layer in ours.values():
                layer.groups  # noqa: B018 - made here, so that the first step is timed without
        return self.cache(ours)

    def cache(self, ours: Mapping[int, CacheLayerMixin]) -> LayeredCache:
        """A cache of our layers and of sliding layers that go on from the prompt."""
        layers = {**copy_sliding(self.sliding), **ours}
        return LayeredCache([layers[i] for i in range(len(layers))])

    def group(
        self, method: int, layer: int, group: int, shared: Store | None = None, *, spend: bool = False
    ) -> Group:  # fmt: skip
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
        return Group(observer.rows, store, state, clock(self.model))

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

    def close(self) -> None:
        """End what runs in the background; stores over this prompt are of no use afterwards.

        Raises:
            OrderingError: a debugged link found transfers that nobody waited for.
        """
        if self.workers is not None:
            self.workers.shutdown()
        self.placement.close()

    def _pairs(self) -> list[tuple[int, int]]:
        return [(m, g) for m in range(len(self.methods)) for g in range(len(self.groups))]

    @torch.inference_mode()
    def _build(self, method: int, layer: int, group: int) -> Built:
        store = self.store(layer, group, method)
        began = now(self.model)
        rows = self.observer(method, layer, group).state.finish_prefill(store)
        stores = []
        if rows is None or len(self.methods) == 1:
            stores.append(store.after_prefill(rows, self.methods[method].evicts))
            stores[0].open()
        return Built(rows, now(self.model) - began, stores)


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, input_ids: Tensor, methods: Sequence[Method], attention_mask: Tensor | None = None,
    chunk: int | None = None, reserve: int = 256, setting: Setting | None = None,
) -> Prefilled:  # fmt: skip
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
            that computes NaN, a tier that this machine does not have or that cannot hold the prompt, or a method with a
            prefill of its own that is not alone.
    """
    setting = Setting() if setting is None else setting
    any_length = check_own_prefill(methods)
    mask, columns = check_prompt(model, input_ids, attention_mask, any_length, setting.max_length), input_ids.shape[1]
    check_blocks(model, mask, chunk or columns)
    groups = group_rows(mask)
    prefilled = _open(model, methods, groups, mask, columns, reserve, setting)
    both: dict[int, CacheLayerMixin] = {**prefilled.layers, **prefilled.sliding}
    cache = LayeredCache([both[i] for i in range(len(both))])
    positions, chunk = (mask.long().cumsum(-1) - 1).clamp(min=0), chunk or columns
    began = now(model)
    with attached(model):
        for start in range(0, columns, chunk):
            seen = None if prefilled.mask is None else mask[:, : start + chunk]
            block = slice(start, start + chunk)
            logits = forward(model, input_ids[:, block], cache, seen, positions[:, block])
    seconds = now(model) - began
    check_logits(logits)
    prefilled.logits, observers = logits, [layer.observers for layer in prefilled.layers.values()]
    for m in range(len(methods)):
        own = slice(m * len(groups), (m + 1) * len(groups))
        prefilled.observe_seconds.append(sum(o.seconds for listed in observers for o in listed[own]))
    prefilled.seconds = seconds - sum(prefilled.observe_seconds)
    return prefilled


def check_own_prefill(methods: Sequence[Method]) -> bool:
    """Whether the one method prefills by itself. Raises ConfigError when it is not the only one."""
    own = [type(method).__name__ for method in methods if method.own_prefill]
    if own and len(methods) > 1:
        raise ConfigError(f"{own[0]} has a prefill of its own and shares none: run it alone, or with a dense prefill")
    return bool(own)


def _open(
    model: PreTrainedModel, methods: Sequence[Method], groups: list[Rows], mask: Tensor, columns: int, reserve: int,
    setting: Setting,
) -> Prefilled:  # fmt: skip
    """Everything a prompt needs before its first token."""
    kernels(model.device, setting.body).use_threads(torch.get_num_threads())
    known = profile(model)
    if setting.tier.offloads and len(devices(model)) > 1:
        raise ConfigError("store=host serves models on one device: use store=device, or a model that fits one GPU")
    placement = setting.tier.open(model.device, setting.body)
    rotary = frequencies(model, methods)
    background = setting.overlap and len(methods) == 1
    prefilled = Prefilled(
        model, methods, groups, {}, sliding_layers(model.config.get_text_config(decoder=True)),
        None if bool(mask.all()) else mask, mask.long().sum(-1), placement,
        _workers(model, setting) if background else None,
    )  # fmt: skip
    for i in known.layers:
        layer = PrefillLayer(columns, reserve, groups, placement, partial(prefilled.start, i))
        layer.own = any(method.own_prefill for method in methods)
        layer.observers = [
            Observer(rows, method.layer(geometry(model, i, rows, columns, rotary.get(i), setting)), clock(model))
            for method in methods
            for rows in groups
        ]
        prefilled.layers[i] = layer
    setting.tier.check((columns + reserve) * len(mask), known.row_numbers * model.dtype.itemsize)
    return prefilled


def _workers(model: PreTrainedModel, setting: Setting) -> ThreadPoolExecutor | None:
    """One background thread: on all cores beside a model on a GPU, else on the cores that the model leaves idle. None
    where it leaves none: a team of threads is as slow as its slowest, so work beside it would cost more than after."""
    body, beside = kernels(model.device, setting.body), model.device.type == "cpu"
    cores = usable_cores() - (torch.get_num_threads() if beside else 0)
    if cores < 1:
        return None

    def begin() -> None:
        body.use_threads(cores)
        if beside:
            stay_alone()

    return ThreadPoolExecutor(1, "index", initializer=begin)


def _each(make: Callable[[int, int], Group], layer: int, groups: int) -> list[Group]:
    return [make(layer, group) for group in range(groups)]


def now(model: PreTrainedModel) -> float:
    """Wall clock after everything queued on the model's devices is done."""
    return clock(model)()


def clock(model: PreTrainedModel) -> Clock:
    """What :func:`now` reads. Looks the devices up once: transformers walks through all modules for them."""
    used = [device for device in devices(model) if device.type == "cuda"]
    return partial(_synchronised, used) if used else time.perf_counter


def _synchronised(used: Sequence[torch.device]) -> float:
    for device in used:
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
) -> Geometry:  # fmt: skip
    """What a method's state of one layer and group needs to know; ``rotary`` are its :func:`frequencies`."""
    full = list(profile(model).layers)
    known = geometry_of(profile(model).layers[layer], layer, rows, columns - rows.padding, setting.body)
    return replace(
        known, inverse_frequencies=None if rotary is None else rotary.to(known.device), layers=len(full),
        rank=full.index(layer), calibration=setting.calibration,
    )  # fmt: skip
