"""The page of ``experiment=ablation``: the effect of each part of ``pqcache_plus``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from plots.ablation import draw, grid, parted, rail, shared
from plots.data import families
from plots.fidelity import measured as of_fidelity
from plots.pages.packed import Measured
from plots.pages.source import filled, good, heading, origin, picture
from plots.style import tokens
from pqbench.records.file import Record
from pqbench.terminal import markdown_table

TITLE = "Ablation of pqcache_plus"
FIELDS = (
    ("output_error", "Error of the attention output"),
    ("kl", "KL of the next token, with the method in all layers"),
)
INTRODUCTION = """\
`pqcache_plus` differs from PQCache in its codebooks (trained for the queries of the prompt), in the number of
sub-spaces and bits, in the spread of the keys around their centroids, and in the tail, which is an estimate of
the output that the unselected tokens would have added. Here each part is switched on and off over one shared
prefill. A figure is the result of a variant divided by the result of the exact top-k on the same documents and
budget: below 1 the variant is better than the exact top-k."""
READING = """\
Rows are codebooks with their number of sub-spaces and bits. Columns are tails: `none` has no tail, `mean` uses
the mean value of the unselected tokens, `pq` uses quantised values weighted by approximate scores, and
`sampled` uses a random sample whose tokens count towards the budget. There are few documents, so small
differences mean nothing."""


def tables(measured: Measured) -> list[tuple[str, str]]:
    """Title and table of each measured field: codebook, sub-spaces and bits by tail."""
    table = families(of_fidelity(measured.table()))
    run = parted(table)
    exact = rail(table, run)
    found = []
    for field, title in FIELDS:
        cells = grid(shared(run, exact), exact, field)
        rows = [[" ".join(str(name).split()), *map(_figure, cells.loc[name])] for name in cells.index]
        found.append((title, markdown_table(["codebook, m x b", *map(str, cells.columns)], rows, 1)))
    return found


def _figure(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"


def page(measured: Measured) -> str:
    """The whole page in markdown."""
    records = good(measured.records)
    first = records[0]
    documents = len({r["document"] for r in records})
    samples = f"{documents} text(s) of {first['length']} tokens for every variant, {first['steps']} steps each"
    budget = ", ".join(sorted({f"{100 * r['ratio']:g} %" for r in records if r.get("ratio") is not None}))
    lines = [
        *heading(TITLE, INTRODUCTION),
        *origin(measured, samples),
        *filled(
            f"The model is `{first['model']}` in {first['dtype']}; the budget is {budget} of the context. {READING}"
        ),
        "",
    ]
    for title, table in tables(measured):
        lines += [f"## {title}", "", table, ""]
    lines += picture("error and KL by codebook and tail", f"{figure_name(records)}.png")
    return "\n".join(lines).rstrip("\n") + "\n"


def figure_name(records: Sequence[Record]) -> str:
    """The name that :mod:`plots.ablation` gives its figure of these records."""
    first = next(record for record in records if record.get("ratio") is not None)
    return f"ablation_{first['model']}_{tokens(int(first['length']))}_{100 * first['ratio']:g}"


def figures(measured: Measured, folder: Path) -> list[Path]:
    """Both tables as a heatmap."""
    return draw(measured.table(), folder)
