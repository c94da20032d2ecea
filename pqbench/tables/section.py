"""One table: a title, headings and rows of text. Also functions for words and numbers that all tables of records
use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pqbench.records.file import Record
from pqbench.terminal import plain

RANDOM = "random"  # weights of a model that only has the shape of another model
AUTO = "four digits"  # the format of numbers that may be large or small
Column = tuple[str, str, float, str]  # field of a record, heading, factor, format


@dataclass(frozen=True)
class Section:
    """One table: a title, headings, rows, the number of label columns on the left, and the columns for which a terminal
    has no room."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    labels: int
    wide: tuple[str, ...] = ()

    def rich(self) -> Table:
        """The table for a terminal, with units on a line of their own. Names are Text, so that they are never read as
        markup."""
        table = Table(title=Text(plain(self.title)), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        shown = [i for i, heading in enumerate(self.headings) if heading not in self.wide]
        for i in shown:
            name = Text(plain(self.headings[i]).replace(" ", "\n", 1))
            table.add_column(name, justify="left" if i < self.labels else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(plain(row[i])) for i in shown))
        return table


def group_records(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records grouped by the values of some fields, in the order in which these first appear."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return groups


def telling(records: Sequence[Record], labels: Sequence[str], *further: str) -> list[str]:
    """The labels, followed by those of ``further`` that differ between records whose labels so far are the same."""
    shown = list(labels)
    for name in further:
        if any(len({str(row.get(name)) for row in rows}) > 1 for rows in group_records(records, *shown).values()):
            shown.append(name)
    return shown


def middle(records: Sequence[Record], field: str) -> float | None:
    """Median of a field over the records that have it."""
    numbers = [float(record[field]) for record in records if isinstance(record.get(field), int | float)]
    return median(numbers) if numbers else None


def facts(records: Sequence[Record]) -> str:
    """Threads, kernels, dtype and copy bandwidth of the records, if all records agree in them, as text for a title or
    footer."""
    parts = []
    for field, form in (("dtype", "{}"), ("threads", "{} threads"), ("kernels", "kernels {}")):
        values = sorted({str(record[field]) for record in records if record.get(field) is not None})
        if values:
            parts.append(form.format("/".join(values)))
    if records and all(record.get("weights") == RANDOM for record in records):
        parts.append("random weights")
    copy = middle(records, "copy_bandwidth_gbps")
    return ", ".join([*parts, *([f"copy {copy:.1f} GB/s (read and written)"] if copy else [])])


def link_of(records: Sequence[Record]) -> str:
    """The link over which the records were measured; empty if there was none. The text says so if the times of the link
    are emulated."""
    labels = sorted({str(record["link"]) for record in records if record.get("link")})
    emulated = any(record.get("emulated") for record in records)
    named = " and ".join(labels)
    return f"emulated {named}" if emulated and "emulated" not in named else named


def over_link(records: Sequence[Record]) -> str:
    """``, KV over LINK`` for a title; empty if there is no link."""
    link = link_of(records)
    return f", KV over {link}" if link else ""


def shown(value: Any, factor: float, form: str) -> str:
    """A number of a record as the text of a cell; ``-`` if there is none."""
    if not isinstance(value, int | float) or value != value:
        return "-"
    figure = value * factor
    return f"{figure:.{3 - sum(figure >= limit for limit in (10, 100))}f}" if form == AUTO else form.format(figure)
