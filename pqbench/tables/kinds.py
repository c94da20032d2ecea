"""Chooses the tables of a record by its kind, see :mod:`pqbench.records.kinds`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pqbench.records.file import Record
from pqbench.records.kinds import (
    ATTENTION,
    ATTENTION_SCORES,
    FIDELITY,
    LATENCY,
    SCORES,
    TOO_SHORT,
    budget_of,
    kind_of,
    skipped_nothing,
)
from pqbench.tables.attention_scores import attention_scores_sections
from pqbench.tables.fidelity import fidelity_sections
from pqbench.tables.section import Section
from pqbench.tables.timings import attention_sections, latency_sections

log = logging.getLogger(__name__)

_MAKERS: Mapping[str, Callable[[Sequence[Record], str | None], list[Section]]] = MappingProxyType(
    {
        ATTENTION: lambda records, _: attention_sections(records),
        LATENCY: lambda records, _: latency_sections(records),
        ATTENTION_SCORES: lambda records, _: attention_scores_sections(records),
        FIDELITY: fidelity_sections,
    }
)


def has_scores(record: Record) -> bool:
    """Whether a record holds a prediction and its scores. All other records hold figures of another kind."""
    return kind_of(record) == SCORES


def sections(records: Sequence[Record], base: str | None = None) -> list[Section]:
    """All tables except those of scores, by kind and subject, in the order in which these first appear.

    Records of a kind that has no table are counted in a warning.

    Args:
        base: a method; the fidelity figures of the others are also shown as multiples of its figures. None for no such
            table.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if not has_scores(record):
            found.setdefault((kind_of(record), str(record.get("model", "-"))), []).append(_marked(record))
    made = []
    for (kind, _), rows in found.items():
        if kind in _MAKERS:
            made += [section for section in _MAKERS[kind](rows, base) if section.rows]
        else:
            log.warning("%d record(s) of the kind %r have no table", len(rows), kind)
    return made


def _marked(record: Record) -> Record:
    """The record. Its budget is marked if the method by design does not keep to it, or could not skip anything."""
    if "budget" not in record:
        return record
    return {**record, "budget": f"{budget_of(record)}" + (f" ({TOO_SHORT})" if skipped_nothing(record) else "")}


def flat(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records without scores as rows of a csv file: names and single figures, no lists."""
    return [
        {name: value for name, value in record.items() if isinstance(value, str | int | float | bool)}
        for record in records
        if not has_scores(record)
    ]
