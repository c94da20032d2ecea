"""The page of ``benchmark=fidelity``: the distance of every method from full attention, by budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plots.fidelity import draw
from plots.pages.packed import Measured
from plots.pages.source import filled, good, heading, mean, origin, picture
from plots.style import tokens
from pqbench.records.file import Record
from pqbench.tables.fidelity import lines_of, multiples
from pqbench.tables.section import shown
from pqbench.terminal import markdown_table

TITLE = "Fidelity to full attention"
BASE = "oracle"  # the exact top-k
COLUMNS = (
    ("output_error", "error", 1, "{:.3f}"),
    ("kl", "KL", 1, "{:.4f}"),
    ("top1_agreement", "top-1 %", 100, "{:.1f}"),
)
INTRODUCTION = """\
Every method reads real long texts token by token after a dense prefill and is compared with full attention.
*Error* is the relative error of the attention output of a layer that gets the exact inputs of full attention.
*KL* is the divergence (in nats) between the next-token distributions of full attention and of the method, which
then works in all layers. *Top-1* is the share of the steps in which both have the same most likely token. *Bits
per key* is the size of the index that a step reads, for each token of the context and KV head. `oracle` attends
to the exact top-k, so it shows what a selection of that many tokens can reach. A method that adds an estimate
of the unselected tokens can do better."""
VARIANTS = """\
`plain_2x8` and `aware_2x8` are `pqcache_plus` with 2 sub-spaces of 8 bits and no estimate of the unselected
tokens. `plain_2x8` has plain codebooks, and `aware_2x8` has codebooks that are trained for the queries of the
prompt. The command above defines both."""
READING = """\
Documents differ more from each other than methods do. The next table therefore divides the error of each method
by that of `oracle` on the same document and gives the mean with its 95 % bootstrap interval over the documents."""


def ratios_of(records: Sequence[Record]) -> list[float]:
    """The budgets in the records as shares of the context, smallest first."""
    return sorted({float(r["ratio"]) for r in good(records) if r.get("ratio") is not None})


def at(records: Sequence[Record], method: str, ratio: float) -> list[Record]:
    """The good records of a method at one budget."""
    return [r for r in good(records) if r["method"] == method and r.get("ratio") == ratio]


def reference_ratio(records: Sequence[Record]) -> float:
    """The budget at which methods are ranked: 10 % of the context, or the nearest budget that was measured."""
    return min(ratios_of(records), key=lambda ratio: abs(ratio - 0.1))


def methods_of(records: Sequence[Record]) -> list[str]:
    """The methods that have a budget, in the order of their output errors, smallest first."""
    ratio = reference_ratio(records)
    names = dict.fromkeys(str(r["method"]) for r in good(records) if r.get("ratio") is not None)
    return sorted(names, key=lambda name: mean(at(records, name, ratio), "output_error") or 0.0)


def main_table(records: Sequence[Record]) -> str:
    """A row for each method: error, KL and top-1 agreement at each budget."""
    ratios, ratio = ratios_of(records), reference_ratio(records)
    headings = ["method", "bits per key", *(f"{name} at {100 * r:g} %" for _, name, *_ in COLUMNS for r in ratios)]
    rows = []
    for method in methods_of(records):
        cells = [shown(mean(at(records, method, ratio), "bits_per_key"), 1, "{:.0f}")]
        for field, _, factor, form in COLUMNS:
            cells += [shown(mean(at(records, method, r), field), factor, form) for r in ratios]
        rows.append([method, *cells])
    return markdown_table(headings, rows, 1)


def relative_table(records: Sequence[Record]) -> str:
    """A row for each method: its error as a multiple of the exact top-k's, with intervals."""
    lines = lines_of(multiples(records, BASE))
    ratios = ratios_of(records)
    found = {(line.labels["method"], line.group[1]): line.mean("output_error") for line in lines}
    rows = []
    for method in methods_of(records):
        means = [found.get((method, ratio)) for ratio in ratios]
        rows.append([method, *("-" if m is None else f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]" for m in means)])
    return markdown_table(["method", *(f"{100 * ratio:g} %" for ratio in ratios)], rows, 1)


def verdict(records: Sequence[Record]) -> str:
    """A sentence that names the smallest error, also as a multiple of the error of the exact top-k."""
    best, ratio = methods_of(records)[0], reference_ratio(records)
    mine, exact = (mean(at(records, name, ratio), "output_error") for name in (best, BASE))
    if mine is None or not exact:
        return ""
    bits = shown(mean(at(records, best, ratio), "bits_per_key"), 1, "{:.0f}")
    return (
        f"At a budget of {100 * ratio:g} %, `{best}` has the smallest error: {mine / exact:.2f} times that of the "
        f"exact top-k, with {bits} bits of index per key."
    )


def page(measured: Measured) -> str:
    """The whole page in markdown."""
    records = measured.records
    first = good(records)[0]
    documents = len({r["document"] for r in good(records)})
    lengths = ", ".join(str(length) for length in sorted({r["length"] for r in good(records)}))
    samples = f"{documents} text(s) of {lengths} tokens for every method and budget, {first['steps']} steps each"
    lines = [
        *heading(TITLE, INTRODUCTION),
        *origin(measured, samples),
        *filled(f"The model is `{first['model']}` in {first['dtype']}. {verdict(records)}"),
        "",
        main_table(records),
        "",
        *([VARIANTS, ""] if {"plain_2x8", "aware_2x8"} <= set(methods_of(records)) else []),
        READING,
        "",
        relative_table(records),
        "",
        *picture("output error and KL against the bytes that a step reads", f"{figure_name(records)}.png"),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def figure_name(records: Sequence[Record]) -> str:
    """The name that :mod:`plots.fidelity` gives its figure of these records."""
    first = good(records)[0]
    return f"fidelity_{first['model']}_{tokens(int(first['length']))}"


def figures(measured: Measured, folder: Path) -> list[Path]:
    """Error and KL against bytes."""
    return draw(measured.table(), folder)
