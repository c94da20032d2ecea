"""Computes the scores of stored predictions again, without a model: ``python -m pqbench.tables results/ --rescore``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from pqbench.benchmarks.base import Benchmark
from pqbench.errors import DataError, PqbenchError
from pqbench.records.classes import described
from pqbench.records.file import READABLE, Record, RecordFile, encode, parse, plain_json, unwritable, write_atomically
from pqbench.records.folders import run_folders, settings_of
from pqbench.records.identity import class_name
from pqbench.records.kinds import SCORES, kind_of

log = logging.getLogger(__name__)


@dataclass
class Rescored:
    """Numbers of records that were scored again, of their runs, of records whose scores changed, and of failures."""

    records: int = 0
    runs: int = 0
    changed: int = 0
    failed: int = 0


def rescore(root: Path) -> Rescored:
    """Score every stored prediction under ``root`` again.

    A file with changed scores is rewritten in one step, under its lock. Nothing else in a record changes. A run or
    record that cannot be scored is not changed, and a warning names it.

    Raises:
        DataError: ``root`` is not a folder, or a results file cannot be written.
    """
    total = Rescored()
    for folder in run_folders(root):
        file = RecordFile(folder)
        try:
            if not _holds_scores(file.path):
                continue  # the file holds figures of another kind and no predictions
            benchmark = stored_benchmark(folder)
            total.runs += 1
            _rescore_file(file, benchmark, total)
        except PqbenchError as error:
            log.warning("not rescored: %s", error)
            total.failed += 1
        except OSError as error:
            raise unwritable(folder, error) from error
    return total


def _holds_scores(path: Path) -> bool:
    """Whether a file holds records with scores. The answer is also True if the file does not show what it holds."""
    first = next(filter(None, map(parse, path.read_bytes().split(b"\n"))), None)
    return first is None or kind_of(first) == SCORES


def stored_benchmark(folder: Path) -> Benchmark:
    """The benchmark that the ``config.yaml`` of a run folder names. It is made from the class that has this name now.

    The file is not trusted: only classes that conf/benchmark/ describes are made from it, with plain values as options.
    The module that it names may no longer exist.

    Raises:
        DataError: the file is missing or damaged, names a class that is not a benchmark, or has options that no longer
            fit.
    """
    config, node = folder / "config.yaml", settings_of(folder).get("benchmark")
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise DataError(f"{config} names no benchmark: it is missing or damaged")
    name = class_name(node["_target_"])
    known = described("benchmark").get(name)
    if known is None:
        raise DataError(f"{config} names the class {name!r}, which no yaml of conf/benchmark describes: refused")
    kind = get_class(known.target)
    if not issubclass(kind, Benchmark):
        raise DataError(f"{config} names {name!r}, whose records hold no predictions: refused")
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
