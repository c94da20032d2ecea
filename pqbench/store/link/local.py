"""A link between two regions of host memory, with one background thread per direction."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pqbench.kernels.threads import stay_alone
from pqbench.store.link.base import Copy, Direction, Link, Meters, Transfer


class Task:
    """A piece of work for a lane; its exception is stored and raised in the thread that waits."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done = False
        self.ended = 0.0  # seconds of time.perf_counter
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work."""
        try:
            with torch.inference_mode():  # thread-local; the tensors of a generation are inference tensors
                self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            self.error = error


class Lane:
    """A queue that runs one task at a time, in order, on its own thread.

    A caller that waits runs the queued tasks itself, up to its own. A wait right after a submit therefore needs no
    change of thread, and a dead worker thread cannot block a caller for ever. The lane's thread is woken only by new
    work, a caller only by the end of a task.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: deque[Task] = deque()
        self._lock = threading.Lock()
        self._work_left, self._task_ended = threading.Condition(self._lock), threading.Condition(self._lock)
        self._busy = False
        self._closed = False
        self._worker: threading.Thread | None = None

    def put(self, task: Task, urgent: bool = False) -> None:
        """Queue a task. An urgent task does not wake the thread, because the caller will wait at once and run it."""
        with self._lock:
            if self._worker is None or self._closed:
                self._closed = False
                self._worker = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._worker.start()
            self._queue.append(task)
            if not urgent:
                self._work_left.notify()

    def wait(self, task: Task) -> None:
        """Return when a queued task is done. Raises the exception of the task, if there was one."""
        if not task.done:
            with self._lock:
                while not task.done:
                    self._step(self._task_ended)
        if task.error is not None:
            raise task.error

    def close(self) -> None:
        """Let the thread end when the queue is empty."""
        with self._lock:
            self._closed = True
            self._work_left.notify()

    def _work(self) -> None:
        stay_alone()
        with self._lock:
            while self._queue or self._busy or not self._closed:
                self._step(self._work_left)

    def _step(self, change: threading.Condition) -> None:
        """Run the next task if none is running, otherwise wait for a change. The caller holds the lock."""
        if self._busy or not self._queue:
            change.wait()
            return
        task, self._busy = self._queue.popleft(), True
        self._lock.release()
        try:
            task.run()
        finally:
            self._lock.acquire()
            task.ended = time.perf_counter()
            self._busy, task.done = False, True
            self._task_ended.notify_all()
            if self._queue or self._closed:
                self._work_left.notify()


class LocalTransfer(Transfer):
    """A transfer that is a task in a lane."""

    def __init__(self, meters: Meters, lane: Lane, task: Task) -> None:
        super().__init__(meters)
        self._lane, self._task = lane, task

    @property
    def done(self) -> bool:
        return self._task.done

    def _finish(self) -> None:
        self._lane.wait(self._task)


class LocalLink(Link):
    """Copies in background threads. They run beside the caller because torch releases the interpreter lock (GIL)."""

    label = "local"

    def __init__(self, debug: bool = False) -> None:
        super().__init__(debug)
        self._lanes = {direction: Lane(f"link {direction.value}") for direction in Direction}
        self._ended = weakref.finalize(self, _close, list(self._lanes.values()))

    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        lane, task = self._enqueue(copies, direction, urgent)
        return LocalTransfer(self.meters, lane, task)

    def _enqueue(self, copies: Sequence[Copy], direction: Direction, urgent: bool) -> tuple[Lane, Task]:
        lane, task = self._lanes[direction], Task(lambda: _run(copies))
        lane.put(task, urgent)
        return lane, task

    def _launch(self, work: Callable[[], None], direction: Direction, uses: Sequence[Tensor]) -> Transfer:
        lane, task = self._lanes[direction], Task(work)
        lane.put(task)
        return LocalTransfer(self.meters, lane, task)

    def close(self) -> None:
        self._ended()
        super().close()


def _run(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy.run()


def _close(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.close()
