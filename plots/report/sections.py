"""The sections of the page: each method (description, settings, heatmaps, latency), and the origin of the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import to_hex

from plots.needle import grid
from plots.report.descriptions import Description, describe
from plots.report.load import Loaded
from plots.report.text import facts, name
from plots.style import BASELINE, HEAT, tokens
from pqbench.records.file import Record
from pqbench.records.identity import class_name
from pqbench.records.kinds import LATENCY, kind_of
from pqbench.tables.section import group_records, link_of, middle

SETTINGS, HEATMAPS, CELLS, LATENCIES = 8, 12, 400, 40  # most columns, tables, cells and rows in a method's section


@dataclass(frozen=True)
class Heatmap:
    """Mean needle score by depth (rows) and context length (columns). Cells are (text, background, ink)."""

    title: str
    lengths: list[str]
    rows: list[tuple[str, list[tuple[str, str, str]]]]


@dataclass
class Settings:
    """A method's settings: the value of each setting in each distinct configuration."""

    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    variants: int = 0  # number of configurations; the rows show the first few


@dataclass
class Section:
    """The section of one method. ``class_name`` is the class that its runs name."""

    method: str
    class_name: str
    description: Description | None
    settings: Settings
    heatmaps: list[Heatmap]
    latency: list[list[str]]
    left_out: list[str]


def method_sections(loaded: Loaded, limit: int) -> tuple[list[Section], list[str]]:
    """At most ``limit`` sections, one for each method among the records, full attention first, then in alphabetical
    order; and the names of all methods."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for owner, record in zip(loaded.owner, loaded.records, strict=True):
        configs.setdefault(name(record.get("method", "-")), []).append(loaded.folders[owner].config)
    cells = needle_cells(loaded.table)
    found = []
    ordered = sorted(configs, key=lambda method: (method != BASELINE, method))
    for method in ordered[:limit]:
        nodes = [config["method"] for config in _distinct(configs[method]) if isinstance(config.get("method"), dict)]
        named = class_name(next((node["_target_"] for node in nodes if "_target_" in node), ""))
        maps, timed = heatmaps(cells, method), latency(loaded.others, method)
        known = settings(nodes)
        left_out = [
            f"first {shown} of {whole} {what}"
            for shown, whole, what in (
                (SETTINGS, known.variants, "configurations"),
                (HEATMAPS, len(maps), "heatmaps"),
                (LATENCIES, len(timed), "latency rows"),
            )
            if whole > shown
        ]
        found.append(Section(method, name(named), describe(named), known, maps[:HEATMAPS], timed[:LATENCIES], left_out))
    return found, ordered


def settings(nodes: Sequence[dict[str, Any]]) -> Settings:
    """The settings of a method over its distinct configurations."""
    variants = list({json.dumps(known): known for known in map(facts, nodes)}.values())
    names = dict.fromkeys(key for known in variants for key in known if not key.endswith("_target_"))
    rows = [(key, [known.get(key, "-") for known in variants[:SETTINGS]]) for key in names]
    return Settings(rows, len(variants))


def needle_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The needle records that have a score, a length and a depth, with length and depth as columns."""
    good = table[(table["benchmark"] == "needle") & (table["status"] == "ok")]
    places = [place if isinstance(place, dict) else {} for place in good.get("metadata", [])]
    placed = good.assign(
        score=pd.to_numeric(good["score"], errors="coerce"),
        length=[_number(place.get("length")) for place in places],
        depth=[_number(place.get("depth")) for place in places],
    )
    columns = ["model", "method", "budget", "question", "key", "score", "length", "depth"]
    named = placed[columns].assign(method=placed["method"].map(name))
    return named.dropna(subset=["score", "length", "depth"])


def heatmaps(cells: pd.DataFrame, method: str) -> list[Heatmap]:
    """A heatmap for each model, budget and configuration of a method."""
    found = []
    for (model, budget, question), part in cells[cells["method"] == method].groupby(
        ["model", "budget", "question"], sort=False
    ):
        for _, run in part.groupby("key", sort=False):
            means = grid(run)
            if means.size > CELLS:
                continue
            rows = [
                (f"{depth:g}", [_cell(value) for value in row])
                for depth, row in zip(means.index, means.to_numpy(), strict=True)
            ]
            extra = "" if question in ("dense", "-") else f", question {name(question)}"
            title = f"{name(model)}, budget {name(budget)}{extra}: mean {run['score'].mean():.1f} %, n = {len(run)}"
            found.append(Heatmap(title, [tokens(int(length)) for length in means.columns], rows))
    return found


def latency(records: Sequence[Record], method: str) -> list[list[str]]:
    """Rows of a method's latency: model, link, context, budget, repeats, and medians of TTFT, TT2T and TPOT."""
    own = [
        record
        for record in records
        if kind_of(record) == LATENCY and record["status"] == "ok" and name(record["method"]) == method
    ]
    rows = []
    for (model, link, context, budget), part in group_records(own, "model", "link", "context", "budget").items():
        times = [(middle(part, key), factor) for key, factor in (("ttft_s", 1), ("tt2t_s", 1), ("tpot_s", 1e3))]
        figures = ["-" if value is None else f"{value * factor:.2f}" for value, factor in times]
        rows.append(
            [name(model), name(link_of(part) or link or "-"), str(context), name(budget), str(len(part)), *figures]
        )
    return rows


@dataclass(frozen=True)
class Provenance:
    """One environment and the number of runs that were made in it. Facts are (name, value)."""

    runs: int
    facts: list[tuple[str, str]]


def provenance(loaded: Loaded, limit: int = 20) -> tuple[list[Provenance], int]:
    """At most ``limit`` distinct environments of the runs, most used first; and the number of all environments."""
    counts: dict[str, int] = {}
    known: dict[str, dict[str, str]] = {}
    for folder in loaded.folders:
        for one in folder.environments:
            flat = facts(one)
            key = json.dumps(flat, sort_keys=True)
            counts[key] = counts.get(key, 0) + 1
            known[key] = flat
    ordered = sorted(counts, key=lambda key: -counts[key])
    found = [Provenance(counts[key], list(known[key].items())) for key in ordered[:limit]]
    return found, len(ordered)


def _distinct(configs: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The distinct configurations, by object identity: records of one folder share one object."""
    return islice({id(config): config for config in configs}.values(), 1000)


def _cell(value: float) -> tuple[str, str, str]:
    if pd.isna(value):
        return "", "transparent", "inherit"
    red, green, blue, _ = mpl.colormaps[HEAT](min(max(value / 100, 0.0), 1.0))
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    return f"{value:.0f}", to_hex((red, green, blue)), "#fff" if dark else "#111"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
