"""What every timing benchmark is made of: a job, its records, and what becomes of a measurement that fails."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pqbench.engine.setting import Setting
from pqbench.errors import BudgetError, ConfigError
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.records.file import FINISHED, VERSION, Record, RecordFile
from pqbench.tables.timings import DENSE, timing_table
from pqbench.terminal import plain

__all__ = ["DENSE", "Ledger", "Measured", "Measurement", "TimingJob", "at_least", "check_split", "outcome", "tracked"]

log = logging.getLogger(__name__)


@dataclass
class TimingJob:
    """What is to be timed, and where the records go.

    Attributes:
        loaded: the model; None where the measurement needs none (:attr:`Measurement.needs_model`).
        methods: by the name that results use.
        files: the record file of each method, and of every name in :attr:`Measurement.further`.
        setting: where KV lives, which kernels compute, what overlaps.
        retry_failed: measure samples again whose record is an error.
        chunk: prefill block in tokens, None for one shot.
    """

    loaded: LoadedModel | None
    methods: Mapping[str, Method]
    files: Mapping[str, RecordFile]
    setting: Setting = field(default_factory=Setting)
    retry_failed: bool = False
    chunk: int | None = None


@dataclass
class Measured:
    """What a run did."""

    measured: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    wall_s: float = 0.0


class Measurement(ABC):
    """A timing benchmark. Subclasses are dataclasses, one file each, validated in ``__post_init__``.

    ``further`` names record files it writes besides those of the job's methods.
    """

    name: ClassVar[str]
    further: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def needs_model(self) -> bool:
        """Whether the job must bring a loaded model."""

    @property
    def needs_answers(self) -> bool:
        """Whether its figures depend on what the model has learnt, which random weights lack."""
        return False

    def subject(self, model: str) -> str:
        """What results call the thing that is timed; ``model`` is the configured model's name."""
        return model

    @abstractmethod
    def measure(self, job: TimingJob) -> Measured:
        """Time everything that lacks a record. One failing measurement is a record, and the run goes on.

        Raises:
            ConfigError: something cannot be measured whatever happens; nothing was run then.
        """

    def table(self, records: list[Record]) -> Table:
        """The table a run prints."""
        return timing_table(records)

    def footer(self, done: Measured, results: str) -> str:
        """One line below the table."""
        return (
            f"{done.measured} measured, {done.resumed} already there, {len(done.failures)} failed in "
            f"{done.wall_s:.1f} s; {torch.get_num_threads()} threads; records in {results}/"
        )


class Ledger:
    """What is on record already, and what this run adds. ``kernels`` is the body that computes, ``auto`` resolved."""

    def __init__(self, benchmark: str, model: str, job: TimingJob, kernels: str) -> None:
        self.benchmark, self.model, self.job, self.kernels = benchmark, model, job, kernels
        self.done = Measured()
        self._began = time.perf_counter()
        self._known = {name: file.outcomes() for name, file in job.files.items()}
        self._asked: dict[str, set[str]] = {name: set() for name in job.files}
        self._resumed: set[tuple[str, str]] = set()

    def missing(self, name: str, sample_id: str) -> bool:
        """Whether a sample is still to be measured under a name that has a file; those on record count as resumed."""
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

    def ok(self, name: str, sample_id: str, facts: Mapping[str, Any]) -> None:
        """Record a measurement. Raises DataError when the file cannot be written."""
        self._append(name, sample_id, {"status": "ok", **facts})

    def failed(self, name: str, sample_id: str, error: Exception, facts: Mapping[str, Any]) -> None:
        """Record that there is none, and why. Raises DataError when the file cannot be written."""
        log.debug("%s failed on %s", name, sample_id, exc_info=error)
        self._append(name, sample_id, {**outcome(error), **facts})

    def refused(self, name: str, sample_id: str, reason: Exception, facts: Mapping[str, Any]) -> None:
        """Record that this machine does not offer what was to be timed, which is no failure. Raises DataError when the
        file cannot be written."""
        self._append(name, sample_id, {"status": "refused", "reason": " ".join(str(reason).split())[:500], **facts})

    def close(self) -> Measured:
        """What was done, with the time it took."""
        self.done.wall_s = time.perf_counter() - self._began
        return self.done

    def _append(self, name: str, sample_id: str, facts: Mapping[str, Any]) -> None:
        file = self.job.files[name]
        record: Record = {
            "version": VERSION,
            "benchmark": self.benchmark,
            "model": self.model,
            "task": self.benchmark,
            "sample_id": sample_id,
            "method": name,
            "key": file.folder.name.rsplit("-", 1)[-1],
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


def check_split(name: str, method: Method, length: int, where: str = "") -> None:
    """Raises BudgetError when a method's budget cannot be met on prompts of ``length`` tokens."""
    try:
        method.split(length, length)
    except BudgetError as error:
        raise BudgetError(f"{name}{where}: {error}") from error


@contextmanager
def tracked(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; call what it gives with what comes next."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=total)
        begun = iter([0, *[1] * total])

        def follow(description: str) -> None:
            progress.update(bar, description=plain(f"{name} {description}"), advance=next(begun, 1))

        yield follow
        progress.update(bar, completed=total)
