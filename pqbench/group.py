"""One method at work on sequences of one length in one layer: select, fetch, attend, merge, with its meters.

Sequences of a left-padded batch are grouped by length; a group holds no padding, so methods and stores never see any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.sinks import with_sinks
from pqbench.method import LayerState, Selection
from pqbench.store.base import Store

Clock = Callable[[], float]
PHASES = ("select", "fetch", "attend", "append")


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
    clock: Clock = time.perf_counter
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

    def answer(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """Write the method's own attention of the group's part of a block into ``output`` ``[B, H, G, n, D]``; see
        :meth:`observe` for the rest. Padding is left as it is."""
        columns, index, padding = q.shape[3], self.rows.index, self.rows.padding
        skipped = max(0, padding - (keys.shape[2] - columns))
        if skipped < columns:
            output[index, :, :, skipped:] = self.state.prefill(
                q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:]
            ).to(output.dtype)


@dataclass
class Meter:
    """Sums over the steps of one group in one layer; ``seconds`` by phase (:data:`PHASES`)."""

    steps: int = 0
    attended: float = 0.0  # tokens per KV head
    index_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

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
    clock: Clock = time.perf_counter
    meter: Meter = field(default_factory=Meter)

    def check(self, keys: Tensor, scaling: float) -> None:
        """Raises ModelError when a call of attention is not of the geometry that the prompt's calls had."""
        known = self.state.geometry
        if (keys.shape[1], keys.shape[3]) != (known.kv_heads, known.head_dim) or scaling != known.scaling:
            raise ModelError(f"layer {known.layer} calls attention with {keys.shape[1]} heads of width "
                             f"{keys.shape[3]} and scaling {scaling}, but for the prompt it was {known.kv_heads}, "
                             f"{known.head_dim} and {known.scaling}")  # fmt: skip

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new token ``[B, H, 1, D]`` and tell the method."""
        began = self.clock()
        self.store.append(keys, values)
        self.state.append(self.store)
        self.meter.seconds["append"] += self.clock() - began

    def attend(self, q: Tensor) -> Tensor:
        """One step: select, fetch, attend, merge. q and the result are ``[B, H, G, D]``."""
        began = self.clock()
        selection = self.state.select(q, self.store)
        self.meter.seconds["select"] += self.clock() - began
        self.meter.count(selection, self.store.length, self.state.index_bytes)
        return self.answer(q, selection)

    def answer(self, q: Tensor, selection: Selection) -> Tensor:
        """Attend to a selection and let an evicting method drop rows."""
        began = self.clock()
        keys, values, rows = self.store.fetch(selection.indices)
        fetched = self.clock()
        output, weights = self._attention(q, selection, keys, values, rows)
        attended = self.clock()
        dropped = self.state.attended(weights, self.store)
        if dropped is not None:
            self.store.drop(dropped)
        self.meter.seconds["fetch"] += fetched - began
        self.meter.seconds["attend"] += attended - fetched
        self.meter.seconds["append"] += self.clock() - attended
        return output

    def _attention(
        self, q: Tensor, selection: Selection, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention over fetched rows, merged with the residual; probabilities when the method wants them."""
        geometry = self.state.geometry
        if selection.key_shift is not None and geometry.inverse_frequencies is not None:
            if rows is not None:
                keys, values, rows = gather_rows(keys, rows), gather_rows(values, rows), None
            keys = reference.rotate(keys, selection.key_shift, geometry.inverse_frequencies)
        visible, added, residual = selection.visible, selection.log_weights, selection.residual
        wanted, sinks = self.state.needs_weights, geometry.sinks
        if rows is None and visible is None and added is None and residual is None and sinks is None and not wanted:
            return geometry.kernels.dense_attention(q, keys, values, geometry.scaling), None
        output, lse, weights = geometry.kernels.attention(
            q, keys, values, geometry.scaling, rows, visible, wanted, added
        )
        if residual is not None:
            log_weight = residual.log_weight + lse if residual.relative else residual.log_weight
            output = reference.merge(output, lse, residual.value, log_weight)
            lse = lse if sinks is None else torch.logaddexp(lse, log_weight)
        if sinks is not None:
            output, weights = with_sinks(output, lse, weights, sinks)
        return output, weights
