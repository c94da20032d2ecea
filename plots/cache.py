"""The block cache on the device: hit rate, and time per token relative to no cache, by size and policy."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots.data import alike, emulated, link, machine, measured, numbers, published, samples, setting, unique
from plots.style import footer, headline, number, save, style, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=cache"
NEEDS = "latency records of one method with two sizes of the block cache or more (store.cache_tokens)"
POLICIES = {"lfu": ("#0072B2", "s", "-"), "lru": ("#D55E00", "o", (0, (4, 1.5)))}  # colour, marker, dash
PAPER = "0.35"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every method, model, link and context with two cache sizes or more."""
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(cached(table), "store.cache_tokens", "store.cache_policy"):
        for context, part in run.groupby("context"):
            if part["size"].nunique() < 2:
                continue
            first = part.iloc[0]
            name = f"cache_{plain_name(first['method'])}_{plain_name(first['model'])}_{context:.0f}"
            with style():
                paths += save(panels(part, published("cache")), folder, unique(name, taken))
    return paths


def cached(table: pd.DataFrame) -> pd.DataFrame:
    """Latency rows of host stores, with the ``size`` (tokens per layer) and ``policy`` of the block cache."""
    good = measured(table, "tpot_s", "context", kind=LATENCY)
    sizes = [setting(settings, "store.cache_tokens") for settings in good["settings"]]
    policies = [setting(settings, "store.cache_policy", "-") for settings in good["settings"]]
    return good.assign(size=pd.to_numeric(pd.Series(sizes, good.index, dtype=object)), policy=policies).dropna(
        subset="size"
    )


def panels(run: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Hit rate on the left; on the right the change of the median time per token relative to no cache. Published
    numbers are hollow."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    hits, times = figure.subplots(1, 2)
    none = run[run["size"] == 0]["tpot_s"].median()
    rows = run[run["size"] > 0]
    rows = rows.assign(hits=100 * numbers(rows, "cache_hit_rate"), change=100 * (rows["tpot_s"] / none - 1))
    lines(hits, rows, "hits", paper[paper["metric"] == "hit rate"])
    hits.set_ylim(0, 100)
    hits.set_title("hit rate")
    hits.set_ylabel("% of the fetched tokens")
    lines(times, rows, "change", paper[paper["metric"] == "TPOT change"])
    times.axhline(0, color="black", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    times.set_title("time per output token" + ("" if pd.isna(none) else f", no cache = {1e3 * none:.1f} ms"))
    times.set_ylabel("% change (median)")
    for axis in (hits, times):
        axis.set_xlabel("cache (tokens per layer)")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles, labels, frameon=False, fontsize=8, loc="best")
    first = run.iloc[0]
    what = f"{first['method']}, {first['model']}, {tokens(int(first['context']))} tokens, budget {first['budget']}"
    headline(figure, f"Block cache: {what}{link(run)}", "emulated" if emulated(run) else "")
    count, new = samples(run.groupby("key").size()), number(first.get("new_tokens"))
    sure = "; ".join(dict.fromkeys(paper["certainty"].astype(str)))
    note = f"\npublished (hollow): Llama-3.1-8B on another machine; {sure}" if len(paper) else ""
    footer(figure, f"{count} per point, {new} tokens generated; {machine(run)}{note}")
    return figure


def lines(axis: Axes, rows: pd.DataFrame, field: str, paper: pd.DataFrame) -> None:
    """Draw a line per policy, and the published numbers of this panel."""
    for policy, part in rows.dropna(subset=field).groupby("policy"):
        colour, marker, dash = POLICIES.get(str(policy), ("0.5", "^", "-"))
        points = part.groupby("size")[field].median()
        axis.plot(
            points.index, points.to_numpy(), color=colour, marker=marker, linestyle=dash, label=str(policy).upper()
        )
    if len(paper):
        axis.plot(
            paper["setting"].astype(float),
            paper["value"].astype(float),
            "o",
            markerfacecolor="none",
            markeredgecolor=PAPER,
            markersize=9,
            linestyle="none",
            label="published",
        )
    sizes = sorted({*rows["size"].astype(int), *(paper["setting"].astype(int) if len(paper) else ())})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [tokens(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="0.9")
