"""A results folder in one compressed file, small enough to be part of the repository.

The first line of the file names the command that made the records and the day on which they were made. Then each run
has one line with its settings and environments, followed by its records.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from plots.data import with_settings
from pqbench.errors import DataError
from pqbench.records.file import READABLE, Record, RecordFile, newest_of, read_lines, write_atomically
from pqbench.records.folders import read_folders
from pqbench.tables.summaries import frame

SUFFIX = ".jsonl.gz"
DROPPED = ("prompt_tail", "heads", "layers")  # long fields that no page uses
Run = tuple[Mapping[str, Any], Mapping[str, Any]]  # settings and first environment


@dataclass(frozen=True)
class Measured:
    """The content of one packed file: its records, their runs by key, and how they were made."""

    command: str
    date: str
    records: Sequence[Record]
    runs: Mapping[str, Run]

    def table(self) -> pd.DataFrame:
        """The records as figures need them: one row each, with the settings of the run."""
        return with_settings(frame(self.records), self.runs)


def pack(results: Path, path: Path, command: str) -> int:
    """Write the newest records of a results folder to one file. Returns their number.

    The file depends only on the records: packing the same folder again gives the same bytes.

    Raises:
        DataError: the folder does not exist or holds no records.
    """
    lines: list[dict[str, Any]] = []
    count, newest = 0, 0.0
    for folder in read_folders(results):
        file = RecordFile(folder.path).path
        records, _ = newest_of(read_lines(file))
        newest = max(newest, file.stat().st_mtime)
        lines.append({"settings": folder.settings, "environments": folder.environments, "key": folder.key})
        lines += [{"record": {name: value for name, value in r.items() if name not in DROPPED}} for r in records]
        count += len(records)
    if not count:
        raise DataError(f"no records under {results}: run `{command}` first")
    day = datetime.fromtimestamp(newest, UTC).date().isoformat()
    text = "".join(json.dumps(line) + "\n" for line in [{"command": command, "date": day}, *lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))
    return count


def unpack(path: Path) -> Measured:
    """Read a packed file.

    Raises:
        DataError: the file is damaged, or its records have a format that this version cannot read.
    """
    try:
        first, *lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        runs: dict[str, Run] = {
            line["key"]: (line["settings"], next(iter(line["environments"]), {}))
            for line in lines
            if "settings" in line
        }
        records = [line["record"] for line in lines if "record" in line]
        found = Measured(str(first["command"]), str(first["date"]), records, runs)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    foreign = {record.get("version") for record in records} - set(READABLE)
    if foreign:
        raise DataError(f"{path}: records of format {', '.join(map(str, foreign))}, which this pqbench does not read")
    return found
