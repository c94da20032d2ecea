"""A prompt that has been prefilled, with the state of every method, ready to be decoded by each method in turn."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.engine.arguments import outlives_exit
from pqbench.engine.batch import check_indices
from pqbench.engine.beside import Beside, Finished, Pending, tensors_of
from pqbench.engine.clock import Clock, Spans, Streams, clock_of
from pqbench.engine.cohort import Cohort, Observer, Rows
from pqbench.engine.layers import DecodeLayer, LayeredCache, PrefillLayer, copy_sliding, link_layers
from pqbench.method import Method
from pqbench.models.lengths import check_switch, length_dependent
from pqbench.store.base import Store
from pqbench.store.tiers import Placement


@dataclass(frozen=True)
class Built:
    """A method's finished index in one layer and cohort.

    Attributes:
        rows: the rows that the method wants its store to hold, see :meth:`pqbench.store.base.Store.after_prefill`.
        took: the time that building took.
        stores: one store to decode with, or none. With a single method the store is made here and goes to the first
            caller that asks for it. With several methods a store of ``rows`` is made only when it is asked for, because
            all of them together would take too much memory. A store of all rows goes to the caller that spends the
            state.
    """

    rows: Tensor | None
    took: Spans
    stores: list[Store]


class Closing(ABC):
    """A context manager that closes itself at the end of the block. An error in the block is raised even where closing
    fails as well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(Exception):  # What an interrupted decode left under way must not hide the error itself.
            self.close()

    @abstractmethod
    def close(self) -> None:
        """End what runs in the background."""


