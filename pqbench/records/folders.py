"""Run folders, which hold records, settings and environments, and the search for records that were measured again with
other code."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pqbench.errors import DataError
from pqbench.records.identity import class_names
from pqbench.records.stamp import last_started

log = logging.getLogger(__name__)

CONFIG_LIMIT = 1 << 20  # largest size in bytes of a configuration that is read; ours have about two thousand
_WORTH = {"ok": 2, "refused": 1}  # of a record by its status; a failure is worth 0
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both accept the same files; the C loader is ten times as fast


def key_of(folder: Path) -> str:
    """The key of a run, with which the name of its folder ends."""
    return folder.name.rpartition("-")[2]


def run_folders(root: Path) -> list[Path]:
    """The folders under ``root`` that hold records, in alphabetical order.

    Raises:
        DataError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise DataError(f"no results folder {root}: run `python -m pqbench` first, or name another folder")
    return [path.parent for path in sorted(root.rglob("records.jsonl"))]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, with the settings behind its key. The settings are empty if they cannot be read."""

    path: Path
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """The key of the run."""
        return key_of(self.path)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The environments in which the run was measured, oldest first."""
        return environments(self.path / "environment.json")


def read_folders(root: Path) -> list[RunFolder]:
    """Every run folder under ``root``, with its configuration.

    Raises:
        DataError: ``root`` is not a folder.
    """
    return [RunFolder(path, settings_of(path)) for path in run_folders(root)]


def environments(path: Path) -> list[dict[str, Any]]:
    """The environments that an ``environment.json`` lists, oldest first; none when it is absent or damaged."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    listed = known if isinstance(known, list) else [known]
    return [one for one in listed if isinstance(one, dict)]


def measured_again(folders: Sequence[RunFolder], records: Sequence[Sequence[Mapping[str, Any]]]) -> list[set[str]]:
    """The samples of each folder that were measured again with other code of the method or by another version of
    pqbench. That is the case if another folder has the same settings, its run was started later, and its record of the
    sample is worth at least as much: a measurement is worth more than a refusal, and a refusal more than a failure.

    Args:
        folders: the folders to compare.
        records: for each folder, the newest record of every sample.
    """
    runs: dict[str, list[int]] = {}
    for i, folder in enumerate(folders):
        if folder.settings:
            place = [str(folder.path.parent), folder.path.name.rpartition("-")[0]]
            runs.setdefault(json.dumps([*place, _bare(folder.settings)], sort_keys=True), []).append(i)
    hidden: list[set[str]] = [set() for _ in folders]
    kept = 0
    for members in runs.values():
        best: dict[str, int] = {}
        newest_first = sorted(members, key=lambda i: last_started(folders[i].path), reverse=True)
        for i in newest_first:
            for record in records[i]:
                worth, sample = _WORTH.get(record["status"], 0), record["sample_id"]
                if worth <= best.get(sample, -1):
                    hidden[i].add(sample)
                else:
                    best[sample] = worth
                    kept += i != newest_first[0]
    if kept:
        log.warning(
            "%d record(s) of older code are kept, since the code of the newest run has not finished their samples", kept
        )
    return hidden


def tell_of_older(folder: Path, settings: Mapping[str, Any]) -> None:
    """Warn when a new run repeats an old run, and say why."""
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/records.jsonl")):
        known = settings_of(path.parent)
        if path.parent != folder and known and _bare(known) == _bare(settings):
            reason = "by other code of the method" if "code" in known else "by an older version of pqbench"
            log.warning("%s: measured %s; this run measures again in %s", path.parent, reason, folder.name)


def _bare(settings: Mapping[str, Any]) -> Any:
    """The settings without the method's code."""
    return json.loads(json.dumps(class_names({n: v for n, v in settings.items() if n != "code"}), default=str))


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run; empty if its configuration is absent, damaged, far too large, or has no settings."""
    path = folder / "config.yaml"
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            return {}
        found = yaml.load(path.read_bytes(), Loader=_LOADER)  # a safe loader
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
