"""Processes under a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpucheck.options import ROOT

GRACE = 3.0  # seconds between the request to end and the end by force


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (None if it ran out of time), and the last lines of its output."""

    code: int | None
    seconds: float
    said: str


@dataclass
class Running:
    """A running process whose output goes into a file. With ``group`` it has a process group of its own and is ended
    together with its children. Without, it belongs to the caller's group and is ended together with that."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    group: bool = False

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                list(self.command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=None if self.environment is None else dict(self.environment),
                start_new_session=self.group,
            )

    @property
    def running(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> Ended:
        """Wait until the process ends, at most this many seconds after its start, then end it. With 0 it is ended at
        once."""
        code: int | None = None
        try:
            code = self._process.wait(max(0.0, seconds - (time.monotonic() - self._began)))
        except subprocess.TimeoutExpired:
            self.end()
        except BaseException:
            self.end()
            raise
        return Ended(code, time.monotonic() - self._began, tail(self.log))

    def end(self) -> None:
        """End the process, by force if it does not end on request."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            try:
                if self.group:
                    os.killpg(self._process.pid, request)
                else:
                    self._process.send_signal(request)
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break


def run(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None, group: bool = False
) -> Ended:
    """Run a command for at most ``seconds``."""
    return Running(command, log, environment, group).wait(seconds)


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a text file."""
    try:
        text = path.read_bytes()[-20_000:].decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])