@dataclass
class Prefilled(Closing):
    """A prompt's keys and values with every method's state, ready to be decoded by each method in turn."""

    model: PreTrainedModel
    methods: Sequence[Method]
    cohorts: list[Rows]
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
    seconds: float = 0.0  # of the prefill, without the observers
    observe_seconds: list[float] = field(default_factory=list)
    _built: dict[tuple[int, int, int], Pending[Built]] = field(default_factory=dict)  # by method, layer and cohort
    _spent: set[int] = field(default_factory=set)  # methods whose own state went into a decode

    def check_reach(self, tokens: int) -> None:
        """Raises ConfigError when ``tokens`` further tokens would cross a length at which rotary frequencies change."""
        if length_dependent(self.model.config) is None:  # otherwise the host would wait for the GPU
            return
        longest = int(self.lengths.max())
        columns = longest if self.mask is None else self.mask.shape[1]  # generate() counts padding
        for first in (longest, columns):
            check_switch(self.model.config, first, first + tokens)

    def start(self, layer: int) -> None:
        """Start building a layer's indices beside the prefill of the next layers, if :attr:`beside` is set. Called when
        the layer has the whole prompt."""
        if self.beside is None:
            return
        for method, cohort in product(range(len(self.methods)), range(len(self.cohorts))):
            state, prompt = self.observer(method, layer, cohort).state, self.layers[layer].prompt(self.cohorts[cohort])
            uses = [*prompt.tensors(), *tensors_of(state, {id(state.geometry)})]
            work = partial(self._build, method, layer, cohort)
            self._built[method, layer, cohort] = self.beside.submit(work, state.geometry.device, uses)

    @outlives_exit
    def build(self, method: int) -> float:
        """Build a method's indices unless that is done, wait for them and check them. Returns the seconds that building
        took, beside the prefill or not.

        Raises:
            ConfigError: an index was built from values from which it cannot be built, such as NaN.
        """
        finished = self.finish(method)
        places = product(self.layers, range(len(self.cohorts)))
        check_indices([check for i, c in places for check in self.observer(method, i, c).state.checks])
        return sum(built.took.total for built in finished)

    def finish(self, method: int) -> list[Built]:
        """A method's indices of all layers and cohorts. On a GPU they may still be in progress; the GPU finishes them
        before anything that is queued later."""
        return [self.built(method, i, c) for i, c in product(self.layers, range(len(self.cohorts)))]

    def built(self, method: int, layer: int, cohort: int) -> Built:
        """One layer's index, built now unless it was built beside the prefill. A GPU finishes it before anything that
        is queued later; on the CPU this call waits until it is finished."""
        key = method, layer, cohort
        if key not in self._built:
            self._built[key] = Finished(partial(self._build, *key))
        return self._built[key].result()

    def observer(self, method: int, layer: int, cohort: int) -> Observer:
        """A method's observer of one cohort in one layer. Raises what the method's code raised while it observed."""
        observer = self.layers[layer].observers[method][cohort]
        if observer.fault is not None:
            raise observer.fault
        return observer

    def fork(self, method: int, *, spend: bool = False) -> LayeredCache:
        """A cache that continues from the prompt with one method and does not change the prompt. With ``spend`` the
        cache gets the method's own state and no copy of it, so that this method cannot be forked again: RuntimeError is
        raised."""
        if method in self._spent:
            raise RuntimeError("this method's state is spent: prefill again")
        if spend:
            self._spent.add(method)
        make = partial(self._cohorts_of, method, spend=spend)
        ours = {i: DecodeLayer(partial(make, i), layer.seen) for i, layer in self.layers.items()}
        link_layers(list(ours.values()))
        if self.beside is None:
            for layer in ours.values():
                layer.cohorts  # noqa: B018 - made here, so that the first step's time does not include it
        return self.cache(ours)

    def cache(self, ours: Mapping[int, CacheLayerMixin]) -> LayeredCache:
        """A cache of our layers and of copies of the sliding layers, which continue from the prompt."""
        layers = {**copy_sliding(self.sliding), **ours}
        return LayeredCache([layers[i] for i in range(len(layers))])

    @outlives_exit
    def cohort(
        self, method: int, layer: int, cohort: int, shared: Store | None = None, *, spend: bool = False
    ) -> Cohort:
        """A method with a finished index that serves one cohort of one layer, with its own copy of the state. It reads
        from ``shared`` if that is given and the method wants all rows as they are, and otherwise from a store of its
        own. With ``spend`` the state is not copied, and rows that no method will read again are dropped."""
        observer, built = self.observer(method, layer, cohort), self.built(method, layer, cohort)
        if built.stores and (spend or built.rows is not None):
            store = built.stores.pop()
        elif shared is not None and built.rows is None:
            store = shared
        else:
            store = self.store(layer, cohort, method).after_prefill(built.rows, self.methods[method].evicts)
        if spend and len(self.methods) == 1:
            self.layers[layer].release(observer.rows)
        state = observer.state if spend else copy.deepcopy(observer.state)
        return Cohort(observer.rows, store, state, self.methods[method], observer.clock)

    def over_one_store(self, layer: int, methods: Sequence[int]) -> tuple[Store, list[Cohort]]:
        """A store of all rows of the only cohort in one layer, and one cohort for each of these methods that reads from
        it. Methods that want only some rows, or want them in another order, get stores of their own."""
        own = {m: self.cohort(m, layer, 0) for m in methods if self.built(m, layer, 0).rows is not None}
        shared = self.store(layer, 0)  # made last, because only the youngest store of the prompt may write
        return shared, [own[m] if m in own else self.cohort(m, layer, 0, shared=shared) for m in methods]

    def store(self, layer: int, cohort: int, method: int | None = None) -> Store:
        """A store over the prompt of one cohort in one layer, laid out for a method's sinks and window."""
        rows = self.cohorts[cohort]
        prompt = self.layers[layer].columns - rows.padding
        split = None if method is None else partial(self.methods[method].split, prompt=prompt)
        return self.layers[layer].prompt(rows).store(split)

    @property
    def clock(self) -> Clock:
        """The clock for whole steps, which is the clock of the device on which the model begins and ends."""
        return clock_of(self.model.device, self.streams, named=self.named)

    def close(self) -> None:
        """End what runs in the background. Stores over this prompt cannot be used afterwards.

        Raises:
            OrderingError: a debugged link found transfers that nobody waited for.
        """
        try:
            if self.beside is not None:
                self.beside.close()
        finally:
            self.placement.close()

    def _cohorts_of(self, method: int, layer: int, *, spend: bool) -> list[Cohort]:
        """The cohorts of one layer, all served by one method."""
        return [self.cohort(method, layer, cohort, spend=spend) for cohort in range(len(self.cohorts))]

    @outlives_exit
    @torch.inference_mode()
    def _build(self, method: int, layer: int, cohort: int) -> Built:
        store, observer = self.store(layer, cohort, method), self.observer(method, layer, cohort)
        took, stores = observer.clock.spans("index"), []
        with took:
            rows = observer.state.finish_prefill(store)
            if rows is None or len(self.methods) == 1:
                stores.append(store.after_prefill(rows, self.methods[method].evicts))
                stores[0].usage.open()
        if self.streams is None:  # nothing is in progress, so the check does not have to wait
            check_indices(observer.state.checks)
        return Built(rows, took, stores)
