"""What every measurement is made of: the job, the ledger of its records, and what becomes of a failure.

There is one runner. Scores, times and fidelity are measurements alike: each gets a :class:`Job`, asks its
:class:`Ledger` what is still missing, and records one outcome for each sample.
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

COMPILING = "compile"  # the part of a run's seconds in which kernels were compiled


@dataclass
class Job:
    """What is to be measured, and where the records go.

    Attributes:
        loaded: the model; None where the measurement needs none (:attr:`Measurement.needs_model`).
        methods: the methods by the name that results use.
        files: the record file of each method, and of every name in :attr:`Measurement.further`.
        setting: where KV lies, which kernels compute, and what overlaps.
        retry_failed: measure samples again whose record is an error.
        chunk: tokens of a block of the prefill; None prefills a prompt in one piece.
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
        measured: samples that this run put on record.
        resumed: samples that were on record already.
        failures: one line for each sample that failed, in this run or before.
        wall_s: seconds of the whole run; compiling kernels is left out.
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
    """Something that can be measured of methods. Subclasses are dataclasses, validated in ``__post_init__``.

    Attributes:
        kind: what its records hold; tables and figures choose by it.
        further: the names of record files that it writes besides those of the job's methods.
        needs_answers: whether its figures depend on what the model has learnt, which random weights lack.
        shared: whether several processes may work on one run at a time; times would be the times of neither.
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
        """What results call the thing that is measured; ``model`` is the configured model's name."""
        return model

    @abstractmethod
    def measure(self, job: Job) -> Measured:
        """Measure everything that lacks a record. A measurement that fails becomes a record, and the run goes on.

        Raises:
            ConfigError: something cannot be measured at all; nothing was run then.
            DeviceError: the accelerator no longer answers after a failure, which is on record.
        """

    def footer(self, done: Measured, results: str) -> str:
        """What is said below the table of a run."""
        return f"{done.counts} in {done.wall_s:.1f} s; {torch.get_num_threads()} threads; records in {results}/"


class Ledger:
    """What is on record already, and what this run adds.

    Args:
        measurement: what is measured.
        subject: what results call the model or layer that is measured.
        job: the job at work.
        kernels: the backend that computes; never ``auto``.
    """

    def __init__(self, measurement: Measurement, subject: str, job: Job, kernels: str) -> None:
        self.measurement, self.subject, self.job, self.kernels = measurement, subject, job, kernels
        self.done = Measured()
        self._began = time.perf_counter()
        self._known = {name: file.outcomes() for name, file in job.files.items()}
        self._asked: dict[str, set[str]] = {name: set() for name in job.files}
        self._resumed: set[tuple[str, str]] = set()

    def missing(self, name: str, sample_id: str) -> bool:
        """Whether a sample is still to be measured under a name that has a file. Samples on record count as resumed."""
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
        """Claim a sample under several names until the block ends. Gives the names under which this process measures
        it, and those under which another process is at work on it. What another process has recorded meanwhile counts
        as resumed.

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
        """Record that this machine does not offer what was to be measured, which is no failure. Raises DataError when
        the file cannot be written."""
        self._append(name, sample_id, {"status": "refused", "reason": " ".join(str(reason).split())[:500], **facts})

    def close(self) -> Measured:
        """What was done, with the time it took."""
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
        new = file.append(record)  # full attention is timed beside every budget and recorded once
        if record["status"] in FINISHED:
            self.done.measured += new
            return
        failure = f"{name} on {sample_id}: {record['error']}"
        if failure not in self.done.failures:
            self.done.failures.append(failure)


def outcome(error: Exception) -> Record:
    """Status and message of a failure; running out of memory is a status of its own."""
    status = "oom" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return {"status": status, "error": f"{type(error).__name__}: {message}"}


def at_least(field_name: str, value: Any, least: int) -> None:
    """Raises ConfigError when an option is no whole number from ``least`` up."""
    if type(value) is not int or value < least:
        raise ConfigError(f"benchmark.{field_name} is {value!r}: use a whole number from {least} up")


@contextmanager
def tracked(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar. Call the function it gives with a description of what comes next."""
    what = TextColumn("{task.description}", markup=False)  # names come from data files
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=total)
        begun = iter([0, *[1] * total])

        def follow(description: str) -> None:
            progress.update(bar, description=plain(f"{name} {description}"), advance=next(begun, 1))

        yield follow
        progress.update(bar, completed=total)
