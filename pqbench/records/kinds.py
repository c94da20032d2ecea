"""What a record holds: its kind is the name of a kind of measurement, which tables, figures and the report choose by.

Every measurement declares its kind and every record carries it. Records that were written before that are told apart
by their fields; the name of a benchmark never decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORES = "scores"
LATENCY = "latency"
ATTENTION = "attention"
ATTENTION_SCORES = "attention_scores"
FIDELITY = "fidelity"
DENSE = "full"  # the name under which full attention is recorded; times are compared with its times

# Fields that every old record of a kind holds, failed ones included, and no old record of a later kind in this list.
_TELLING = (
    (FIDELITY, ("document", "ratio", "steps")),
    (ATTENTION, ("geometry", "kernel")),
    (ATTENTION_SCORES, ("context", "layer")),
    (LATENCY, ("context", "repeat")),
)


def kind_of(record: Mapping[str, Any]) -> str:
    """The kind of a record: the one it carries, or for an old record the one that its fields tell."""
    kind = record.get("kind")
    if isinstance(kind, str):
        return kind
    return next((name for name, fields in _TELLING if all(field in record for field in fields)), SCORES)


TOO_SHORT = "dense: too short"  # what tables say of measurements in which nothing could be skipped
_EVERYTHING = (None, "all", "-", "100 %")  # budgets that leave nothing out by design


def budget_of(record: Mapping[str, Any]) -> Any:
    """The budget of a record in a word, for tables: it ``varies`` where the method does not keep to it by design."""
    return f"{record.get('budget')} (varies)" if record.get("beyond_budget") else record.get("budget")


def skipped_nothing(record: Mapping[str, Any]) -> bool:
    """Whether a method that has a budget attended to its whole context in every step, since the context was too short
    for the method to leave anything out. Its figures are those of full attention.

    Records hold this as ``skipped_nothing``. For records that were written before, the mean over the steps is compared
    with the length of the prompt.
    """
    if record.get("budget") in _EVERYTHING:
        return False
    known = record.get("skipped_nothing")
    if isinstance(known, bool):
        return known
    attended = record.get("attended_tokens")
    prompt = next((record[name] for name in ("prompt_tokens", "context", "length") if record.get(name)), None)
    if not isinstance(attended, int | float) or not isinstance(prompt, int | float):
        return False
    return attended >= prompt
