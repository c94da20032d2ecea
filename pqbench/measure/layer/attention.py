"""``benchmark=attention``: seconds of one layer's decode step, phase by phase, at any length and shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pqbench.benchmarks.grid import whole
from pqbench.engine.meter import PHASES
from pqbench.errors import ConfigError, DeviceError, ModelError, RoomError
from pqbench.kernels.backend import Kernels, kernels
from pqbench.measure.base import Job, Ledger, Measured, Measurement, at_least, tracked
from pqbench.measure.budgets import budgets_of, dtypes_of, selects, with_budget
from pqbench.measure.checks import attended_all
from pqbench.measure.dense import RefusedError, backend_name, captured_kernel, dense_kernels
from pqbench.measure.geometries import Shape, shape_of
from pqbench.measure.layer.captured import STEPS as CAPTURING
from pqbench.measure.layer.turns import Layer, Subject, geometry_of, take_turns
from pqbench.measure.machine import (
    Bandwidth,
    Sweeper,
    bandwidth,
    device_name,
    forget_peak,
    peak_device,
    peak_rss,
    spread,
)
from pqbench.measure.source import Source, captured, synthetic
from pqbench.method import Method
from pqbench.models.devices import available_bytes, check_device, check_kernels
from pqbench.models.sources import torch_dtype
from pqbench.records.file import Record
from pqbench.records.kinds import ATTENTION, DENSE
from pqbench.store.tiers import DeviceTier

SMALL = 2048  # tokens of the small layer on which kernels are compiled
SLACK = 1.2  # memory that a layer may need, as a multiple of the bytes of its keys and values


@dataclass(frozen=True)
class Condition:
    """One condition of the timing. In it, every method with one budget and all dense kernels are timed in turns."""

    dtype: str
    context: int
    budget: float | int


@dataclass
class Attention(Measurement):
    """Times one attention layer with a long context: building the index, and select, fetch, attend and append of each
    decode step.

    The layer is built alone, directly in a store, so that a layer of an 8B model with a million tokens fits a laptop.
    Methods run through the same code as in decoding. Full attention is timed with every dense kernel, as rows of the
    method ``full``. If a kernel does not run on this machine, its row gives the reason. On a GPU these rows read KV on
    the device, whatever ``store`` says. Methods that observe the prefill see only its last 64 queries.

    Attributes:
        geometry: shape of the layer, see :mod:`pqbench.measure.geometries`.
        contexts: prompt lengths in tokens.
        budgets: numbers of tokens (2 or more) or shares of the context (at most 1), in place of the methods' own
            budgets.
        dtypes: dtypes of keys and values: float32, bfloat16 or float16.
        repeats: number of rounds; every method has its turns in each round.
        steps: number of decode steps per round, taken in turns.
        warmup: number of steps before the first round that are not counted.
        keys: ``real`` repeats the keys that the configured model computes for prose; ``random`` draws clustered keys.
        seed: seed of the keys and of the order of turns.
        sweep_mb: MB overwritten before each step, so that CPU caches hold nothing of the layer, as in a model with many
            layers; 0 leaves the caches warm. What a method requests one layer ahead (codes in host memory) crosses the
            link during this time.
        device: the device to run on; null for the model's device, or for the CPU if there is no model.

    Raises:
        ConfigError: a value that cannot work; the message names the field.
    """

    name: ClassVar[str] = "attention"
    kind: ClassVar[str] = ATTENTION
    further: ClassVar[tuple[str, ...]] = (DENSE,)

    geometry: str = "llama31_8b"
    contexts: Sequence[int] = (4096, 32768)
    budgets: Sequence[float] = (0.1,)
    dtypes: Sequence[str] = ("float32",)
    repeats: int = 5
    steps: int = 4
    warmup: int = 2
    keys: str = "random"
    seed: int = 0
    sweep_mb: int = 64
    device: str | None = None

    def __post_init__(self) -> None:
        self.shape: Shape = shape_of(self.geometry)
        self.contexts = whole("contexts", self.contexts)
        self.budgets = budgets_of(self.budgets)
        self.dtypes = dtypes_of(self.dtypes)
        for field, least in (("repeats", 1), ("steps", 1), ("warmup", 0), ("sweep_mb", 0), ("seed", 0)):
            at_least(field, getattr(self, field), least)
        if self.keys not in ("real", "random"):
            raise ConfigError(f"benchmark.keys is {self.keys!r}: use real or random")
        if self.device is not None:
            check_device(self.device)

    @property
    def needs_model(self) -> bool:
        return self.keys == "real"

    def subject(self, model: str) -> str:
        return self.geometry

    def measure(self, job: Job) -> Measured:
        """See the base class. Full attention is always measured together with the methods, but only recorded when
        ``job.files`` has a file for it.

        Raises:
            ConfigError: a method cannot have one of the budgets.
        """
        device = self._device(job)
        check_kernels(job.setting.backend, device)
        conditions = [Condition(d, c, b) for d in self.dtypes for c in self.contexts for b in self.budgets]
        backend = kernels(device, job.setting.backend)
        backend.use_threads(torch.get_num_threads())
        ledger = Ledger(self, self.geometry, job, backend_name(backend))
        self._check(job, conditions, device)
        wanted = {condition: self._wanted(job, ledger, condition, backend) for condition in conditions}
        if not any(wanted.values()):
            return ledger.close()
        source = captured(job.loaded, self.shape, self.seed) if job.loaded else synthetic(self.shape, self.seed)
        roof = bandwidth(device, self.shape.head_dim * torch_dtype(self.dtypes[0]).itemsize)
        with tracked(self.name, sum(map(bool, wanted.values()))) as follow:
            for condition, names in wanted.items():
                if names:
                    follow(f"{condition.dtype}, {condition.context} tokens, budget {condition.budget:g}")
                    self._measure_condition(job, ledger, condition, names, source, backend, device, roof)
        return ledger.close()

    def _measure_condition(
        self,
        job: Job,
        ledger: Ledger,
        condition: Condition,
        names: Sequence[str],
        source: Source,
        backend: Kernels,
        device: torch.device,
        roof: Bandwidth,
    ) -> None:
        """Time the methods ``names`` and all dense kernels in turns, and append their records."""
        subjects = list(self._subjects(job, condition, names, backend))
        warmup = max(self.warmup, CAPTURING) if job.setting.graphs else self.warmup
        count = warmup + self.repeats * self.steps
        forget_peak(device)
        small = self._rehearsal([s.method for s in subjects if s.method], condition)
        try:
            self._check_room(job, condition, device)
            layers = [
                Layer(self.shape, torch_dtype(condition.dtype), length, count, source, device, job.setting)
                for length in (condition.context, small)
            ]
            take_turns(subjects, *layers, self.repeats, self.steps, warmup, Sweeper(self.sweep_mb, device), self.seed)
        except DeviceError:
            self._put_failures(ledger, condition, subjects)
            raise
        except Exception as error:  # noqa: BLE001 - a layer that cannot be built is a row of every method
            for subject in subjects:
                subject.error = error
        machine = roof.facts() | {"device": device_name(device), "peak_rss_bytes": peak_rss(), **peak_device(device)}
        machine["weights"] = None if job.loaded is None else job.loaded.weights
        dense = [subject for subject in subjects if subject.method is None and subject.error is None]
        fastest = min(dense, key=median_total, default=None)
        self._put_failures(ledger, condition, subjects)
        for subject in (subject for subject in subjects if subject.error is None):
            identity = self._facts(condition, subject)
            # Otherwise it is recorded already, or was measured only for comparison.
            if ledger.missing(subject.name, identity["sample_id"]):
                ledger.ok(subject.name, identity["sample_id"], identity | self._times(subject, fastest, roof) | machine)
        for subject in subjects:
            job.setting.check_device(subject.error)
            subject.close()

    def _put_failures(self, ledger: Ledger, condition: Condition, subjects: Sequence[Subject]) -> None:
        """Record the subjects that failed, and those that this machine cannot run."""
        for subject in subjects:
            identity = self._facts(condition, subject)
            if subject.error is None or not ledger.missing(subject.name, identity["sample_id"]):
                continue
            if isinstance(subject.error, RefusedError):
                ledger.refused(subject.name, identity["sample_id"], subject.error, identity)
            else:
                ledger.failed(subject.name, identity["sample_id"], subject.error, identity)

    def _subjects(self, job: Job, condition: Condition, names: Sequence[str], backend: Kernels) -> Iterator[Subject]:
        device = self._device(job)
        tier = DeviceTier() if device.type == "cuda" else None  # what methods with a host tier are compared with
        dense = dense_kernels(backend, self.shape.group, device)
        for kernel in [*dense, *([captured_kernel(backend)] if job.setting.graphs else [])]:
            yield Subject(DENSE, kernel.name, "all", dense=kernel, tier=DeviceTier() if kernel.captured else tier)
        for name in names:
            if name != DENSE:
                method = with_budget(job.methods[name], condition.budget)
                yield Subject(name, backend_name(backend), method.budget_label, method)

    def _wanted(self, job: Job, ledger: Ledger, condition: Condition, backend: Kernels) -> list[str]:
        """The names of methods that lack a record in a condition."""
        return list(
            dict.fromkeys(
                subject.name
                for subject in self._subjects(job, condition, list(job.methods), backend)
                if ledger.missing(subject.name, self._facts(condition, subject)["sample_id"])
            )
        )

    def _facts(self, condition: Condition, subject: Subject) -> Record:
        """The fields that identify a row. Rows of failures have them too."""
        what = subject.kernel if subject.method is None else f"{condition.budget:g}"
        return {
            "sample_id": f"{condition.dtype}-{condition.context}-{what}",
            "geometry": self.geometry,
            "dtype": condition.dtype,
            "context": condition.context,
            "budget": subject.budget,
            "kernel": subject.kernel,
            "keys": self.keys,
            "metadata": {
                "budget": condition.budget,
                "repeats": self.repeats,
                "steps": self.steps,
                "sweep_mb": self.sweep_mb,
            },
        }

    def _times(self, subject: Subject, fastest: Subject | None, roof: Bandwidth) -> Record:
        """Times of one subject, compared with the ``fastest`` dense kernel. The bandwidth counts the bytes of the keys
        and values attended to."""
        if subject.cohort is None:
            raise RuntimeError("times of a subject that was never built")
        count, cohort = len(subject.steps), subject.cohort
        link: Any = getattr(subject.placement, "link", None)
        phases = [phase for phase in (*PHASES, "total") if all(phase in step for step in subject.steps)]
        by_phase = {phase: [step[phase] for step in subject.steps] for phase in phases}
        figures: Record = {}
        for phase, seconds in by_phase.items():
            figures |= spread(phase, seconds)
        attended = subject.attended / count
        moved = attended * self.shape.row_bytes(cohort.store.keys(0, 1).dtype)
        reading = figures["fetch_s"] + figures["attend_s"] if "fetch_s" in figures else figures["total_s"]
        rate = moved / max(1e-12, reading)
        return figures | {
            **({"graphs": True} if subject.captured else {}),
            "build_s": subject.build_s,
            "observe_s": subject.observe_s,
            "warmup_s": subject.warmup_s,
            "timed_steps": count,
            "attended_tokens": attended,
            "skipped_nothing": attended_all([cohort]),
            "attended_bytes": moved,
            "index_bytes": subject.index_bytes / count,
            "index_resident_bytes": cohort.state.resident_bytes,
            "device_bytes": cohort.store.usage.device_bytes,
            "host_bytes": cohort.store.usage.host_bytes,
            "to_device_bytes": cohort.store.usage.bytes_to_device,
            "to_host_bytes": cohort.store.usage.bytes_to_host,
            "link": None if link is None else link.label,
            "emulated": link is not None and link.emulated,
            "bandwidth_gbps": rate / 1e9,
            "copy_share": rate / roof.copy,
            "dense_ratio": None if fastest is None else median_total(fastest) / figures["total_s"],
            "fastest_dense": None if fastest is None else fastest.kernel,
            "steps": {phase: [round(s, 9) for s in seconds] for phase, seconds in by_phase.items()},
        }

    def _device(self, job: Job) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cpu") if job.loaded is None else job.loaded.model.device

    def _rehearsal(self, methods: Sequence[Method], condition: Condition) -> int:
        """A short length at which every method selects, so that the kernels it will use are compiled there."""
        length = SMALL
        while length < condition.context and not all(selects(method, length) for method in methods):
            length *= 2
        return min(length, condition.context)

    def _check(self, job: Job, conditions: Sequence[Condition], device: torch.device) -> None:
        # Rows of full attention come from the dense kernels, whatever tier the methods use, so full attention is not
        # checked.
        job.setting.check({name: method for name, method in job.methods.items() if name != DENSE})
        for condition in conditions:
            if condition.budget >= condition.context:
                raise ConfigError(
                    f"benchmark.budgets has {condition.budget:g} tokens, which is all of a context of "
                    f"{condition.context}: lower it or lengthen benchmark.contexts"
                )
            for name in job.methods:
                self._check_method(job, name, condition, device)

    def _check_method(self, job: Job, name: str, condition: Condition, device: torch.device) -> None:
        try:
            method = with_budget(job.methods[name], condition.budget)
            method.split(condition.context, condition.context)
            self._check_room(job, condition, device)
            method.layer(geometry_of(self.shape, condition.context, device, job.setting))
        except MemoryError:
            return  # the error is recorded when the method is measured
        except (ConfigError, ModelError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _check_room(self, job: Job, condition: Condition, device: torch.device) -> None:
        """Raises RoomError when the layer does not fit this machine."""
        row, free = self.shape.row_bytes(torch_dtype(condition.dtype)), available_bytes(device)
        if job.setting.tier.offloads:  # every method keeps a copy in host memory
            job.setting.tier.check(condition.context, row * max(1, len(job.methods)))
        needed = SLACK * condition.context * row
        if needed > free:
            raise RoomError(
                f"benchmark.contexts has {condition.context}: {condition.dtype} keys and values of one "
                f"{self.geometry} layer need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: shorten it"
            )


def median_total(subject: Subject) -> float:
    """Median seconds of a timed step."""
    return spread("total", [step["total"] for step in subject.steps])["total_s"]
