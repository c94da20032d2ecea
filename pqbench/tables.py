"""Records to tables: ``python -m pqbench.tables results/``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from pqbench.errors import DataError, PqbenchError
from pqbench.records import Record, read_all
from pqbench.summaries import COSTS, KEYS, Run, Suite, frame, suites, summarise
from pqbench.terminal import latex_table, log_to_terminal, markdown, markdown_table, plain
from pqbench.timings import flat, is_timing, sections

__all__ = ["bench_table", "frame", "main", "suites", "summarise", "wide"]

log = logging.getLogger("pqbench")

# Column -> (heading, factor, format).
SHOWN = {
    "score": ("score", 1, "{:.1f}"),
    "mass": ("mass", 1, "{:.3f}"),
    "recall": ("recall", 1, "{:.3f}"),
    "output_error": ("output error", 1, "{:.3f}"),
    "ttft_s": ("TTFT s", 1, "{:.2f}"),
    "tt2t_s": ("TT2T s", 1, "{:.2f}"),
    "tpot_s": ("TPOT ms", 1e3, "{:.1f}"),
    "attended_tokens": ("attended", 1, "{:.0f}"),
    "index_bytes": ("index MB", 1e-6, "{:.2f}"),
    "kv_bytes": ("KV MB", 1e-6, "{:.1f}"),
}


FIRST = [*KEYS, "n", "failed", "score"]


def bench_table(records: Sequence[Record]) -> Table:
    """The table a run prints, one row per method."""
    summary = summarise(frame(records))
    title = "" if summary.empty else f"{summary['benchmark'].iloc[0]} on {summary['model'].iloc[0]}"
    table = Table(title=Text(title))
    for heading in ("method", "budget", "n", *(SHOWN[column][0] for column in ("score", *COSTS))):
        table.add_column(heading, justify="left" if heading in ("method", "budget") else "right", no_wrap=True)
    for _, row in summary.iterrows():
        cells = [row["method"], row["budget"], _count(row["n"], row["failed"])]
        cells += [_figure(row[column], column) for column in ("score", *COSTS)]
        table.add_row(*(Text(plain(cell)) for cell in cells))  # Text, not str: a name is never markup
    return table


def score_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """Headings, rows and number of label columns of a suite's scores: mean [95 % interval] n."""
    headings = [*suite.labels, "n", *suite.columns]
    rows = [
        [*_labels(suite, run), _count(run.n, run.failed), *(str(run.scores.get(name, "-")) for name in suite.columns)]
        for run in suite.runs
    ]
    return headings, rows, len(suite.labels)


def further_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """The same for scores beside the official one (other metrics, length buckets), one row per run and task."""
    names = list(dict.fromkeys(name for run in suite.runs for other in run.further.values() for name in other))
    rows = [
        [*_labels(suite, run), task, *(str(other.get(name, "-")) for name in names)]
        for run in suite.runs
        for task, other in run.further.items()
        if names
    ]
    return [*suite.labels, "task", *names], rows, len(suite.labels) + 1


def cost_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """The same for fidelity, time and memory: means, and medians of timings."""
    headings = [*suite.labels, *(SHOWN[column][0] for column in COSTS)]
    rows = [[*_labels(suite, run), *(_figure(run.costs.get(name), name) for name in COSTS)] for run in suite.runs]
    return headings, rows, len(suite.labels)


def document(
    table: pd.DataFrame, timed: Sequence[Record] = (), *, latex: bool = False, base: str | None = None
) -> str:  # fmt: skip
    """All tables of a results folder as markdown or LaTeX: scored records as a frame, timing records as they are, those
    of fidelity also as multiples of a ``base`` method."""
    parts = []
    for suite in suites(table):
        kinds = [("scores, mean [95 % interval] and n", score_rows(suite)), ("other scores", further_rows(suite)),
                 ("costs", cost_rows(suite))]  # fmt: skip
        parts += [(f"{suite.benchmark} on {suite.model}: {kind}", *found) for kind, found in kinds]
    parts += [(section.title, section.headings, section.rows, section.labels) for section in sections(timed, base)]
    return "\n\n".join(
        latex_table(headings, rows, labels, title) if latex
        else f"### {markdown(title)}\n\n{markdown_table(headings, rows, labels)}"
        for title, headings, rows, labels in parts if rows
    )  # fmt: skip


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: names, counts, mean score, every task and average with ``_low``, ``_high`` and ``_n``, and costs
    in the units of the records. Columns of other benchmarks are empty."""
    rows = []
    for suite in suites(table):
        for run in suite.runs:
            row: dict[str, object] = run.names | {
                "benchmark": suite.benchmark,
                "n": run.n,
                "failed": run.failed,
                "score": run.score,
            }
            for name, estimate in run.scores.items():
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high,
                        f"{name}_n": estimate.n}  # fmt: skip
            rows.append(row | run.costs)
    found = pd.DataFrame(rows)
    scores = [name for name in found if name not in (*FIRST, *COSTS)]
    return found.reindex(columns=[*FIRST, *scores, *COSTS])


def _labels(suite: Suite, run: Run) -> list[str]:
    return [run.names[label] for label in suite.labels]


def _count(good: int, failed: int) -> str:
    return f"{good}" + (f" (+{failed} failed)" if failed else "")


def _figure(value: float | None, column: str) -> str:
    _, factor, form = SHOWN[column]
    return "-" if value is None or pd.isna(value) else form.format(value * factor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a results folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pqbench.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write one row per run (timings: per record) to this file"
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
        records = read_all(options.results, options.all_code)
        if not records:
            raise DataError(f"no records under {options.results}: nothing was measured yet")
        timed = [record for record in records if is_timing(record.get("benchmark"))]
        if options.relative is not None:
            _check_base(options.relative, timed)
        table = frame([record for record in records if not is_timing(record.get("benchmark"))])
        if options.csv:
            parts = [part for part in (wide(table), pd.DataFrame(flat(timed))) if not part.empty]
            _write_csv(pd.concat(parts), options.csv)
        print_document(document(table, timed, latex=options.latex, base=options.relative))
    except PqbenchError as error:
        log.error(error)
        return 1
    return 1 if failed else 0


def _rescore(results: Path) -> int:
    from pqbench.rescore import rescore  # loads the benchmarks, which plain tables do not need

    total = rescore(results)
    counts = f"{total.changed} scores changed, {total.failed} runs or records could not be scored"
    log.info("rescored %d records of %d runs: %s", total.records, total.runs, counts)
    return total.failed


def _check_base(base: str, timed: Sequence[Record]) -> None:
    """Raises DataError when there is nothing to compare with."""
    known = dict.fromkeys(str(record["method"]) for record in timed if record["benchmark"] == "fidelity")
    if base not in known:
        there = f"there are {', '.join(known)}" if known else "there are no fidelity records"
        raise DataError(f"--relative: no fidelity records of {base!r}: {there}")


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    try:
        table.to_csv(path, index=False)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def print_document(text: str) -> None:
    """Write to standard output; a reader that left (``| head``) is no error."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's own flush is quiet


if __name__ == "__main__":
    sys.exit(main())
