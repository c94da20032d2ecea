"""The caches handed to transformers: one kind of layer per phase, so a phase is never inferred from shapes.

:class:`PrefillLayer` keeps the whole prompt and computes dense attention; :class:`DecodeLayer` answers one query per
sequence through a method. Sequences of a left-padded batch are grouped by length; a group holds no padding, so methods
and stores never see any.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from pqbench.attention import dense_prefill
from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.method import LayerState, Selection
from pqbench.store.base import Store
from pqbench.store.device import DeviceStore


class LayeredCache(Cache):
    """A transformers cache that knows which of its layers are ours; passed to the model also as the keyword ``kv``."""

    def __init__(self, layers: list[CacheLayerMixin]) -> None:
        super().__init__(layers=layers)
        self.selective: dict[int, Any] = {i: layer for i, layer in enumerate(layers) if hasattr(layer, "attention")}


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of every layer. Raises ModelError for a type that is neither full nor sliding attention."""
    types, _ = get_layer_types_and_kwargs(config)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"the model has layers of type {', '.join(unknown)}; pqbench serves full and sliding attention"
        )
    return types


def sliding_layers(config: PreTrainedConfig) -> dict[int, CacheLayerMixin]:
    """Transformers' own cache layers for the layers that methods leave alone."""
    types, options = get_layer_types_and_kwargs(config)
    return {i: DynamicSlidingWindowLayer(**options[i]) for i, kind in enumerate(types) if kind == "sliding_attention"}


class OurLayer(CacheLayerMixin):
    """What transformers asks of a cache layer; eviction is invisible to it, positions count all tokens seen."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Rows:
    """Sequences of one length within a left-padded batch: their rows in the batch, and how many columns are padding."""

    index: Tensor | slice
    padding: int
    count: int


@dataclass
class Observer:
    """One method's state for one group during prefill, with the time its own work takes."""

    rows: Rows
    state: LayerState
    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Pass the group's part of a block on: q ``[B, H, G, n, D]`` of all sequences, keys ``[B, H, S, D]`` so far."""
        columns = q.shape[3]
        skipped = max(0, self.rows.padding - (keys.shape[2] - columns))  # padding columns inside this block
        if skipped >= columns:
            return
        began = self.clock()
        index, padding = self.rows.index, self.rows.padding
        self.state.observe(q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:])
        self.seconds += self.clock() - began


class PrefillLayer(OurLayer):
    """Holds the prompt's keys and values, answers with dense attention and shows each block to the observers."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.observers: list[Observer] = []
        self.buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None
        self._parts: dict[int, tuple[GrowingBuffer, GrowingBuffer]] = {}  # padding -> the group's rows
        self._leases: dict[int, list[DeviceStore]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.buffers = (
                GrowingBuffer.like(key_states, self.capacity),
                GrowingBuffer.like(value_states, self.capacity),
            )
        keys, values = self.buffers
        keys.append(key_states)
        values.append(value_states)
        self.seen += key_states.shape[2]
        return keys.view(), values.view()

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Dense causal attention of a block, ``[B, n, Hq, D]``."""
        output = dense_prefill(module, q, k, v, mask, scaling)
        batch, heads, columns, width = q.shape
        grouped = q.view(batch, k.shape[1], heads // k.shape[1], columns, width)  # [B, H, G, n, D]
        for observer in self.observers:
            observer.observe(grouped, k, v)
        return output

    def store(self, rows: Rows) -> DeviceStore:
        """A store over the finished prompt of one group; shares memory when the group is the whole batch."""
        if self.buffers is None:
            raise RuntimeError("store() before any token was prefilled")
        if rows.padding not in self._parts:
            keys, values = self.buffers
            self._parts[rows.padding] = keys.rows(rows.index, rows.padding), values.rows(rows.index, rows.padding)
        keys, values = self._parts[rows.padding]
        return DeviceStore(keys.fork(), values.fork(), self._leases.setdefault(rows.padding, []))


@dataclass
class Meter:
    """Sums over the steps of one group in one layer."""

    steps: int = 0
    attended: float = 0.0  # tokens per KV head
    index_bytes: int = 0

    def count(self, selection: Selection, held: int, index_bytes: int) -> None:
        """Add one step. Rows that no query head of a KV head sees are padding and not counted."""
        self.steps += 1
        self.index_bytes += index_bytes
        if selection.visible is not None:
            self.attended += float(selection.visible.any(2).sum(-1).float().mean())
        else:
            self.attended += held if selection.indices is None else selection.indices.shape[2]


@dataclass
class Group:
    """A method at work on the sequences of one group in one layer."""

    rows: Rows
    store: Store
    state: LayerState
    meter: Meter = field(default_factory=Meter)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new token ``[B, H, 1, D]`` and tell the method."""
        self.store.append(keys, values)
        self.state.append(self.store)

    def attend(self, q: Tensor) -> Tensor:
        """One step: select, fetch, attend, merge. q and the result are ``[B, H, G, D]``."""
        selection = self.state.select(q, self.store)
        self.meter.count(selection, self.store.length, self.state.index_bytes)
        return self.answer(q, selection)

    def answer(self, q: Tensor, selection: Selection) -> Tensor:
        """Attend to a selection and let an evicting method drop rows."""
        output, weights = self.attention(q, selection)
        dropped = self.state.attended(weights, self.store)
        if dropped is not None:
            self.store.drop(dropped)
        return output

    def attention(self, q: Tensor, selection: Selection) -> tuple[Tensor, Tensor | None]:
        """Exact attention over a selection, merged with its residual; probabilities when the method wants them."""
        scaling, frequencies = self.state.geometry.scaling, self.state.geometry.inverse_frequencies
        keys, values, rows = self.store.fetch(selection.indices)
        if selection.key_shift is not None and frequencies is not None:
            if rows is not None:
                keys, values, rows = gather_rows(keys, rows), gather_rows(values, rows), None
            keys = reference.rotate(keys, selection.key_shift, frequencies)
        visible, wanted, body = selection.visible, self.state.needs_weights, self.state.geometry.kernels
        if rows is None and visible is None and selection.residual is None and not wanted:
            return body.dense_attention(q, keys, values, scaling), None
        output, lse, weights = body.attention(q, keys, values, scaling, rows, visible, wanted)
        if selection.residual is not None:
            residual = selection.residual
            log_weight = residual.log_weight + lse if residual.relative else residual.log_weight
            output = reference.merge(output, lse, residual.value, log_weight)
        return output, weights


class DecodeLayer(OurLayer):
    """One new token per sequence: stored, then answered group by group."""

    def __init__(self, groups: list[Group], seen: int) -> None:
        super().__init__()
        self.groups = groups
        self.seen = seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for group in self.groups:
            group.append(key_states[group.rows.index], value_states[group.rows.index])
        self.seen += 1
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of one query per sequence, ``[B, 1, Hq, D]``; the mask is implied by the groups."""
        batch, heads, _, width = q.shape
        grouped = q.view(batch, k.shape[1], heads // k.shape[1], width)  # [B, H, G, D]
        if len(self.groups) == 1:
            return self.groups[0].attend(grouped).reshape(batch, 1, heads, width)
        output = torch.empty_like(grouped)
        for group in self.groups:
            output[group.rows.index] = group.attend(grouped[group.rows.index])
        return output.reshape(batch, 1, heads, width)


def copy_sliding(layers: dict[int, CacheLayerMixin]) -> dict[int, CacheLayerMixin]:
    """Sliding layers that can go on from here without changing the originals (their updates replace tensors)."""
    return {i: copy.copy(layer) for i, layer in layers.items()}
