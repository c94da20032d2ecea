"""One layer with a long context, the methods and dense kernels that run on it, and the turns in which they are
timed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pqbench.engine.arguments import outlives_exit
from pqbench.engine.batch import check_indices
from pqbench.engine.clock import Spans, clock_of, streams_of
from pqbench.engine.cohort import Cohort, Rows, check_cohorts
from pqbench.engine.dense import Dense
from pqbench.engine.meter import PHASES
from pqbench.engine.setting import Setting
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.measure.dense import DenseGeometry, DenseKernel
from pqbench.measure.geometries import Shape
from pqbench.measure.layer.captured import CapturedSteps
from pqbench.measure.machine import Sweeper, clock, undisturbed
from pqbench.measure.source import Source, on
from pqbench.method import Geometry, LayerState, Method
from pqbench.store.tiers import Placement, Tier

OBSERVED = 64  # number of last prompt queries shown to methods that observe the prefill
SLOW = 1.0  # seconds
_LOGITS = 1 << 28  # largest number of logits of one observed block


class Layer:
    """Keys and values of ``context`` tokens in one layer, filled block by block, with room for ``steps`` more.

    Every method reads the same rows. Stores of a device tier share them and write the same decoded tokens into the same
    free space, so that memory holds the rows once. A host tier keeps one copy per method.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        context: int,
        steps: int,
        source: Source,
        device: torch.device,
        setting: Setting,
    ) -> None:
        self.shape, self.dtype, self.context, self.steps = shape, dtype, context, steps
        self.device, self.setting, self.now = device, setting, clock(device)
        self.clock = clock_of(device, streams_of(device, setting.streams), every=1)
        self.source = on(source, device)
        like = torch.empty(1, shape.kv_heads, 0, shape.head_dim, dtype=dtype, device=device)
        self.keys = GrowingBuffer.like(like, context + steps)
        self.values = GrowingBuffer.like(like, context + steps)
        for start in range(0, context, source.rows):
            keys, values = self.source.block(start // source.rows, min(source.rows, context - start))
            self.keys.append(keys.to(dtype))
            self.values.append(values.to(dtype))
        self.decoded = tuple(rows.to(dtype) for rows in self.source.decoded(steps))

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return self.context * self.shape.row_bytes(self.dtype)

    def observe(self, state: LayerState) -> None:
        """Show a state the last :data:`OBSERVED` prompt queries. Showing all queries would take time quadratic in the
        context."""
        count = min(OBSERVED, self.context)
        q = self.source.last_queries(count).to(self.dtype)
        width = self.shape.query_heads * self.context
        block = max(1, min(count, _LOGITS // width))
        for start in range(0, count, block):
            end = self.context - count + min(start + block, count)
            state.observe(q[:, :, :, start : start + block], self.keys.view(stop=end), self.values.view(stop=end))

    def token(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key and value, each ``[1, H, 1, D]``, and query ``[1, H, G, D]`` of a decoded token."""
        keys, values, queries = self.decoded
        return keys[:, :, step : step + 1], values[:, :, step : step + 1], queries[:, :, :, step]


def geometry_of(
    shape: Shape, context: int, device: torch.device, setting: Setting, dense: DenseKernel | None = None
) -> Geometry:
    """The geometry of a layer of this shape, as in decoding. If ``dense`` is given, that kernel computes full
    attention."""
    return DenseGeometry(
        layer=0,
        batch=1,
        kv_heads=shape.kv_heads,
        group=shape.group,
        head_dim=shape.head_dim,
        scaling=shape.head_dim**-0.5,
        prompt=context,
        inverse_frequencies=shape.frequencies(device),
        backend=setting.backend,
        device=device,
        calibration=setting.calibration,
        dense=dense,
        correction=setting.correction if setting.select_ahead else None,
    )


@dataclass
class Subject:
    """A method, or full attention by one dense kernel, in one layer. ``steps`` holds the seconds of each timed step by
    phase and in total. ``tier`` is where its rows lie; None for the tier of the setting."""

    name: str
    kernel: str
    budget: str
    method: Method | None = None
    dense: DenseKernel | None = None
    tier: Tier | None = None
    cohort: Cohort | None = None
    placement: Placement | None = None
    build_s: float = 0.0
    observe_s: float = 0.0
    warmup_s: float = 0.0
    error: Exception | None = None
    steps: list[dict[str, float]] = field(default_factory=list)
    attended: float = 0.0  # tokens per KV head over the timed steps
    index_bytes: int = 0  # read over the timed steps
    captured: CapturedSteps | None = None  # set if the setting asks for graphs, as soon as steps can be captured

    @property
    def slow(self) -> bool:
        """Whether a step takes so long that the turns of one round are enough."""
        return bool(self.steps) and min(step["total"] for step in self.steps) > SLOW

    def build(self, layer: Layer) -> Cohort:
        """Build the state and its index, time both, and make everything ready for the first step."""
        geometry = geometry_of(layer.shape, layer.context, layer.device, layer.setting, self.dense)
        method = Dense() if self.method is None else self.method
        state = method.layer(geometry)
        self.close()
        if self.dense is not None:
            self.dense.check(layer.token(0)[2], layer.keys.view(), layer.values.view(), geometry.scaling)
        tier = layer.setting.tier if self.tier is None else self.tier
        placement = self.placement = tier.open(layer.device, layer.setting.backend)
        store = placement.prompt(layer.keys.fork(), layer.values.fork()).store(
            lambda length: method.split(length, layer.context)
        )
        store.settle()
        began = layer.now()
        layer.observe(state)
        observed = layer.now()
        rows = state.finish_prefill(store)
        store = store.after_prefill(rows, method.evicts)
        self.observe_s, self.build_s = observed - began, layer.now() - observed
        check_indices(state.checks)
        self.cohort, self.captured = Cohort(Rows(slice(None), 0, 1), store, state, method, layer.clock), None
        return self.cohort

    def close(self) -> None:
        """Drop the layer's rows, and close the link if there is one."""
        cohort, placement, self.cohort, self.placement = self.cohort, self.placement, None, None
        self.captured = None
        if cohort is not None:
            cohort.store.settle()
        if placement is not None:
            placement.close()

    def step(self, layer: Layer, number: int, layer_before: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Do one decode step, exactly as in decoding, and return its seconds by phase and in total. It begins when the
        device is idle, so that the time in which the host queues the work is included.

        ``layer_before`` takes the place of the previous layer and is not timed. Data that the method requests in
        advance may arrive during this time. The request itself is timed as part of the selection. A replayed step only
        has a total.
        """
        if self.cohort is None:
            raise RuntimeError("step() before build()")
        captures = layer.setting.graphs and (self.dense is None or self.dense.captured)
        if captures and self.captured is None and self.cohort.meter.steps:
            self.captured = CapturedSteps.of(self.cohort, layer.context + layer.steps, layer.token(number))
        if self.captured is not None:
            return self._replay(self.captured, layer, number, layer_before)
        key, value, q = layer.token(number)
        asking, whole, before = Spans(layer.clock), Spans(layer.clock), self.cohort.meter.seconds
        with self._chosen(), undisturbed():
            layer.now()
            with asking:
                self.cohort.prefetch()
            layer_before()
            layer.now()
            with whole:
                self.cohort.append(key, value)
                self.cohort.attend(q)
            first = self.cohort.checking.total if self.cohort.meter.steps == 1 else 0.0  # the check is not counted
            asked, total = asking.total, whole.total - first
        phases = {phase: self.cohort.meter.seconds[phase] - before[phase] for phase in PHASES}
        return phases | {"select": phases["select"] + asked, "total": total + asked}

    def _replay(
        self, captured: CapturedSteps, layer: Layer, number: int, layer_before: Callable[[], None]
    ) -> dict[str, float]:
        captured.place(layer.token(number))
        whole = Spans(layer.clock)
        with undisturbed():
            layer_before()
            layer.now()
            with whole:
                captured.step()
            return {"total": whole.total}

    def _chosen(self) -> AbstractContextManager[None]:
        """The context in which a dense kernel computes. It is entered before the clock starts."""
        return nullcontext() if self.dense is None else self.dense.chosen()

    def take_turn(self, layer: Layer, number: int, layer_before: Callable[[], None] = lambda: None) -> None:
        """Do one step and count it."""
        if self.cohort is None:
            raise RuntimeError("take_turn() before build()")
        meter = self.cohort.meter
        attended, index_bytes = meter.attended, meter.index_bytes
        self.steps.append(self.step(layer, number, layer_before))
        self.attended += meter.attended - attended
        self.index_bytes += meter.index_bytes - index_bytes


@torch.inference_mode()
def take_turns(
    subjects: Sequence[Subject],
    layer: Layer,
    small: Layer,
    repeats: int,
    steps: int,
    warmup: int,
    sweeper: Sweeper,
    seed: int = 0,
    follow: Callable[[str], None] = lambda _: None,
) -> None:
    """Rehearse every subject on a ``small`` layer, where kernels are compiled. Then build it on the real layer and time
    it.

    Subjects take turns step by step, so that a change of the machine's speed affects all of them equally. Each of the
    ``repeats`` rounds of ``steps`` steps has an order of its own. A slow subject takes part only in the first round.
    After all turns, every step of each subject is compared with its budget. A subject that fails keeps its error, and
    the others continue.

    Raises:
        DeviceError: the GPU no longer answers after the error of a subject. The subject keeps its error.
    """
    for subject in subjects:
        follow(f"{subject.name}: building its index")
        _guarded(subject, layer, partial(_prepare, subject, layer, small, warmup))
    order = random.Random(seed)
    for repeat in range(repeats):
        follow(f"round {repeat + 1} of {repeats}")
        present = order.sample(list(subjects), len(subjects))
        for step in range(steps):
            for subject in [subject for subject in present if subject.error is None and not (repeat and subject.slow)]:
                number = warmup + repeat * steps + step
                _guarded(subject, layer, partial(subject.take_turn, layer, number, sweeper.sweep))
    for subject in subjects:
        if subject.cohort is not None:
            _guarded(subject, layer, partial(check_cohorts, [subject.cohort]))


def _prepare(subject: Subject, layer: Layer, small: Layer, warmup: int) -> None:
    began = layer.now()
    subject.build(small)
    subject.step(small, 0)
    rehearsed = layer.now() - began
    subject.build(layer)
    began = layer.now()
    for number in range(warmup):
        subject.step(layer, number)
    subject.warmup_s = rehearsed + layer.now() - began


def _guarded(subject: Subject, layer: Layer, work: Callable[[], None]) -> None:
    try:
        outlives_exit(work)()
    except Exception as error:  # noqa: BLE001 - any failure of one subject becomes its row, the others continue
        subject.error, subject.cohort = error, None
        layer.setting.check_device(error)
