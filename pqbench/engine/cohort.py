"""One method at work on sequences of one length in one layer: select, fetch, attend, merge, with its meters.

Sequences of a left-padded batch are grouped by length; a group holds no padding, so methods and stores never see any.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.engine.clock import Clock, HostClock
from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.sinks import with_sinks
from pqbench.method import LayerState, Plan, Selection
from pqbench.store.base import Store

PHASES = ("select", "fetch", "attend", "append")
_UNTIMED = nullcontext()


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
    clock: Clock = field(default_factory=HostClock)

    def __post_init__(self) -> None:
        self._spans = self.clock.spans("observe")

    @property
    def seconds(self) -> float:
        """What :meth:`observe` took so far. Waits for the device."""
        return self._spans.total

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Pass the group's part of a block on: q ``[B, H, G, n, D]`` of all sequences, keys ``[B, H, S, D]`` so far."""
        columns = q.shape[3]
        skipped = max(0, self.rows.padding - (keys.shape[2] - columns))  # padding columns inside this block
        if skipped >= columns:
            return
        index, padding = self.rows.index, self.rows.padding
        with self._spans:
            self.state.observe(q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:])

    def answer(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """Write the method's own attention of the group's part of a block into ``output`` ``[B, H, G, n, D]``; see
        :meth:`observe` for the rest. Padding is left as it is."""
        columns, index, padding = q.shape[3], self.rows.index, self.rows.padding
        skipped = max(0, padding - (keys.shape[2] - columns))
        if skipped < columns:
            output[index, :, :, skipped:] = self.state.prefill(
                q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:]
            ).to(output.dtype)


class Meter:
    """Sums over the steps of one group in one layer. Nothing here waits for the device before a sum is asked for.

    Attributes:
        steps: how many there were.
        timed: those among them whose phases were timed, see :meth:`pqbench.engine.clock.Clock.samples`.
        index_bytes: bytes of the index that all steps read: those that the methods declare, and the keys that their
            selections read through the store.
    """

    def __init__(self, clock: Clock) -> None:
        self.steps = self.timed = self.index_bytes = 0
        self._clock, self._sampled = clock, False
        self._attended = 0.0
        self._ragged: Tensor | None = None  # float64 [], tokens of selections whose size only the device knows
        self._phases = {phase: clock.spans(phase) for phase in PHASES}

    def begin(self) -> None:
        """A step begins."""
        self._sampled = self._clock.samples(self.steps)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what is inside as a phase of the step, if the step is one of those that are timed."""
        return self._phases[name] if self._sampled else _UNTIMED

    def count(self, selection: Selection, held: int, index_bytes: int) -> None:
        """Add one step. Rows that no query head of a KV head sees are padding and not counted."""
        self.steps += 1
        self.timed += self._sampled
        self.index_bytes += index_bytes
        if selection.visible is not None:
            seen = selection.visible.any(2).sum(-1).float().mean().double()
            self._ragged = seen if self._ragged is None else self._ragged + seen
        else:
            self._attended += held if selection.indices is None else selection.indices.shape[2]

    def replayed(self, attended: int, index_bytes: int) -> None:
        """Add one step that a graph has done, whose phases nobody can time."""
        self.steps += 1
        self.index_bytes += index_bytes
        self._attended += attended

    @property
    def attended(self) -> float:
        """Tokens per KV head attended to, all steps together. Waits for the device where it counts them."""
        return self._attended + (0.0 if self._ragged is None else float(self._ragged))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the timed steps by phase (:data:`PHASES`). Waits for the device."""
        return {phase: spans.total for phase, spans in self._phases.items()}


@dataclass
class Group:
    """A method at work on the sequences of one group in one layer."""

    rows: Rows
    store: Store
    state: LayerState
    clock: Clock = field(default_factory=HostClock)
    length: Tensor | None = None  # with a captured step: rows held, int32 with one element on the device

    def __post_init__(self) -> None:
        self.meter = Meter(self.clock)
        self._captured_read = 0  # bytes of keys that the captured selection reads in every replay

    def check(self, keys: Tensor, scaling: float) -> None:
        """Raises ModelError when a call of attention is not of the geometry that the prompt's calls had."""
        known = self.state.geometry
        if (keys.shape[1], keys.shape[3]) != (known.kv_heads, known.head_dim) or scaling != known.scaling:
            raise ModelError(
                f"layer {known.layer} calls attention with {keys.shape[1]} heads of width "
                f"{keys.shape[3]} and scaling {scaling}, but for the prompt it was {known.kv_heads}, "
                f"{known.head_dim} and {known.scaling}"
            )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the new token ``[B, H, 1, D]`` and tell the method: a step begins."""
        self.meter.begin()
        with self.meter.phase("append"):
            self.store.append(keys, values)
            self.state.append(self.store)

    def attend(self, q: Tensor) -> Tensor:
        """The rest of the step: select, fetch, attend, merge. q and the result are ``[B, H, G, D]``."""
        usage = self.store.usage
        before = usage.key_bytes_read
        with self.meter.phase("select"):
            selection = self.state.select(q, self.store)
        read = usage.key_bytes_read - before  # keys that a selection reads are part of its index, declared or not
        self.meter.count(selection, self.store.length, self.state.index_bytes + read)
        return self.answer(q, selection)

    def answer(self, q: Tensor, selection: Selection) -> Tensor:
        """Attend to a selection and let an evicting method drop rows."""
        with self.meter.phase("fetch"):
            keys, values, rows = self.store.fetch(selection.indices, anew=selection.anew)
        with self.meter.phase("attend"):
            output, weights = self._attention(q, selection, keys, values, rows)
        with self.meter.phase("append"):
            dropped = self.state.attended(weights, self.store)
            if dropped is not None:
                self.store.drop(dropped)
        return output

    def attend_captured(self, q: Tensor) -> Tensor:
        """:meth:`attend` without its host part: work of the device alone, which a CUDA graph can repeat."""
        usage = self.store.usage
        before = usage.key_bytes_read
        selection = self.state.select(q, self.store)
        self._captured_read = usage.key_bytes_read - before
        keys, values, rows = self.store.fetch(selection.indices, selection.count, selection.anew)
        return self._attention(q, selection, keys, values, rows)[0]

    def replayed(self, plan: Plan) -> None:
        """Count a step that a CUDA graph has done."""
        attended = self.store.length if plan.attended is None else plan.attended
        self.meter.replayed(attended, self.state.index_bytes + self._captured_read)

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
        count = self.length if selection.count is None else selection.count
        if rows is None and visible is None and added is None and residual is None and sinks is None and not wanted:
            return geometry.kernels.dense_attention(q, keys, values, geometry.scaling, count), None
        output, lse, weights = geometry.kernels.attention(
            q, keys, values, geometry.scaling, rows, visible, wanted, added, count
        )
        if residual is not None:
            log_weight = residual.log_weight + lse if residual.relative else residual.log_weight
            output = reference.merge(output, lse, residual.value, log_weight)
            lse = lse if sinks is None else torch.logaddexp(lse, log_weight)
        if sinks is not None:
            output, weights = with_sinks(output, lse, weights, sinks)
        return output, weights
