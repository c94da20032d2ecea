"""Records to tables: ``python -m pqbench.tables results/``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from pqbench.errors import PqbenchError
from pqbench.records import Record, read_all

log = logging.getLogger("pqbench")

# Column -> (heading, format). Means over samples; timings are medians.
COLUMNS = {
    "score": ("score", "{:.1f}"),
    "mass": ("mass", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "output_error": ("output error", "{:.3f}"),
    "ttft_s": ("TTFT s", "{:.2f}"),
    "tt2t_s": ("TT2T s", "{:.2f}"),
    "tpot_s": ("TPOT ms", "{:.1f}"),
    "attended_tokens": ("attended", "{:.0f}"),
    "index_bytes": ("index MB", "{:.2f}"),
    "kv_bytes": ("KV MB", "{:.1f}"),
}
_SCALE = {"tpot_s": 1e3, "index_bytes": 1e-6, "kv_bytes": 1e-6}
_MEDIANS = {"ttft_s", "tt2t_s", "tpot_s"}
_KEYS = ["benchmark", "model", "method", "budget", "question", "key"]


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """Records as a table, one row each; columns that a record lacks are empty."""
    table = pd.DataFrame(list(records))
    for column in (*_KEYS, "status", "task", "sample_id", "score", *COLUMNS):
        if column not in table:
            table[column] = None
    both = table.reindex(columns=["device_bytes", "host_bytes"]).apply(pd.to_numeric)
    table["kv_bytes"] = both.sum(axis=1, min_count=1)
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run (benchmark, model, method, configuration), in the order runs first appear."""
    rows = []
    for key, group in table.groupby(_KEYS, sort=False, dropna=False):
        good = group[group["status"] == "ok"]
        row = dict(zip(_KEYS, key, strict=True)) | {"n": len(good), "failed": len(group) - len(good)}
        for column in COLUMNS:
            values = pd.to_numeric(good[column], errors="coerce").dropna() * _SCALE.get(column, 1)
            row[column] = (values.median() if column in _MEDIANS else values.mean()) if len(values) else None
        rows.append(row)
    return pd.DataFrame(rows)


def bench_table(records: Sequence[Record]) -> Table:
    """The table a run prints, one row per method."""
    summary = summarise(frame(records))
    title = "" if summary.empty else f"{summary['benchmark'].iloc[0]} on {summary['model'].iloc[0]}"
    table = Table(title=title)
    for heading in ("method", "budget", "n", *(heading for heading, _ in COLUMNS.values())):
        table.add_column(heading, justify="left" if heading in ("method", "budget") else "right", no_wrap=True)
    for _, row in summary.iterrows():
        count = f"{row['n']}" + (f" (+{row['failed']} failed)" if row["failed"] else "")
        # Text, not str: names and predictions are never markup.
        cells = [str(row["method"]), str(row["budget"]), count, *(_cell(row[c], form) for c, (_, form) in COLUMNS.items())]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _cell(value: object, form: str) -> str:
    return "-" if value is None or pd.isna(value) else form.format(value)  # type: ignore[call-overload]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a results folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pqbench.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
    try:
        summary = summarise(frame(read_all(options.results)))
    except PqbenchError as error:
        log.error(error)
        return 1
    if options.csv:
        summary.to_csv(options.csv, index=False)
    sys.stdout.write(markdown(summary) + "\n")
    return 0


def markdown(summary: pd.DataFrame) -> str:
    """A summary as a markdown table."""
    shown = summary.drop(columns=["failed"], errors="ignore").rename(columns={c: h for c, (h, _) in COLUMNS.items()})
    return str(shown.to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    sys.exit(main())
