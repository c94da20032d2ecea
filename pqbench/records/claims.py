"""Claims, which divide the samples among several processes that share a results folder.

A claim is a lock of the operating system. It ends with its process, however that ends, so that nothing stays claimed
after a kill. A process that was stopped, or that hangs, keeps its lock; after ``STALE_S`` another process takes the
claim over. If a claim is ever held twice, a sample is measured twice and recorded once.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pqbench.records.file import RecordFile, unwritable

log = logging.getLogger(__name__)

CLAIMS = "claims"  # the folder of the locks, next to the records
STALE_S = 3600.0  # age in seconds of a claim after which its process is assumed to hang


@contextmanager
def claimed(file: RecordFile, sample_id: str) -> Iterator[bool]:
    """Claim a sample for this process until the ``with`` block ends. Gives False if another process has claimed it
    within the last ``STALE_S`` seconds.

    Raises:
        DataError: the folder of the run cannot be written.
    """
    name = hashlib.sha256(sample_id.encode()).hexdigest()[:16]
    path = file.folder / CLAIMS / f"{name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(exist_ok=True)
        taken = _taken(lock, path, sample_id)
    except OSError as error:
        raise unwritable(file.folder, error) from error
    if taken is None:
        yield False
        return
    try:
        yield True
    finally:
        if _inode(path) == taken:  # not the lock of a process that took this claim over
            path.unlink(missing_ok=True)
        lock.release()


def _taken(lock: FileLock, path: Path, sample_id: str) -> int | None:
    """The inode of a claim's lock file once this process holds it; None where another one does."""
    try:
        lock.acquire()
    except Timeout:
        if not _stale(path):
            return None
        minutes = round(STALE_S / 60)
        log.warning("a process claimed %s over %d minutes ago and has not finished it: taken over", sample_id, minutes)
        path.unlink(missing_ok=True)
        try:
            lock.acquire()
        except Timeout:  # a third process was faster
            return None
    path.touch()  # it may be a file that a killed process left
    return _inode(path)


def _stale(path: Path) -> bool:
    """Whether a lock file was taken so long ago that its process is taken to hang."""
    try:
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:  # it was just given back
        return False


def _inode(path: Path) -> int | None:
    """The inode of a file; None where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def tell_of_waiting(samples: Sequence[str], told: set[str]) -> None:
    """Say once for which samples this process waits, since other processes have claimed them.

    Args:
        samples: that are waited for now.
        told: samples of which this was said already; the new ones are added.
    """
    new = [sample for sample in samples if sample not in told]
    if new:
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        log.info("another process measures %s%s: waiting until it has ended", ", ".join(new[:3]), more)
        told.update(new)


@contextmanager
def alone(files: Sequence[RecordFile], patience: float = -1) -> Iterator[None]:
    """Wait until no other process holds one of these runs, then hold all of them until the ``with`` block ends. Times
    would be wrong if two processes measured at once.

    Args:
        files: the records of the runs.
        patience: seconds to wait for another process; -1 waits until it has ended.

    Raises:
        DataError: the folder of a run cannot be written.
        TimeoutError: another process still held a run when patience ended.
    """
    with ExitStack() as held:
        for folder in sorted({file.folder for file in files}):  # in one order, which excludes deadlocks
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
