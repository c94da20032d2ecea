"""The parts of every measurement: the job, the ledger of its records, and the record of a failure.

Scores, times and fidelity are measured in the same way. Each measurement gets a :class:`Job`, asks its :class:`Ledger`
which samples are still missing, and records one outcome for each sample.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.records.claims import claimed
from pqbench.records.file import FINISHED, VERSION, Record, RecordFile
from pqbench.terminal import plain

log = logging.getLogger(__name__)

COMPILING = "compile"  # names the part of a run's seconds in which kernels were compiled


@dataclass
class Job:
    """What to measure, and where to write the records.

    Attributes:
        loaded: the model; None for measurements that need none (:attr:`Measurement.needs_model`).
        methods: the methods by their names in the results.
        files: the record file of each method and of every name in :attr:`Measurement.further`.
        setting: where KV lies, which kernels compute, and what overlaps.
        retry_failed: measure again the samples whose record is an error.
        chunk: tokens of one prefill block; None prefills a prompt in one shot.
    """

    loaded: LoadedModel | None
    methods: Mapping[str, Method]
    files: Mapping[str, RecordFile]
    setting: Setting = field(default_factory=Setting)
    retry_failed: bool = False
    chunk: int | None = None


@dataclass
class Measured:
    """What a run did.

    Attributes:
        measured: number of samples that this run recorded.
        resumed: number of samples that were already recorded.
        failures: one line for each sample that failed, in this run or before.
        wall_s: seconds of the whole run, without compiling kernels.
        seconds: the parts of the run that a measurement timed by itself, by name.
    """

    measured: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def counts(self) -> str:
        """How many samples were measured, resumed and failed, in words."""
        return f"{self.measured} measured, {self.resumed} already there, {len(self.failures)} failed"


class Measurement(ABC):
    """A way to measure methods. Subclasses are dataclasses that validate themselves in ``__post_init__``.

    Attributes:
        kind: the kind of its records, by which tables and figures choose records.
        further: names of the record files that it writes in addition to those of the job's methods.
        needs_answers: whether its figures are only meaningful for trained weights, and not for random ones.
        shared: whether several processes may work on one run at the same time. Measurements of times forbid it, because
            the processes would slow each other.
    """

    kind: ClassVar[str]
    shared: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    further: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the benchmark in records and on the command line."""

    @property
    def needs_model(self) -> bool:
        """Whether the job must bring a loaded model."""
        return True

    def subject(self, model: str) -> str:
        """The name in the results of what is measured; ``model`` is the name of the configured model."""
        return model

    @abstractmethod
    def measure(self, job: Job) -> Measured:
        """Measure everything that lacks a record. A sample that fails gets a record of the error, and the run
        continues.

        Raises:
            ConfigError: something cannot be measured at all. In this case nothing was run.
            DeviceError: the accelerator no longer answers after a failure. The failure has been recorded.
        """

    def footer(self, done: Measured, results: str) -> str:
        """The text below the table of a run."""
        return f"{done.counts} in {done.wall_s:.1f} s; {torch.get_num_threads()} threads; records in {results}/"


