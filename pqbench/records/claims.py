"""Claims, which divide the samples among several processes that share a results folder.

A claim is a lock of the operating system. It ends with its process, however that ends, so that nothing stays claimed
after a kill. If a claim is ever held twice, a sample is measured twice and recorded once.
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

CLAIMS = "claims"  # the folder of the locks, next to the records


@contextmanager
def claimed(file: RecordFile, sample_id: str) -> Iterator[bool]:
    """Claim a sample for this process until the ``with`` block ends. Gives False if another process has claimed it.

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
