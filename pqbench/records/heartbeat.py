"""Signs of life next to the records: ``progress.json`` says which process works on a run, how many samples there are,
and that the process is alive.

The file changes no figure and may be deleted. If several processes share a run, it describes the last process that
wrote it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pqbench.records.file import RecordFile, write_atomically
from pqbench.records.stamp import PROGRESS as NAME

log = logging.getLogger(__name__)

INTERVAL_S = 10.0  # seconds between two beats
SILENCE_S = 60.0  # seconds without a beat after which the process is taken to be gone


@dataclass(frozen=True)
class Beat:
    """One sign of life. Times are in seconds since 1970, by the clock of ``host``.

    Attributes:
        planned: number of samples of the run; None until it is known.
        before: number of samples that had a record when the process started.
        ended: whether the process has left the run, finished or not. It stays False when the process is killed.
    """

    host: str
    pid: int
    started: float
    beat: float
    before: int
    planned: int | None = None
    ended: bool = False

    @property
    def alive(self) -> bool:
        """Whether the process still works on the run."""
        return not self.ended and time.time() - self.beat < SILENCE_S


def read_beat(folder: Path) -> Beat | None:
    """The last sign of life in the folder of a run; None if there is none or it cannot be read."""
    try:
        found = Beat(**json.loads((folder / NAME).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = (found.pid, found.started, found.beat, found.before, 0 if found.planned is None else found.planned)
    good = all(type(number) in (int, float) and 0 <= number < 1e12 for number in numbers)
    return found if good and type(found.ended) is bool else None


@contextmanager
def heartbeat(files: Sequence[RecordFile], interval: float = INTERVAL_S) -> Iterator[None]:
    """Write signs of life for these runs until the ``with`` block ends. ``RecordFile.planned`` may be set inside the
    block."""
    before = [file.count() for file in files]
    started, stop = time.time(), threading.Event()

    def beat(ended: bool = False) -> None:
        for file, count in zip(files, before, strict=True):
            sign = Beat(socket.gethostname(), os.getpid(), started, time.time(), count, file.planned, ended)
            try:
                write_atomically(file.folder / NAME, json.dumps(asdict(sign)).encode())
            except OSError as error:  # if records cannot be written either, writing them raises an error
                log.debug("%s: %s", file.folder / NAME, error)

    def keep_beating() -> None:
        while not stop.wait(interval):
            beat()

    beat()
    thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        beat(ended=True)
