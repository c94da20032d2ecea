"""How far the runs of a results folder are, by their records and signs of life."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pqbench.records.file import FINISHED, RecordFile, newest_of, read_lines
from pqbench.records.folders import run_folders
from pqbench.records.heartbeat import Beat, read_beat

STATES = ("running", "stalled", "stopped", "done", "unknown")


@dataclass(frozen=True)
class Run:
    """One folder of records: samples with a prediction, failed samples, and the last sign of life."""

    benchmark: str
    model: str
    method: str
    ok: int
    failed: int
    beat: Beat | None

    @property
    def planned(self) -> int | None:
        """Number of samples of the run; None if it is unknown."""
        return None if self.beat is None else self.beat.planned

    @property
    def left(self) -> int | None:
        """Number of samples without any record; None if it is unknown."""
        return None if self.planned is None else max(0, self.planned - self.ok - self.failed)

    @property
    def state(self) -> str:
        """The state of the run, one of STATES."""
        if self.beat is not None and self.beat.alive:
            return "running"
        if self.left == 0:
            return "done"
        if self.beat is not None and not self.beat.ended:
            return "stalled"
        return "unknown" if self.left is None else "stopped"

    @property
    def rate(self) -> float:
        """Samples per second of the process that runs; 0 if no process runs or it has not finished a sample."""
        if self.beat is None or self.state != "running":
            return 0.0
        seconds = self.beat.beat - self.beat.started
        return max(0, self.ok + self.failed - self.beat.before) / seconds if seconds > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the process that runs will be done; None if this cannot be estimated."""
        return None if self.left is None or not self.rate else self.left / self.rate


def read_runs(root: Path) -> list[Run]:
    """Every run under a results folder.

    Raises:
        DataError: there is no such folder, or a file in it cannot be read.
    """
    runs = []
    for folder in run_folders(root):
        newest, _ = newest_of(read_lines(RecordFile(folder).path))
        ok = sum(record["status"] in FINISHED for record in newest)
        names = (folder.parent.parent.name, folder.parent.name, folder.name.rpartition("-")[0] or folder.name)
        runs.append(Run(*names, ok, len(newest) - ok, read_beat(folder)))
    return runs
