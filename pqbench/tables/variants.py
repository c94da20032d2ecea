"""The settings in which runs of one method differ, in a few words for a column of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pqbench.records.file import Record
from pqbench.records.identity import class_names

SHOWN = 3  # number of settings that are named; further ones are counted
WIDTH = 24  # largest number of characters of a value
# Settings that are not named: budgets have a column of their own, and runs of other code are marked as older.
_TOLD_ELSEWHERE = ("method.budget.", "code", "weights.")

Settings = Mapping[str, Any]


def with_variants(records: Sequence[Record], settings: Mapping[str, Settings]) -> list[Record]:
    """The records. Where several runs of a method on one benchmark and model differ, they get a field ``variant``.

    Args:
        records: records of any kinds.
        settings: the settings of every run, by key.
    """
    runs: dict[tuple[str, str, str], dict[str, Settings]] = {}
    for record in records:
        key = str(record.get("key"))
        if key in settings:
            runs.setdefault(_place(record), {})[key] = settings[key]
    named = {place: variants(known) for place, known in runs.items() if len(known) > 1}
    return [
        record | ({"variant": variant} if variant else {})
        for record in records
        for variant in [named.get(_place(record), {}).get(str(record.get("key")))]
    ]


def variants(runs: Mapping[str, Settings]) -> dict[str, str]:
    """For each run, by key, those of its settings that are not the same in all runs, such as ``b=8, m=2``."""
    flat = {key: dict(_flat(class_names(known))) for key, known in runs.items()}
    names = sorted({name for known in flat.values() for name in known if not name.startswith(_TOLD_ELSEWHERE)})
    differing = [name for name in names if len({known.get(name) for known in flat.values()}) > 1]
    last = [name.rpartition(".")[2] for name in differing]
    shown = {name: short if last.count(short) == 1 else name for name, short in zip(differing, last, strict=True)}
    return {
        key: _words({shown[name]: known[name] for name in differing if name in known}) for key, known in flat.items()
    }


def _words(settings: Mapping[str, str]) -> str:
    parts = [f"{name}={value}" for name, value in settings.items()]
    more = [f"and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more]) or "-"


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and short texts."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        text = node if isinstance(node, str) else json.dumps(node, default=str)
        yield prefix, text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _place(record: Record) -> tuple[str, str, str]:
    return str(record.get("benchmark")), str(record.get("model")), str(record.get("method"))
