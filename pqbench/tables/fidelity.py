"""Makes tables from records of ``benchmark=fidelity``. Loads nothing that runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqbench.records.file import Record
from pqbench.records.kinds import TOO_SHORT
from pqbench.tables.section import Section, facts, group_records, telling
from pqbench.tables.summaries import LEVEL, resampled

# Field -> (heading, factor, format, whether the interval is shown).
Column = tuple[str, str, float, str, bool]
FIGURES: tuple[Column, ...] = (
    ("output_error", "output error", 1, "{:.3f}", True),
    ("kl", "KL nats", 1, "{:.4f}", True),
    ("top1_agreement", "top-1 %", 100, "{:.1f}", False),
    ("excess_nll", "NLL - full", 1, "{:+.4f}", True),
    ("perplexity", "ppl", 1, "{:.2f}", False),
    ("recall", "recall", 1, "{:.3f}", False),
    ("mass", "mass", 1, "{:.3f}", False),
    ("bits_per_key", "bits/key", 1, "{:.1f}", False),
    ("attended_tokens", "attended", 1, "{:.0f}", False),
    ("bytes_per_head", "KB/head", 1e-3, "{:.1f}", False),
)
PIVOTS = ("output_error", "kl", "top1_agreement", "recall")  # figures that get a table of methods by budgets
RELATIVE: tuple[Column, ...] = (
    ("output_error", "output error", 1, "{:.2f}", True),
    ("kl", "KL", 1, "{:.2f}", True),
)  # figures that make sense as a multiple of another method's
AGES = {"prompt": "prompt", "early": "early decoded", "late": "late decoded"}
THIRDS = ("low", "middle", "high")
WIDE = ("ppl", "mass")  # columns for which a terminal has no room


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` documents with its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Line:
    """One row: its labels, and its records, one per document.

    Attributes:
        group: length and ratio; only rows that agree in both are compared.
    """

    labels: dict[str, str]
    group: tuple[Any, ...]
    good: Sequence[Record]
    failed: int

    @property
    def mark(self) -> str:
        """What is written behind the budget, or behind a figure in its column, where nothing could be skipped in any
        document; otherwise nothing."""
        short = bool(self.good) and all(TOO_SHORT in str(record.get("budget")) for record in self.good)
        return f" ({TOO_SHORT})" if short else ""

    @property
    def shown(self) -> list[str]:
        """The labels, the budget marked."""
        return [value + (self.mark if name == "ratio" else "") for name, value in self.labels.items()]

    def mean(self, field: str) -> Mean | None:
        """Mean of a field over documents; None if no record has the field."""
        ordered = sorted(self.good, key=lambda record: str(record.get("document")))
        numbers = [value for value in (figure(record, field) for record in ordered) if value is not None]
        return over_documents(numbers, str(self.group[0])) if numbers else None


def over_documents(values: Sequence[float], seed: str) -> Mean:
    """Mean and bootstrap interval. With the same ``seed``, methods with the same documents use the same resamples."""
    draws = resampled(seed, np.array(values, dtype=float))
    low, high = np.percentile(draws.means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Mean(draws.value, float(low), float(high), draws.n)


def figure(record: Record, field: str) -> float | None:
    """A number of a record, or a number computed from the record. ``a.b.c`` names a nested field."""
    if field == "excess_nll":
        mine, full = figure(record, "nll"), figure(record, "nll_full")
        return None if mine is None or full is None else mine - full
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def fidelity_sections(records: Sequence[Record], base: str | None = None) -> list[Section]:
    """Tables for each model. For each length, the main figures get a table of methods by budgets. Further tables hold
    all figures, and figures by token age and by entropy. If a ``base`` method is given, figures are also shown as
    multiples of its figures."""
    found = []
    for (model,), rows in group_records(records, "model").items():
        steps = "/".join(sorted({str(row.get("steps")) for row in rows}))
        title = f"fidelity of {model} to full attention over {steps} teacher-forced steps ({facts(rows)})"
        lines = lines_of(rows)
        found += _pivots(title, lines, [column for column in FIGURES if column[0] in PIVOTS])
        if base is not None:
            found += _pivots(
                f"{title}, as a multiple of that of {base} on the same document",
                lines_of(multiples(rows, base)),
                RELATIVE,
            )
        found.append(_figures(f"{title}: means over documents [95 % interval]", lines))
        found.append(_parts(f"{title}: recall by token age, output error by entropy of the head", lines))
    return [section for section in found if section.rows]


def lines_of(records: Sequence[Record]) -> list[Line]:
    """Rows in order of length and budget, with methods in the order in which they first appear. Rows without a budget
    come first."""
    names = telling(records, ["length", "ratio", "method"], "steps", "dtype", "kernels", "variant", "key")
    lines = []
    for key, rows in group_records(records, *names).items():
        good = [row for row in rows if row["status"] == "ok"]
        named = {name: str(value) for name, value in zip(names, key, strict=True)}
        named["ratio"] = "all" if key[1] is None else f"{100 * key[1]:g} %"
        lines.append(Line(named, key[:2], good, len(rows) - len(good)))
    return sorted(lines, key=lambda line: (line.group[0] or 0, line.group[1] or 0))


def multiples(records: Sequence[Record], base: str) -> list[Record]:
    """Records whose :data:`RELATIVE` figures are divided by those of the method ``base`` with the same budget on the
    same document. This removes the differences between documents, which are larger than those between methods. Records
    without a counterpart are left out.
    """

    def place(record: Record) -> tuple[Any, ...]:
        return record.get("length"), record.get("ratio"), record.get("document")

    good = [record for record in records if record["status"] == "ok" and record.get("ratio") is not None]
    of_base = {place(record): record for record in good if record["method"] == base}
    found = []
    for record in good:
        pairs = {name: (figure(record, name), figure(of_base.get(place(record), {}), name)) for name, *_ in RELATIVE}
        ratios = {name: mine / theirs for name, (mine, theirs) in pairs.items() if mine is not None and theirs}
        if ratios:
            found.append({**record, **dict.fromkeys(pairs), **ratios})
    return found


def _pivots(title: str, lines: Sequence[Line], columns: Sequence[Column]) -> list[Section]:
    """Tables of methods by budgets, one for each length and figure. Methods without a budget have no row."""
    found = []
    for length in dict.fromkeys(line.labels["length"] for line in lines):
        chosen = [line for line in lines if line.labels["length"] == length and line.group[1] is not None]
        ratios = list(dict.fromkeys(line.labels["ratio"] for line in chosen))
        names = [name for name in (chosen[0].labels if chosen else ()) if name not in ("length", "ratio")]
        by_method: dict[tuple[str, ...], dict[str, Line]] = {}
        for line in chosen:
            by_method.setdefault(tuple(line.labels[name] for name in names), {})[line.labels["ratio"]] = line
        counts = {len(line.good) for line in chosen}
        count = " to ".join(str(number) for number in sorted({min(counts, default=0), max(counts, default=0)}))
        for field, heading, factor, form, _ in columns:
            rows = [
                [*method, *(_at_budget(at.get(ratio), field, factor, form) for ratio in ratios)]
                for method, at in by_method.items()
            ]
            about = f"{title}: {heading} at {length} tokens by budget, {count} documents [95 % interval]"
            found.append(Section(about, [*names, *ratios], rows, len(names)))
    return found


def _at_budget(line: Line | None, field: str, factor: float, form: str) -> str:
    """The cell of a method at one budget, marked where nothing could be skipped."""
    return "-" if line is None else _cell(line.mean(field), factor, form, True) + line.mark


def _figures(title: str, lines: Sequence[Line]) -> Section:
    labels = list(lines[0].labels) if lines else []
    rows = []
    for line in lines:
        count = f"{len(line.good)}" + (f" (+{line.failed} failed)" if line.failed else "")
        means = [line.mean(field) for field, *_ in FIGURES]
        cells = [_cell(mean, *column[2:]) for mean, column in zip(means, FIGURES, strict=True)]
        rows.append([*line.shown, count, cells[0], _times_best(line, lines), *cells[1:]])
    headings = [*labels, "n", FIGURES[0][1], "x best", *(heading for _, heading, *_ in FIGURES[1:])]
    return Section(title, headings, rows, len(labels), WIDE)


def _times_best(line: Line, lines: Sequence[Line]) -> str:
    """Output error divided by the smallest output error at the same length and budget; empty for a method without a
    budget."""
    mine = line.mean("output_error")
    peers = [other.mean("output_error") for other in lines if other.group == line.group]
    best = min((peer.value for peer in peers if peer is not None), default=0.0)
    return "-" if mine is None or line.group[1] is None or not best else f"{mine.value / best:.2f}"


def _parts(title: str, lines: Sequence[Line]) -> Section:
    """A table of recall by token age, with the share of such tokens in the exact top-k, and of output error by thirds
    of the heads."""
    labels = list(lines[0].labels) if lines else []
    rows = []
    for line in lines:
        if line.group[1] is None or not line.good:
            continue
        recalls = [_aged(line, age) for age in AGES]
        errors = [_cell(line.mean(f"entropy.{third}.output_error"), 1, "{:.3f}", False) for third in THIRDS]
        rows.append([*line.shown, *recalls, *errors])
    headings = [*labels, *(f"recall {name}" for name in AGES.values()), *(f"error {third} entropy" for third in THIRDS)]
    return Section(title, headings, rows, len(labels))


def _aged(line: Line, age: str) -> str:
    recall, share = line.mean(f"token_age.{age}.recall"), line.mean(f"token_age.{age}.share")
    return "-" if recall is None or share is None else f"{recall.value:.3f} ({100 * share.value:.1f} %)"


def _cell(mean: Mean | None, factor: float, form: str, interval: bool) -> str:
    if mean is None:
        return "-"
    value, low, high = (form.format(number * factor) for number in (mean.value, mean.low, mean.high))
    return f"{value} [{low}, {high}]" if interval and mean.n > 1 else value
