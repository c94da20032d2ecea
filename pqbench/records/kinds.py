"""The kinds of records. The kind of a record is that of its measurement; tables, figures and the report choose records
by it.

Every measurement declares its kind, and every new record contains it. The kind of older records is recognised by their
fields, and never by the name of the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORES = "scores"
LATENCY = "latency"
ATTENTION = "attention"
ATTENTION_SCORES = "attention_scores"
FIDELITY = "fidelity"
DENSE = "full"  # the name under which full attention is recorded

# Fields by which old records are recognised. All old records of a kind have them, also failed ones, and no old record
# of a kind further down in this list has them.
_TELLING = (
    (FIDELITY, ("document", "ratio", "steps")),
    (ATTENTION, ("geometry", "kernel")),
    (ATTENTION_SCORES, ("context", "layer")),
    (LATENCY, ("context", "repeat")),
)


def kind_of(record: Mapping[str, Any]) -> str:
    """The kind of a record: the kind that it contains or, for an old record, the kind that fits its fields."""
    kind = record.get("kind")
    if isinstance(kind, str):
        return kind
    return next((name for name, fields in _TELLING if all(field in record for field in fields)), SCORES)


TOO_SHORT = "dense: too short"  # how tables mark measurements in which nothing could be skipped
_EVERYTHING = (None, "all", "-", "100 %")  # budgets that leave nothing out by design


def budget_of(record: Mapping[str, Any]) -> Any:
    """The budget of a record as text for tables, with ``(varies)`` if the method by design does not keep to it."""
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
