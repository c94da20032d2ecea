"""Scores of stored predictions computed again, without a model: ``python -m pqbench.tables results/ --rescore``."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pqbench.benchmarks.base import Benchmark
from pqbench.errors import DataError, PqbenchError
from pqbench.records.file import READABLE, Record, RecordFile, encode, parse, plain_json, unwritable, write_atomically
from pqbench.records.folders import run_folders

log = logging.getLogger(__name__)

_UNSCORED = re.compile(r"_target_: pqbench\.(timing|fidelity)\.")
_TARGET = re.compile(r"pqbench\.benchmarks\.[a-z_0-9]+\.[A-Za-z_0-9]+")


@dataclass
class Rescored:
    """How many records were scored again, in how many runs, and for how many the scores changed."""

    records: int = 0
    runs: int = 0
    changed: int = 0
    failed: int = 0


def rescore(root: Path) -> Rescored:
    """Score every stored prediction under ``root`` again.

    A file whose scores changed is rewritten at once and under its lock. Nothing else in a record changes; a run or
    record that cannot be scored stays as it is, with a warning.

    Raises:
        DataError: ``root`` is no folder, or a results file cannot be written.
    """
    total = Rescored()
    for folder in run_folders(root):
        if _UNSCORED.search(_text(folder / "config.yaml")):
            continue  # timings and fidelity hold figures, not predictions
        try:
            benchmark = stored_benchmark(folder / "config.yaml")
        except PqbenchError as error:
            log.warning("not rescored: %s", error)
            total.failed += 1
            continue
        total.runs += 1
        try:
            _rescore_file(RecordFile(folder), benchmark, total)
        except OSError as error:
            raise unwritable(folder, error) from error
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def stored_benchmark(config: Path) -> Benchmark:
    """The benchmark that a run folder's ``config.yaml`` names.

    The file is data from disk: only classes of ``pqbench.benchmarks`` are made from it, with plain values as options.

    Raises:
        DataError: the file is missing or damaged, names something else, or its options no longer fit.
    """
    try:
        node = yaml.safe_load(config.read_bytes())["benchmark"]
        target = str(node["_target_"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{config} names no benchmark ({type(error).__name__})") from error
    module, _, name = target.rpartition(".")
    if not _TARGET.fullmatch(target):
        raise DataError(f"{config} names {target!r}, which is no class of pqbench.benchmarks: refused")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{config} names {target!r}, which this version of pqbench lacks") from error
    if not (isinstance(kind, type) and issubclass(kind, Benchmark) and kind.__module__ == module):
        raise DataError(f"{config} names {target!r}, which is no benchmark: refused")
    try:
        return kind(**{option: value for option, value in node.items() if option != "_target_"})
    except (TypeError, ValueError, PqbenchError) as error:
        raise DataError(f"{config} does not fit {name} of this version: {error}") from error


def _rescore_file(file: RecordFile, benchmark: Benchmark, total: Rescored) -> None:
    with file.lock():
        lines = file.path.read_bytes().split(b"\n")
        changed, problems = 0, []
        for i, line in enumerate(lines):
            record = parse(line)
            if not record or record["status"] != "ok" or record.get("version") not in READABLE:
                continue
            try:
                scores = _scores(benchmark, record)
            except DataError as error:
                problems.append(f"line {i + 1}: {error}")
                continue
            total.records += 1
            if scores != record.get("scores") or scores["score"] != record.get("score"):
                lines[i] = encode(record | {"score": scores["score"], "scores": scores}).rstrip(b"\n")
                changed += 1
        if changed:
            write_atomically(file.path, b"\n".join(lines))
    total.changed += changed
    total.failed += len(problems)
    if problems:
        log.warning("not rescored: %d record(s) of %s, the first on %s", len(problems), file.path, problems[0])


def _scores(benchmark: Benchmark, record: Record) -> Mapping[str, Any]:
    try:
        scores: Mapping[str, Any] = plain_json(benchmark.score(record))
        scores["score"]
    except (PqbenchError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{type(error).__name__}: {error}") from error
    return scores