class Ledger:
    """The samples that are already recorded, and those that this run adds.

    Args:
        measurement: what is measured.
        subject: the name in the results of the model or layer that is measured.
        job: the present job.
        kernels: the name of the backend that computes; never ``auto``.
    """

    def __init__(self, measurement: Measurement, subject: str, job: Job, kernels: str) -> None:
        self.measurement, self.subject, self.job, self.kernels = measurement, subject, job, kernels
        self.done = Measured()
        self._began = time.perf_counter()
        self._known = {name: file.outcomes() for name, file in job.files.items()}
        self._asked: dict[str, set[str]] = {name: set() for name in job.files}
        self._resumed: set[tuple[str, str]] = set()

    def missing(self, name: str, sample_id: str) -> bool:
        """Whether a sample must still be measured for a method with this name. The answer is False if the job has no
        record file of the name. Recorded samples are counted as resumed."""
        if name not in self.job.files:
            return False
        known, asked = self._known[name], self._asked[name]
        asked.add(sample_id)
        self.job.files[name].planned = len(asked)
        if sample_id not in known:
            return True
        error = known[sample_id]
        if error and self.job.retry_failed:
            return True
        if (name, sample_id) in self._resumed:
            return False
        self._resumed.add((name, sample_id))
        self.done.resumed += 1
        if error:
            self.done.failures.append(f"{name} on {sample_id} failed before (retry_failed=true runs it again): {error}")
        return False

    @contextmanager
    def claim(self, sample_id: str, names: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
        """Claim a sample for several names until the ``with`` block ends. Gives the names for which this process
        measures the sample, and the names for which another process is measuring it. Records that another process has
        written since then are counted as resumed.

        Raises:
            DataError: the results folder cannot be written.
        """
        with ExitStack() as claims:
            free = {name: claims.enter_context(claimed(self.job.files[name], sample_id)) for name in names}
            mine = [name for name in names if free[name] and not self._recorded(name, sample_id)]
            yield mine, [name for name in names if not free[name]]

    def _recorded(self, name: str, sample_id: str) -> bool:
        """Whether another process has recorded a sample since this one began."""
        there, error = self.job.files[name].outcome(sample_id)
        if not there or (sample_id in self._known[name] and self._known[name][sample_id] == error):
            return False
        self._known[name][sample_id] = error
        self.done.resumed += 1
        if error:
            self.done.failures.append(f"{name} on {sample_id} failed in another process: {error}")
        return True

    def ok(self, name: str, sample_id: str, facts: Mapping[str, Any]) -> None:
        """Record a measurement. Raises DataError when the file cannot be written."""
        self._append(name, sample_id, {"status": "ok", **facts})

    def failed(self, name: str, sample_id: str, error: Exception, facts: Mapping[str, Any]) -> None:
        """Record that a measurement failed, and why. Raises DataError when the file cannot be written."""
        log.debug("%s failed on %s", name, sample_id, exc_info=error)
        self._append(name, sample_id, {**outcome(error), **facts})

    def refused(self, name: str, sample_id: str, reason: Exception, facts: Mapping[str, Any]) -> None:
        """Record that this machine cannot do what was to be measured. This is not counted as a failure. Raises
        DataError when the file cannot be written."""
        self._append(name, sample_id, {"status": "refused", "reason": " ".join(str(reason).split())[:500], **facts})

    def close(self) -> Measured:
        """What this run did, with the time it took."""
        self.done.wall_s = time.perf_counter() - self._began - self.done.seconds[COMPILING]
        return self.done

    def _append(self, name: str, sample_id: str, facts: Mapping[str, Any]) -> None:
        file = self.job.files[name]
        record: Record = {
            "version": VERSION,
            "kind": self.measurement.kind,
            "benchmark": self.measurement.name,
            "model": self.subject,
            "task": self.measurement.name,
            "sample_id": sample_id,
            "method": name,
            "key": file.key,
            "question": "-",
            "kernels": self.kernels,
            "threads": torch.get_num_threads(),
            **facts,
        }
        new = file.append(record)  # full attention is timed with every budget but recorded only once
        if record["status"] in FINISHED:
            self.done.measured += new
            return
        failure = f"{name} on {sample_id}: {record['error']}"
        if failure not in self.done.failures:
            self.done.failures.append(failure)


def outcome(error: Exception) -> Record:
    """Status and message of a failure. Running out of memory has a status of its own."""
    status = "oom" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return {"status": status, "error": f"{type(error).__name__}: {message}"}


def at_least(field_name: str, value: Any, least: int) -> None:
    """Raises ConfigError when an option is not a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ConfigError(f"benchmark.{field_name} is {value!r}: use a whole number from {least} up")


@contextmanager
def tracked(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar of ``total`` steps. The context gives a function: call it before each step with a description
    of the step."""
    what = TextColumn("{task.description}", markup=False)  # names come from data files
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=total)
        begun = iter([0, *[1] * total])

        def follow(description: str) -> None:
            progress.update(bar, description=plain(f"{name} {description}"), advance=next(begun, 1))

        yield follow
        progress.update(bar, completed=total)
