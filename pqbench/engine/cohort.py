"""One method that serves one cohort in one layer: it selects, fetches, attends and merges, and its meters count.

A cohort consists of the sequences of a left-padded batch that have the same length. It has no padding, so methods and
stores never see any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.engine.arguments import outlives_exit
from pqbench.engine.clock import Clock, HostClock, Spans
from pqbench.engine.contract import Contract
from pqbench.engine.meter import Meter
from pqbench.engine.reads import KeyReads
from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.sinks import with_sinks
from pqbench.method import LayerState, Method, Plan, Selection
from pqbench.store.base import Store


@dataclass(frozen=True)
class Rows:
    """The sequences of one length within a left-padded batch: their rows in the batch and the columns of padding."""

    index: Tensor | slice
    padding: int
    count: int


@dataclass
class Observer:
    """One method's state for one cohort during prefill, and a timer for the method's own work.

    Attributes:
        rows: the sequences of the cohort.
        state: the method's state in this layer.
        clock: times the method's work.
        fault: what the method's code raised while it observed. Other methods share the prefill, so that it goes on;
            :meth:`pqbench.engine.prefilled.Prefilled.observer` raises it.
    """

    rows: Rows
    state: LayerState
    clock: Clock = field(default_factory=HostClock)
    fault: Exception | None = None

    def __post_init__(self) -> None:
        self._spans = self.clock.spans("observe")

    @property
    def seconds(self) -> float:
        """Seconds that :meth:`observe` took so far. Waits for the device."""
        return self._spans.total

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Show the state the cohort's part of a block, until its code fails. q ``[B, H, G, n, D]`` holds the block's
        queries of all sequences; keys and values ``[B, H, S, D]`` hold all tokens so far, of all sequences."""
        if self.fault is not None:
            return
        try:
            self._observe(q, keys, values)
        except Exception as error:  # noqa: BLE001 - the fault of this method, and of no other
            self.fault = error

    @outlives_exit
    def _observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        columns = q.shape[3]
        skipped = max(0, self.rows.padding - (keys.shape[2] - columns))  # padding columns inside this block
        if skipped >= columns:
            return
        index, padding = self.rows.index, self.rows.padding
        with self._spans:
            self.state.observe(q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:])

    @outlives_exit
    def answer(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """Compute the cohort's part of a block by the method's own attention and write it into ``output``
        ``[B, H, G, n, D]``. The other arguments are those of :meth:`observe`. The output at padding is not changed."""
        columns, index, padding = q.shape[3], self.rows.index, self.rows.padding
        skipped = max(0, padding - (keys.shape[2] - columns))
        if skipped < columns:
            output[index, :, :, skipped:] = self.state.prefill(
                q[index, :, :, skipped:], keys[index, :, padding:], values[index, :, padding:]
            ).to(output.dtype)


@dataclass
class Cohort:
    """A method that serves one cohort in one layer.

    Attributes:
        rows: the sequences of the batch that belong to the cohort.
        store: where their keys and values lie.
        state: what the method knows of the layer.
        method: the method itself. Its selections must keep its limit.
        length: the number of rows held, int32 with one element on the device. It is set only for captured steps.
    """

    rows: Rows
    store: Store
    state: LayerState
    method: Method
    clock: Clock = field(default_factory=HostClock)
    length: Tensor | None = None

    def __post_init__(self) -> None:
        self.meter = Meter(self.clock)
        self.contract = Contract(self.method, self.state.geometry)
        self.checking = Spans(self.clock)  # the seconds that the check of the first step takes
        self.reads = KeyReads(self.store.usage, self.state.geometry.prompt)
        self._row_bytes = 1  # of the keys of one token, known once there is one

    def check(self, keys: Tensor, scaling: float) -> None:
        """Raises ModelError when an attention call differs from the prompt's calls in KV heads, head width or
        scaling."""
        known = self.state.geometry
        if (keys.shape[1], keys.shape[3]) != (known.kv_heads, known.head_dim) or scaling != known.scaling:
            raise ModelError(
                f"layer {known.layer} calls attention with {keys.shape[1]} heads of width "
                f"{keys.shape[3]} and scaling {scaling}, but for the prompt it was {known.kv_heads}, "
                f"{known.head_dim} and {known.scaling}"
            )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Begin a step: store the keys and values of the new token, each ``[B, H, 1, D]``, and tell the method."""
        self.meter.begin()
        self._row_bytes = keys.nbytes
        with self.meter.phase("append"):
            self.store.append(keys, values)
            self.update()

    @outlives_exit
    def update(self) -> None:
        """Tell the method that the token of the step was stored."""
        self.state.append(self.store)

    @outlives_exit
    def prefetch(self) -> None:
        """Let the method ask for what it will need, since the layer before starts its step."""
        self.state.prefetch(self.store)

    @outlives_exit
    def select(self, q: Tensor) -> Selection:
        """The method's selection for the query ``[B, H, G, D]``."""
        return self.reads.selecting(lambda: self.state.select(q, self.store))

    @outlives_exit
    def reserve(self, rows: int) -> bool:
        """See :meth:`pqbench.method.LayerState.reserve`."""
        return self.state.reserve(self.store, rows)

    @outlives_exit
    def plan(self) -> Plan:
        """The method's part of the captured step that follows, on the host."""
        return self.state.plan(self.store, self.store.length + 1)

    @outlives_exit
    def attend(self, q: Tensor) -> Tensor:
        """Do the rest of the step: select, fetch, attend and merge. q and the result are ``[B, H, G, D]``.

        Raises:
            SelectionError: the first step's selection breaks the method's contract.
        """
        with self.meter.phase("select"):
            selection = self.select(q)
        read = self.reads.step(self._row_bytes)  # Keys that a method reads are part of its index, declared or not.
        if not self.meter.steps:
            with self.checking:
                self.contract.check(selection, self.store)
        limit = None if selection.visible is None else self.method.limit(self.store.seen, self.state.geometry)
        self.meter.count(selection, self.store.length, self.state.index_bytes + read, limit)
        return self.answer(q, selection)

    @outlives_exit
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
        """Do the part of :meth:`attend` that runs on the device alone, so that a CUDA graph can repeat it."""
        selection = self.select(q)
        keys, values, rows = self.store.fetch(selection.indices, selection.count, selection.anew)
        return self._attention(q, selection, keys, values, rows)[0]

    @outlives_exit
    def replayed(self, plan: Plan) -> None:
        """Count a step that a CUDA graph has replayed."""
        held = self.store.length
        attended = held if plan.attended is None else plan.attended
        self.meter.replayed(attended, held, self.state.index_bytes + self.reads.step(self._row_bytes, repeats=True))

    @outlives_exit
    def check_steps(self, excess: int) -> None:
        """Compare every step so far with the budget. ``excess`` is the largest element of :attr:`Meter.excess`, or 0
        where that is None.

        Raises:
            SelectionError: a step attended to more tokens than the method's limit.
        """
        self.contract.check_steps(self.meter.counts, self.meter.held, excess, self.store.seen)

    def _attention(
        self, q: Tensor, selection: Selection, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention over fetched rows, merged with the selection's residual, and the attention probabilities;
        these are None unless the method needs them."""
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


def check_cohorts(cohorts: Sequence[Cohort]) -> None:
    """Compare every step of a decode with the budget, once the decode is over. Waits for the device once, and only when
    a number of attended tokens is known to the device alone.

    Raises:
        SelectionError: a step attended to more tokens than its method's limit; the message names method, layer and
            step.
    """
    counted = [beyond.max() for cohort in cohorts if (beyond := cohort.meter.excess) is not None]
    told = iter(torch.stack([most.to(counted[0].device) for most in counted]).tolist() if counted else ())
    for cohort in cohorts:
        cohort.check_steps(0 if cohort.meter.excess is None else next(told))
