"""Append-only results: one JSON object a line, one folder per configuration, named by a hash of what can change a figure."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from pqbench.errors import DataError

log = logging.getLogger(__name__)

VERSION = 1  # of the record format; part of every key, so that formats never mix in one file
Record = dict[str, Any]


def run_key(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a configuration; equal for equal settings in any order."""
    text = json.dumps({"version": VERSION, **settings}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RecordFile:
    """The records of one method on one benchmark and model, at ``root/<benchmark>/<model>/<method>-<key>/``."""

    folder: Path

    @classmethod
    def create(cls, root: Path, benchmark: str, model: str, method: str, settings: Mapping[str, Any]) -> RecordFile:
        """The file for these settings, its folder made ready with ``config.yaml`` and ``environment.json``.

        Raises:
            DataError: the results folder cannot be written.
        """
        parts = (plain_name(benchmark), plain_name(model), f"{plain_name(method)}-{run_key(settings)}")
        folder = root.joinpath(*parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings), sort_keys=False))
            (folder / "environment.json").write_text(json.dumps(environment(), indent=1))
        except OSError as error:
            raise DataError(f"cannot write results to {folder}: {error.strerror}; set results=FOLDER to one you may "
                            "write") from error  # fmt: skip
        return cls(folder)

    @property
    def path(self) -> Path:
        """The jsonl file itself."""
        return self.folder / "records.jsonl"

    def read(self) -> list[Record]:
        """The newest record of every sample, in the order samples first appeared. Broken lines are counted and skipped."""
        newest: dict[str, Record] = {}
        for record in read_lines(self.path):
            newest[record["sample_id"]] = record
        return list(newest.values())

    def done(self, retry_failed: bool) -> set[str]:
        """Samples that need not run again."""
        return {r["sample_id"] for r in self.read() if r["status"] == "ok" or not retry_failed}

    def append(self, record: Record) -> None:
        """Write one line durably. A sample that another process finished meanwhile is not written twice."""
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        with FileLock(f"{self.path}.lock"):
            if any(r["sample_id"] == record["sample_id"] and r["status"] == "ok" for r in self.read()):
                return
            with self.path.open("ab+") as file:
                if file.tell() and not _ends_with_newline(file):
                    file.write(b"\n")  # a line cut by a kill stays alone
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[Record]:
    """Records of a jsonl file, broken lines skipped with one warning that counts them."""
    if not path.exists():
        return
    broken = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not {"sample_id", "status"} <= record.keys():
                raise ValueError("not a record")
        except (ValueError, AttributeError):
            broken.append(number)
            continue
        yield record
    if broken:
        log.warning("%s: skipped %d broken line(s) %s; their samples run again", path, len(broken), broken[:5])


def read_all(root: Path) -> list[Record]:
    """Every record under a results folder. Records of another format version are skipped with a warning.

    Raises:
        DataError: the folder does not exist.
    """
    if not root.is_dir():
        raise DataError(f"no results folder {root}: run `python -m pqbench` first, or name another folder")
    records, foreign = [], 0
    for path in sorted(root.glob("*/*/*/records.jsonl")):
        for record in RecordFile(path.parent).read():
            if record.get("version") == VERSION:
                records.append(record)
            else:
                foreign += 1
    if foreign:
        log.warning("%s: left out %d record(s) of another format version", root, foreign)
    return records


def environment() -> dict[str, Any]:
    """What a figure may depend on besides its configuration."""
    packages = ("pqbench", "torch", "transformers", "numba", "lm-eval")
    installed = {name: metadata.version(name) for name in packages if _installed(name)}
    return {
        "packages": installed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def plain_name(text: str) -> str:
    """A name that is safe as one path component."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    return safe or "_"


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the checkout this package lies in, with + when it has local changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
