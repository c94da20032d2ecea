"""The stamp of a run folder: what tells it from a later folder of the same name, and when its run was last started.

It lies in a file of its own, since a copy of a folder keeps the content of files, but not always their times.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "run.json"
PROGRESS = "progress.json"  # the file of the heartbeat, which older versions wrote without a stamp


@dataclass(frozen=True)
class Stamp:
    """What ``run.json`` holds.

    Attributes:
        token: random hexadecimal digits, made once when the folder is made ready for the first time.
        started: when a run with these settings was last started, in seconds since 1970.
    """

    token: str
    started: float

    @classmethod
    def of(cls, folder: Path) -> Stamp | None:
        """The stamp of a folder; None where it is absent or damaged, as in folders of older versions."""
        try:
            found = cls(**json.loads((folder / NAME).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        good = isinstance(found.token, str) and type(found.started) in (int, float) and 0 <= found.started < 1e12
        return found if good else None

    @classmethod
    def now(cls, known: Stamp | None) -> Stamp:
        """The stamp of a run that starts now, in a folder with the stamp ``known`` or with none."""
        return cls(known.token if known else uuid.uuid4().hex, time.time())

    def encode(self) -> bytes:
        """The content of the file."""
        return json.dumps(asdict(self)).encode()


def last_started(folder: Path) -> tuple[int, float]:
    """When the run of a folder was last started, to be compared with other folders: by its stamp, or else by its last
    sign of life, or else by the newest file in it. What was written inside the folder counts for more than the times of
    files, since these change when a folder is copied."""
    stamp = Stamp.of(folder)
    if stamp is not None:
        return 2, stamp.started
    try:
        started = json.loads((folder / PROGRESS).read_bytes())["started"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        started = None
    if type(started) in (int, float) and 0 <= started < 1e12:
        return 2, started
    try:
        return 1, max(path.stat().st_mtime for path in folder.iterdir())
    except (OSError, ValueError):
        return 0, 0.0
