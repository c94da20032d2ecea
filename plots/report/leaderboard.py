"""Runs as rows: quality, fidelity, time and bytes of every method, model, benchmark and budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from plots.report.load import Loaded
from plots.report.text import name
from plots.style import BASELINE
from pqbench.tables.summaries import COSTS, KEYS, Run, Suite, suites

# Field of a row -> (heading, unit, factor, format, explanation).
Column = tuple[str, str, float, str, str]
COLUMNS: dict[str, Column] = {
    "score": ("score", "%", 1, "{:.1f}", "mean over samples"),
    "average": (
        "average",
        "%",
        1,
        "{:.1f}",
        "mean over tasks, if no task is missing; for LongBench the official mean of its groups",
    ),
    "mass": ("mass", "", 1, "{:.3f}", "share of the attention probability that fell on attended tokens"),
    "recall": ("recall", "", 1, "{:.3f}", "share of the exact top-k that was attended"),
    "output_error": ("output error", "", 1, "{:.3f}", "relative error of the attention output"),
    "ttft_s": ("TTFT", "s", 1, "{:.2f}", "median time to the first token; methods that ran together share a prefill"),
    "tt2t_s": (
        "TT2T",
        "s",
        1,
        "{:.2f}",
        "median time to the second token; it includes the time that a method adds to the prefill",
    ),
    "tpot_s": ("TPOT", "ms", 1e3, "{:.1f}", "median time per output token"),
    "step_bytes": (
        "read",
        "MB/step",
        1e-6,
        "{:.2f}",
        "bytes that a decode step reads in all layers: index, and attended keys and values; counted, not measured",
    ),
    "link_bytes": ("link", "MB/step", 1e-6, "{:.2f}", "bytes over the link between host and device"),
    "kv_bytes": ("KV", "MB", 1e-6, "{:.1f}", "bytes of keys and values held on device and host"),
}


@dataclass(frozen=True)
class Row:
    """One run: its names for readers, its figures in the units of the records, and what distinguishes it from other
    runs."""

    names: dict[str, str]  # benchmark, model, method, budget, question, key
    run: Run
    figures: dict[str, float | None]
    folder: int
    emulated: str | None  # the link whose times are modelled

    def shown(self, column: str) -> str:
        """A figure in its unit; a dash if there is none."""
        _, _, factor, form, _ = COLUMNS[column]
        value = self.figures.get(column)
        return "-" if value is None else form.format(value * factor)


@dataclass(frozen=True)
class Board:
    """Rows of one benchmark on one model."""

    suite: Suite
    rows: list[Row]


def boards(loaded: Loaded) -> list[Board]:
    """All scored runs, by benchmark and model."""
    table = loaded.table.assign(step_bytes=step_bytes(loaded.table), link_bytes=_numbers(loaded.table, "link_bytes"))
    good = table[table["status"] == "ok"]
    read = good.groupby(KEYS, sort=False)[["step_bytes", "link_bytes"]].mean().to_dict("index")
    folders = table.groupby(KEYS, sort=False)["folder"].last()
    found = []
    needed = [*KEYS, "task", "sample_id", "status", "score", "scores", "too_short", *COSTS]
    # Without long texts, and with strings as plain objects, cutting the table into runs and tasks takes half the time.
    for suite in suites(loaded.table.reindex(columns=needed).astype(dict.fromkeys([*KEYS, "task"], object))):
        rows = []
        for run in suite.runs:
            place = tuple(run.names[key] for key in KEYS)
            folder = int(folders[place])
            rows.append(_row(loaded, suite, run, read.get(place, {}), folder))
        found.append(Board(suite, sorted(rows, key=_order)))
    return found


def columns(found: list[Board]) -> list[str]:
    """The columns of :data:`COLUMNS` that some row fills."""
    rows = [row for board in found for row in board.rows]
    return [column for column in COLUMNS if any(row.figures.get(column) is not None for row in rows)]


def step_bytes(table: pd.DataFrame) -> pd.Series:
    """Bytes that a decode step reads: the index, and the attended rows. The size of a row is the average of the rows
    kept: on the host if a host store keeps them all, otherwise on the device."""
    kept = _numbers(table, "host_bytes").where(lambda size: size > 0, _numbers(table, "device_bytes"))
    row = kept / _numbers(table, "kv_tokens").where(lambda count: count > 0)
    return _numbers(table, "index_bytes") + _numbers(table, "attended_tokens") * row


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    values = table[column] if column in table else pd.Series(None, index=table.index, dtype=object)
    return pd.to_numeric(values, errors="coerce").astype(float)


def _order(row: Row) -> tuple[bool, str, float]:
    """The order of the rows: full attention first, then by method and by the number in the budget."""
    number = re.search(r"\d+(\.\d+)?", row.names["budget"])
    return row.names["method"] != BASELINE, row.names["method"], float(number[0]) if number else 0.0


def _row(loaded: Loaded, suite: Suite, run: Run, bytes_read: Mapping[Any, Any], folder: int) -> Row:
    names = {key: name(value) for key, value in run.names.items()} | {"benchmark": name(suite.benchmark)}
    average = run.scores.get(suite.benchmark) or run.scores.get("mean")
    figures = run.costs | dict(bytes_read) | {"score": run.score, "average": average.value if average else None}
    plain = {column: _number(figures.get(column)) for column in COLUMNS}
    link = loaded.folders[folder].link
    return Row(names, run, plain, folder, name(link) if link else None)


def _number(value: float | None) -> float | None:
    return None if value is None or pd.isna(value) else float(value)
