"""The page of the quick suite: scores of every method on a few prompts of three benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plots.needle import placed, row
from plots.pages.packed import Measured
from plots.pages.source import good, heading, mean, origin, picture
from plots.style import save, style
from pqbench.records.file import Record
from pqbench.tables.section import shown
from pqbench.terminal import markdown_table

TITLE = "Quick suite: scores of all methods"
FIGURE = "needle_methods"
IN_FIGURE = ("full", "pqcache", "h2o", "infllm")
NAMES = {"needle": "needle", "infinitebench": "InfiniteBench", "ruler": "RULER"}
COSTS = (
    ("mass", "mass", 1, "{:.3f}"),
    ("recall", "recall", 1, "{:.3f}"),
    ("output_error", "output error", 1, "{:.3f}"),
    ("attended_tokens", "attended", 1, "{:.0f}"),
    ("index_bytes", "index MB per step", 1e-6, "{:.2f}"),
    ("kv_bytes", "KV MB held", 1e-6, "{:.1f}"),
)
INTRODUCTION = """\
Every method reads the same few prompts: a number hidden in prose at five depths (needle), the tasks passkey and
number string of InfiniteBench, and three tasks of RULER. All methods share the dense prefill of a prompt and
then decode with the same budget. Scores are computed by the official metric of each benchmark, in percent."""
READING = """\
A benchmark has only a few prompts here, so a difference of one prompt between two methods means nothing. The
second table helps to explain why a method did not find a needle: *mass* is the share of the exact attention
probability that the attended tokens hold, *recall* is the share of the exact top-k that the method found, and
*output error* is the relative error of the attention output against full attention. They are measured with the
queries of full attention on the reference answers of the needle prompts. *KV MB held* shows which methods drop
tokens and which keep all of them."""


def methods_of(records: Sequence[Record]) -> list[str]:
    """The methods in the order of their mean score over the benchmarks, highest first; ties by the smallest output
    error."""
    names = dict.fromkeys(str(record["method"]) for record in good(records))
    return sorted(names, key=lambda name: (-overall(records, name), error_of(records, name)))


def score_of(records: Sequence[Record], method: str, benchmark: str) -> float | None:
    """The mean score of a method on one benchmark, in percent."""
    return mean([r for r in good(records) if (r["method"], r["benchmark"]) == (method, benchmark)], "score")


def overall(records: Sequence[Record], method: str) -> float:
    """The mean of a method's scores over the benchmarks, in percent."""
    scores = [score for name in NAMES if (score := score_of(records, method, name)) is not None]
    return sum(scores) / len(scores) if scores else 0.0


def error_of(records: Sequence[Record], method: str) -> float:
    """The mean relative error of the attention output on the needle prompts."""
    return mean(needles(records, method), "output_error") or 0.0


def needles(records: Sequence[Record], method: str) -> list[Record]:
    """The good needle records of a method, with the bytes of keys and values that it holds on both tiers together."""
    chosen = [r for r in good(records) if (r["method"], r["benchmark"]) == (method, "needle")]
    return [r | {"kv_bytes": (r.get("device_bytes") or 0) + (r.get("host_bytes") or 0)} for r in chosen]


def scores_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """A row for each method: its score on each benchmark."""
    rows = [[m, *(shown(score_of(records, m, name), 1, "{:.1f}") for name in NAMES)] for m in methods]
    return markdown_table(["method", *NAMES.values()], rows, 1)


def costs_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """A row for each method: how much it attended to, read and held on the needle prompts."""
    rows = []
    for method in methods:
        found = needles(records, method)
        rows.append([method, *(shown(mean(found, field), factor, form) for field, _, factor, form in COSTS)])
    return markdown_table(["method", *(name for _, name, _, _ in COSTS)], rows, 1)


def page(measured: Measured) -> str:
    """The whole page in markdown."""
    records = measured.records
    methods = methods_of(records)
    one = [record for record in good(records) if record["method"] == methods[0]]
    counts = [f"{sum(r['benchmark'] == name for r in one)} prompts of {label}" for name, label in NAMES.items()]
    model = ", ".join(sorted({str(record["model"]) for record in records}))
    budgets = ", ".join(sorted({str(r["budget"]) for r in records if r["budget"] != "all"}))
    lines = [
        *heading(TITLE, INTRODUCTION),
        *origin(measured, f"{', '.join(counts)} for every method"),
        f"The model is `{model}`; the budget is {budgets} of the context for every method but `full`.",
        "",
        "## Scores",
        "",
        scores_table(records, methods),
        "",
        *picture("needle heatmaps of four methods", f"{FIGURE}.png"),
        "## Why",
        "",
        READING,
        "",
        costs_table(records, methods),
    ]
    return "\n".join(lines) + "\n"


def figures(measured: Measured, folder: Path) -> list[Path]:
    """The needle heatmaps of four methods in one row."""
    with style():
        return save(row(placed(measured.table()), IN_FIGURE), folder, FIGURE)
