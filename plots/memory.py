"""Memory of the KV cache: computed by length and batch (the paper's Figure 1), and measured by method and tier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots.data import machine, measured, numbers, published, unique
from plots.style import BASELINE, footer, headline, name_ends, save, style, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=memory"
NEEDS = "latency records that hold bytes"
LENGTHS = tuple(2**n for n in range(12, 21))  # 4K to 1M
BATCHES = (1, 8, 32, 128)
SHADES = ("#56B4E9", "#0072B2", "#CC79A7", "#D55E00")
ROOMS = (("one 80 GB GPU", 80e9), ("eight: 640 GB", 640e9))
DEVICE, HOST = "#0072B2", "#E69F00"


@dataclass(frozen=True)
class Cache:
    """The shape of a model's KV cache, with two bytes per number."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes(self, length: int, batch: int) -> int:
        """Keys and values of ``batch`` sequences of ``length`` tokens."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * length * batch


MODEL = Cache(32, 8, 128)  # Llama-3.1-8B, Mistral-7B: 8 KV heads for 32 query heads
GROUP = 4


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every model with latency records that hold bytes; returns no paths if there are none."""
    good = measured(table, "device_bytes", "host_bytes", "context", kind=LATENCY)
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for model, run in good.groupby("model", sort=False):
        newest = run.drop_duplicates(["method", "context"], keep="last")
        with style():
            paths += save(
                panels(newest, published("memory")), folder, unique(f"memory_{plain_name(str(model))}", taken)
            )
    return paths


def panels(run: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Left: modelled memory by length and batch. Right: measured memory at the longest context."""
    figure = Figure(figsize=(11.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    modelled(left, MODEL, paper)
    left.set_title("modelled: 7B model with 8 KV heads, 16-bit", fontsize=10)
    longest = run[run["context"] == run["context"].max()]
    bars(right, longest)
    first = longest.iloc[0]
    right.set_title(f"measured: {first['model']}, {tokens(int(first['context']))} tokens, batch 1", fontsize=10)
    headline(figure, "Memory of the KV cache", "left: modelled")
    note = f"modelled: 2 x layers x KV heads x head size x length x batch x 2 bytes; measured: {machine(longest)}"
    size = MODEL.bytes(131072, 128) / 1e12
    for _, row in paper.iterrows():
        note += (
            f"\npublished (hollow): {row['model']}, {row['setting']}, {row['certainty']}; the formula gives "
            f"{size:.1f} TB, and {GROUP * size:.1f} TB without grouped queries"
        )
    footer(figure, note)
    return figure


def modelled(axis: Axes, cache: Cache, paper: pd.DataFrame) -> None:
    """Draw a line per batch size, and the memory of some GPUs."""
    ends = []
    for batch, colour in zip(BATCHES, SHADES, strict=True):
        sizes = [cache.bytes(length, batch) / 1e9 for length in LENGTHS]
        axis.plot(LENGTHS, sizes, color=colour, linestyle=(0, (5, 1.5)), label=f"batch {batch}")
        ends.append((f"batch {batch}", float(LENGTHS[-1]), sizes[-1], colour))
    for name, room in ROOMS:
        axis.axhline(room / 1e9, color="0.4", linewidth=0.9)
        axis.annotate(
            name,
            (LENGTHS[0], room / 1e9),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color="0.3",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            zorder=3,
        )
    for _, row in paper.iterrows():
        axis.plot(
            [131072],
            [float(row["value"]) / 1e9],
            "o",
            markerfacecolor="none",
            markeredgecolor="black",
            markersize=9,
            linestyle="none",
            label="published",
        )
        axis.annotate(
            "published", (131072, float(row["value"]) / 1e9), xytext=(7, 5), textcoords="offset points", fontsize=8
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(LENGTHS, [f"{length >> 20}M" if length >= 1 << 20 else tokens(length) for length in LENGTHS])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("context length (tokens)")
    axis.set_ylabel("GB")
    axis.grid(axis="y", color="0.93")
    name_ends(axis, ends)


def bars(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw the bytes of keys and values on the device and in host memory by method, with full attention on top."""
    rows = rows.assign(other=rows["method"] != BASELINE)
    rows = rows.sort_values(["other", "device_bytes"], ascending=[True, False])
    sizes = {
        "device_bytes": (DEVICE, "keys and values, device"),
        "host_bytes": (HOST, "keys and values, host"),
        "index_resident_bytes": ("0.5", "index"),
    }
    places, left = range(len(rows)), pd.Series(0.0, index=rows.index)
    for field, (colour, name) in sizes.items():
        width = numbers(rows, field).fillna(0) / 1e6
        axis.barh(places, width, left=left, color=colour, label=name)
        left = left + width
    axis.set_yticks(places, rows["method"])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("MB")
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
