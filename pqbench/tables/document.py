"""Makes tables from records: for a terminal, as markdown, as LaTeX, and with one row per run."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.table import Table
from rich.text import Text

from pqbench.records.file import Record
from pqbench.records.kinds import TOO_SHORT
from pqbench.tables.kinds import has_scores, sections
from pqbench.tables.summaries import COSTS, KEYS, Run, Suite, frame, suites, summarise
from pqbench.terminal import latex_table, markdown, markdown_table, plain

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


FIRST = [*KEYS, "n", "failed", "too_short", "score"]


def run_table(records: Sequence[Record]) -> Table:
    """The table that a run prints: one table for each kind of record that it wrote, one below the other."""
    grid = Table.grid()
    scored = [record for record in records if has_scores(record)]
    if scored:
        grid.add_row(scores_table(scored))
    for section in sections(records):
        grid.add_row(section.rich())
    return grid


def scores_table(records: Sequence[Record]) -> Table:
    """Scores and costs for a terminal, one row per method."""
    summary = summarise(frame(records))
    title = "" if summary.empty else f"{summary['benchmark'].iloc[0]} on {summary['model'].iloc[0]}"
    short = f"{TOO_SHORT} for the method to skip anything" if summary["too_short"].any() else None
    table = Table(title=Text(title), caption=short)
    for heading in ("method", "budget", "n", *(SHOWN[column][0] for column in ("score", *COSTS))):
        table.add_column(heading, justify="left" if heading in ("method", "budget") else "right", no_wrap=True)
    for _, row in summary.iterrows():
        dense = f" ({row['too_short']} dense)" if row["too_short"] else ""  # short, because a terminal has little room
        cells = [row["method"], row["budget"], _count(row["n"], row["failed"]) + dense]
        cells += [_figure(row[column], column) for column in ("score", *COSTS)]
        table.add_row(*(Text(plain(cell)) for cell in cells))  # Text, not str: a name is never markup
    return table


def score_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """Headings, rows and number of label columns of a suite's scores. A score is shown as mean [95 % interval] n."""
    headings = [*suite.labels, "n", *suite.columns]
    rows = [
        [
            *_labels(suite, run),
            _count(run.n, run.failed, run.too_short),
            *(str(run.scores.get(name, "-")) for name in suite.columns),
        ]
        for run in suite.runs
    ]
    return headings, rows, len(suite.labels)


def further_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """The same for scores in addition to the official score (other metrics, length buckets), with one row per run and
    task."""
    names = list(dict.fromkeys(name for run in suite.runs for other in run.further.values() for name in other))
    rows = [
        [*_labels(suite, run), task, *(str(other.get(name, "-")) for name in names)]
        for run in suite.runs
        for task, other in run.further.items()
        if names
    ]
    return [*suite.labels, "task", *names], rows, len(suite.labels) + 1


def cost_rows(suite: Suite) -> tuple[list[str], list[list[str]], int]:
    """The same for fidelity, time and memory. Timings are medians, and all other figures are means."""
    headings = [*suite.labels, *(SHOWN[column][0] for column in COSTS)]
    rows = [[*_labels(suite, run), *(_figure(run.costs.get(name), name) for name in COSTS)] for run in suite.runs]
    return headings, rows, len(suite.labels)


def document(
    table: pd.DataFrame, others: Sequence[Record] = (), *, latex: bool = False, base: str | None = None
) -> str:
    """All tables of a results folder as markdown or LaTeX.

    Args:
        table: the records with scores, as :func:`pqbench.tables.summaries.frame` makes it.
        others: the records of all other kinds.
        latex: LaTeX instead of markdown.
        base: a method; the fidelity figures of the others are also shown as multiples of its figures.
    """
    parts = []
    for suite in suites(table):
        kinds = [
            ("scores, mean [95 % interval] and n", score_rows(suite)),
            ("other scores", further_rows(suite)),
            ("costs", cost_rows(suite)),
        ]
        parts += [(f"{suite.benchmark} on {suite.model}: {kind}", *found) for kind, found in kinds]
    parts += [(section.title, section.headings, section.rows, section.labels) for section in sections(others, base)]
    return "\n\n".join(
        latex_table(headings, rows, labels, title)
        if latex
        else f"### {markdown(title)}\n\n{markdown_table(headings, rows, labels)}"
        for title, headings, rows, labels in parts
        if rows
    )


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: names, counts, mean score, costs in the units of the records, and every task and average with
    ``_low``, ``_high`` and ``_n``. Columns of other benchmarks are empty."""
    rows = []
    for suite in suites(table):
        for run in suite.runs:
            row: dict[str, object] = run.names | {
                "benchmark": suite.benchmark,
                "n": run.n,
                "failed": run.failed,
                "too_short": run.too_short,
                "score": run.score,
            }
            for name, estimate in run.scores.items():
                row |= {
                    name: estimate.value,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                    f"{name}_n": estimate.n,
                }
            rows.append(row | run.costs)
    found = pd.DataFrame(rows)
    scores = [name for name in found if name not in (*FIRST, *COSTS)]
    return found.reindex(columns=[*FIRST, *scores, *COSTS])


def _labels(suite: Suite, run: Run) -> list[str]:
    return [run.names[label] for label in suite.labels]


def _count(good: int, failed: int, too_short: int = 0) -> str:
    """The number of samples, the number of failures, and the number of samples in which the method could not skip
    anything."""
    dense = f" ({TOO_SHORT})" if too_short == good else f" ({too_short} {TOO_SHORT})"
    return f"{good}" + (dense if too_short else "") + (f" (+{failed} failed)" if failed else "")


def _figure(value: float | None, column: str) -> str:
    _, factor, form = SHOWN[column]
    return "-" if value is None or pd.isna(value) else form.format(value * factor)
