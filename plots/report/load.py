"""The content of a results folder: records, configurations and environments, and the number of omitted records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pqbench.records.file import FINISHED, READABLE, Record, newest_of, read_lines
from pqbench.records.folders import measured_again, read_folders
from pqbench.tables.kinds import has_scores
from pqbench.tables.summaries import frame
from pqbench.tables.variants import with_variants

REAL_LINKS = ("auto", "local", "cuda")  # every other setting is an emulated link


@dataclass(frozen=True)
class Folder:
    """The files beside the records of one run."""

    config: dict[str, Any]
    environments: list[dict[str, Any]]

    @property
    def link(self) -> str | None:
        """The emulated link of the run's store; None if its transfers were real or there were none."""
        store = self.config.get("store")
        link = store.get("link") if isinstance(store, dict) else None
        return None if link is None or link in REAL_LINKS else str(link)


@dataclass
class Loaded:
    """A results folder in memory.

    Attributes:
        records: all records that can be read, of any kind.
        table: the records with scores; its column ``folder`` is an index into ``folders``.
        others: the records of all other kinds that say what they measured.
    """

    root: Path
    records: list[Record] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)  # folder of each record
    foreign: Counter[str] = field(default_factory=Counter)  # records of another format, by version
    broken: int = 0  # lines that are not records
    old_code: int = 0  # records of runs that were repeated with other code of the method
    older: int = 0  # records that were replaced by a newer one of the same sample
    unplaced: int = 0  # records without scores that do not say what they measured
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    others: list[Record] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """The records of failures: errors and out of memory."""
        return sum(record["status"] not in FINISHED for record in self.records)

    def left_out(self) -> list[str]:
        """The number of omitted records for each reason, in words; empty if nothing was omitted."""
        parts = [
            f"{count} of format version {version} (this pqbench reads {', '.join(map(str, READABLE))})"
            for version, count in sorted(self.foreign.items())
        ]
        for count, what in (
            (self.broken, "broken lines"),
            (self.old_code, "of older code, measured again since"),
            (self.older, "replaced by a newer record of the same sample"),
            (self.unplaced, "records without scores that do not say what they measured"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return parts


def load(root: Path) -> Loaded:
    """Read a results folder.

    Raises:
        DataError: the folder does not exist, or records in it cannot be read.
    """
    loaded = Loaded(root)
    folders = read_folders(root)
    files = [list(read_lines(folder.path / "records.jsonl")) for folder in folders]
    read = [newest_of(lines) for lines in files]
    older = measured_again(folders, [newest for newest, _ in read])
    for folder, lines, (newest, versions), hidden in zip(folders, files, read, older, strict=True):
        kept = [record for record in newest if record["sample_id"] not in hidden]
        loaded.old_code += len(hidden)
        if hidden and not kept:
            continue
        loaded.foreign.update(str(version)[:20] for version in versions)
        loaded.older += len(lines) - len(newest) - len(versions)
        loaded.broken += _written(folder.path / "records.jsonl") - len(lines)
        loaded.owner += [len(loaded.folders)] * len(kept)
        loaded.records += kept
        loaded.folders.append(Folder(folder.settings, folder.environments))
    loaded.records = with_variants(loaded.records, {folder.key: folder.settings for folder in folders})
    scored = [i for i, record in enumerate(loaded.records) if has_scores(record)]
    loaded.table = frame([loaded.records[i] for i in scored])
    loaded.table["folder"] = [loaded.owner[i] for i in scored]
    others = [record for record in loaded.records if not has_scores(record)]
    loaded.others = [record for record in others if _placed(record)]
    loaded.unplaced = len(others) - len(loaded.others)
    return loaded


def _placed(record: Record) -> bool:
    """Whether a record without a score says what it measured, in fields that can be compared."""
    context = record.get("context", record.get("length"))
    named = ("model", "budget", "link", "kernels", "threads", "dtype", "overlap", "variant", "key", "keys", "kernel")
    plain = not any(isinstance(record.get(field), list | dict) for field in named)
    numbers = type(context) is int and type(record.get("ratio")) in (int, float, type(None))
    return plain and numbers and isinstance(record.get("method"), str)


def _written(path: Path) -> int:
    """The number of non-empty lines of a file."""
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
