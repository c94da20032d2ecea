"""Makes a table from records of sorted attention probabilities. Loads nothing that runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pqbench.records.file import Record
from pqbench.tables.section import Section, facts, group_records, telling


def attention_scores_sections(records: Sequence[Record]) -> list[Section]:
    """The probability of the heaviest tokens by context, as a mean over layers and KV heads."""
    good = [record for record in records if record["status"] == "ok" and _masses(record)]
    shares = list(dict.fromkeys(share for record in good for share in record["mass_shares"]))
    labels = telling(good, ["context"], "variant", "key")
    rows = []
    for key, layers in group_records(good, *labels).items():
        by_share = [[mass for record in layers for mass in _masses(record).get(share, [])] for share in shares]
        means = [f"{fmean(masses):.3f}" if masses else "-" for masses in by_share]
        rows.append([*(str(value) for value in key), str(len(layers)), *means])
    model = records[0].get("model", "-")
    title = f"share of the attention probability of {model} that the heaviest tokens hold ({facts(records)})"
    return [Section(title, [*labels, "layers", *(f"{100 * share:g} %" for share in shares)], rows, len(labels))]


def _masses(record: Record) -> dict[float, list[float]]:
    """For each share of heaviest tokens, the probability that they hold in every KV head of a layer."""
    shares: Any = record.get("mass_shares")
    heads: Any = record.get("mass")
    if not isinstance(shares, list) or not isinstance(heads, list):
        return {}
    good = [head for head in heads if isinstance(head, list) and len(head) == len(shares)]
    return {share: [head[i] for head in good] for i, share in enumerate(shares)}
