"""Who measures what, where several processes share a results folder.

A claim is a lock of the operating system: it ends with the process that holds it, however that ends, so that nothing
stays claimed after a kill. Should a claim ever be held twice, a sample is measured twice and recorded once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pqbench.records.file import RecordFile, unwritable

log = logging.getLogger(__name__)

CLAIMS = "claims"  # the folder of the locks, beside the records


@contextmanager
def claimed(file: RecordFile, sample_id: str) -> Iterator[bool]:
    """Claim a sample for this process until the block ends. Gives False where another process has claimed it.

    Raises:
        DataError: the folder of the run cannot be written.
    """
    name = hashlib.sha256(sample_id.encode()).hexdigest()[:16]
    path = file.folder / CLAIMS / f"{name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as error:
        raise unwritable(file.folder, error) from error
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone(files: Sequence[RecordFile], patience: float = -1) -> Iterator[None]:
    """Wait until no other process holds one of these runs, and hold them all until the block ends: times that are
    measured by two processes at once are the times of neither.

    Args:
        files: the records of the runs.
        patience: seconds to wait for another process; -1 waits until it has ended.

    Raises:
        DataError: the folder of a run cannot be written.
        TimeoutError: another process still held a run when patience ended.
    """
    with ExitStack() as held:
        for folder in sorted({file.folder for file in files}):  # in one order, so that nobody waits in a circle
            held.enter_context(_held(folder, patience))
        yield


@contextmanager
def _held(folder: Path, patience: float) -> Iterator[None]:
    lock = FileLock(folder / f"{CLAIMS}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process measures in %s: waiting until it has ended", folder)
            lock.acquire(timeout=patience)
    except Timeout:
        raise
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()
