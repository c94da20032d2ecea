"""The command ``python -m pqbench.tables results/``: all tables of a results folder."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pqbench.errors import DataError, PqbenchError
from pqbench.records.file import Record, read_all
from pqbench.records.folders import read_folders
from pqbench.records.kinds import FIDELITY, kind_of
from pqbench.tables.document import document, wide
from pqbench.tables.kinds import flat, has_scores
from pqbench.tables.summaries import frame
from pqbench.tables.variants import with_variants
from pqbench.terminal import log_to_terminal

log = logging.getLogger("pqbench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a results folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pqbench.tables", description="Records to tables.")
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write one row per run (without scores: per record) to this file"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print markdown (the default)")
    form.add_argument("--latex", action="store_true", help="print LaTeX instead (package booktabs)")
    parser.add_argument(
        "--relative", metavar="METHOD", help="also show fidelity as multiples of METHOD's, document by document"
    )
    parser.add_argument(
        "--all-code", action="store_true", help="also show runs that were measured again with newer code of the method"
    )
    parser.add_argument("--rescore", action="store_true", help="first compute all scores again from stored predictions")
    options = parser.parse_args(arguments)
    log_to_terminal()
    try:
        failed = _rescore(options.results) if options.rescore else 0
        folders = read_folders(options.results)
        records = read_all(options.results, options.all_code, folders)
        records = with_variants(records, {folder.key: folder.settings for folder in folders})
        if not records:
            raise DataError(f"no records under {options.results}: nothing was measured yet")
        others = [record for record in records if not has_scores(record)]
        if options.relative is not None:
            _check_base(options.relative, others)
        table = frame([record for record in records if has_scores(record)])
        if options.csv:
            parts = [part for part in (wide(table), pd.DataFrame(flat(others))) if not part.empty]
            _write_csv(pd.concat(parts), options.csv)
        print_document(document(table, others, latex=options.latex, base=options.relative))
    except PqbenchError as error:
        log.error(error)
        return 1
    return 1 if failed else 0


def _rescore(results: Path) -> int:
    from pqbench.tables.rescore import rescore  # loads the benchmarks, which tables do not need

    total = rescore(results)
    counts = f"{total.changed} scores changed, {total.failed} runs or records could not be scored"
    log.info("rescored %d records of %d runs: %s", total.records, total.runs, counts)
    return total.failed


def _check_base(base: str, records: Sequence[Record]) -> None:
    """Raises DataError when the method ``base`` has no fidelity records."""
    known = dict.fromkeys(str(record["method"]) for record in records if kind_of(record) == FIDELITY)
    if base not in known:
        there = f"there are {', '.join(known)}" if known else "there are no fidelity records"
        raise DataError(f"--relative: no fidelity records of {base!r}: {there}")


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    try:
        table.to_csv(path, index=False)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def print_document(text: str) -> None:
    """Write to standard output. It is not an error when the reader has closed it (``| head``)."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's flush raises nothing
