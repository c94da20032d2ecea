"""The page of ``benchmark=attention`` and ``benchmark=latency``: seconds per step, and times to the first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plots.latency import draw
from plots.pages.packed import Measured
from plots.pages.source import heading, origin, picture
from pqbench.records.file import Record
from pqbench.records.kinds import ATTENTION, LATENCY, kind_of
from pqbench.tables.kinds import sections
from pqbench.terminal import markdown_table

TITLE = "Speed"
INTRODUCTION = """\
There are two measurements. `benchmark=attention` times the decode step of one attention layer with keys and values of
real shape: selecting, fetching and attending. `benchmark=latency` times a whole model: the time to the first
token (TTFT), to the second token (TT2T, when the index is complete) and per later token (TPOT). Each method has
a prefill of its own. *x dense* is the time of the fastest dense kernel divided by the time of the method. Times
depend on the machine, so compare them only within one table."""


def page(measured: Measured) -> str:
    """The whole page in markdown."""
    counts = {name: sum(kind_of(r) == name for r in measured.records) for name in (ATTENTION, LATENCY)}
    samples = ", ".join(f"{count} records of benchmark={name}" for name, count in counts.items() if count)
    lines = [*heading(TITLE, INTRODUCTION), *origin(measured, samples)]
    for section in sections(measured.records):
        table = markdown_table(section.headings, section.rows, section.labels)
        lines += [f"## {section.title[0].upper()}{section.title[1:]}", "", table, ""]
    for name in names(measured.records):
        lines += picture("TTFT, TT2T and TPOT against the context", f"{name}.png")
    return "\n".join(lines).rstrip("\n") + "\n"


def names(records: Sequence[Record]) -> list[str]:
    """The names that :mod:`plots.latency` gives its figures of these records."""
    models = dict.fromkeys(str(r["model"]) for r in records if kind_of(r) == LATENCY and r["status"] == "ok")
    return [f"latency_{model}" for model in models]


def figures(measured: Measured, folder: Path) -> list[Path]:
    """Times against the context, if the whole model was measured at several contexts."""
    return draw(measured.table(), folder)
