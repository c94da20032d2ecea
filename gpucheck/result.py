"""The result of one step: a JSON file that is complete after every row, even if the process dies."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpucheck.plan import Step

Row = dict[str, Any]
CUT = "the process of this step ended before the step did"


class Skipped(Exception):  # noqa: N818 - no error: there is nothing to do here
    """Raised by a step that cannot run on this machine; the message says why."""


@dataclass
class Result:
    """The result of a step. The file says ``failed`` until :meth:`close`, so that the death of a process is noticed.

    Attributes:
        rows: one for each comparison or measurement. ``name`` is its subject; ``ok`` is True for a right comparison,
            False for a wrong one and None for a measured figure; ``error`` explains a wrong one.
        deadline: end of the step's time, in seconds of ``time.monotonic``.
    """

    step: Step
    folder: Path
    machine: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    message: str = CUT
    status: str = "failed"
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def left(self) -> float:
        """Seconds until the process of the step is ended from outside."""
        return self.deadline - time.monotonic()

    def row(self, name: str, ok: bool | None = None, **figures: Any) -> Row:
        """Add a row, and write the file."""
        row = {"name": name, "ok": ok, **figures}
        self.rows.append(row)
        self.write()
        return row

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """A failure inside this block becomes a row, and the step goes on."""
        try:
            yield
        except Skipped as reason:
            self.row(name, None, skipped=str(reason))
        except Exception as error:
            self.row(name, False, error=one_line(error), traceback=traceback.format_exc()[-2000:])
            if device_is_lost():
                raise  # everything that follows would fail as well

    def close(self, status: str | None = None, message: str = "") -> None:
        """Set the final status: ``failed`` if a row is wrong, otherwise the given one (by default ``ok``)."""
        wrong = [row["name"] for row in self.rows if row["ok"] is False]
        self.status = status or ("failed" if wrong else "ok")
        self.message = message or (f"wrong: {'; '.join(wrong)}" if wrong else "")
        self.write()

    def write(self) -> None:
        """Write the file; a reader sees either the old or the new content."""
        self.seconds = time.monotonic() - self.began
        content = {
            "step": self.step.number,
            "name": self.step.name,
            "title": self.step.title,
            "status": self.status,
            "seconds": round(self.seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": self.machine,
            "rows": self.rows,
            "message": self.message,
        }
        write_json(self.folder / self.step.file, content)


def device_is_lost() -> bool:
    """Whether the GPU refuses all further work of this process, as it does after an access outside its memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def one_line(error: BaseException) -> str:
    """Type and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that no reader ever sees half of it. Numbers that JSON lacks (NaN) become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(_plain(content), indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A result as it was written; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
