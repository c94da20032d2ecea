"""Records as figures need them: good rows with their numbers, runs that differ in one setting, and published
numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from plots.style import number, threads
from pqbench.records.classes import described
from pqbench.records.identity import class_name

PAPER = Path(__file__).resolve().parent.parent / "results" / "paper"  # csv files of published numbers
PUBLISHED = ["benchmark", "model", "method", "budget", "setting", "metric", "value", "unit", "certainty", "source"]
Settings = Mapping[str, Any]


def with_settings(table: pd.DataFrame, known: Mapping[str, tuple[Settings, Settings]]) -> pd.DataFrame:
    """The table with two more columns: ``settings`` (config.yaml of the run) and ``machine`` (a few words)."""
    nothing: tuple[Settings, Settings] = ({}, {})
    found: list[Any] = [known.get(key, nothing) for key in table["key"]]
    machines = [str(environment.get("accelerator") or environment.get("processor") or "-") for _, environment in found]
    return table.assign(settings=[settings for settings, _ in found], machine=machines)


def measured(
    table: pd.DataFrame, *columns: str, kind: str | None = None, benchmarks: Sequence[str] | None = None
) -> pd.DataFrame:
    """Good rows that hold a number in each of ``columns``, as numbers.

    Empty if a column is missing. ``settings`` and ``machine`` are added if the table lacks them.

    Args:
        kind: only rows of this kind of record, see :mod:`pqbench.records.kinds`; None for all.
        benchmarks: only rows of these suites, for a figure that is made for some suites; None for all.
    """
    good = table[table["status"] == "ok"]
    if kind is not None:
        good = good[good["kind"] == kind]
    if benchmarks is not None:
        good = good[good["benchmark"].isin(benchmarks)]
    if not set(columns) <= set(good.columns):
        return good.iloc[:0].assign(**{name: None for name in (*columns, "settings", "machine") if name not in good})
    good = good.assign(**{name: pd.to_numeric(good[name], errors="coerce") for name in columns})
    empty: list[Any] = [{}] * len(good)
    good = good if "settings" in good else good.assign(settings=empty)
    good = good if "machine" in good else good.assign(machine="-")
    return good.dropna(subset=list(columns)).reset_index(drop=True)


def numbers(table: pd.DataFrame, column: str) -> pd.Series:
    """A column as numbers; NaN for values that are not numbers, and if there is no such column."""
    values = table[column] if column in table else pd.Series(float("nan"), table.index)
    return pd.to_numeric(values, errors="coerce").astype(float)


def setting(settings: Settings, path: str, default: Any = None) -> Any:
    """The value at a path such as ``method.budget.ratio`` in the settings of a run."""
    value: Any = settings
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def without(settings: Settings, *paths: str) -> str:
    """The settings as text, without the values at ``paths``: the texts are equal for runs that differ in nothing else.
    The fingerprint of the method's source is left out as well, since it differs between any two methods."""
    copy: dict[str, Any] = json.loads(json.dumps({n: v for n, v in settings.items() if n != "code"}, default=str))
    for path in paths:
        *parents, last = path.split(".")
        holder = setting(copy, ".".join(parents)) if parents else copy
        if isinstance(holder, dict):
            holder.pop(last, None)
    return json.dumps(copy, sort_keys=True)


def alike(table: pd.DataFrame, *paths: str) -> Iterator[pd.DataFrame]:
    """Groups of rows of one benchmark and model whose settings differ only at ``paths``; the largest group first."""
    rest = [without(settings, *paths) for settings in table["settings"]]
    groups = table.assign(rest=rest).groupby(["benchmark", "model", "rest"], sort=False)
    yield from sorted((part for _, part in groups), key=len, reverse=True)


def families(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``family``: the method of a run, which may have another name.

    The family is ``pqcache`` for every run of the class that conf/method/pqcache.yaml names. If no yaml names the
    class, the family is the name of the run itself.
    """
    known = described("method")
    classes = [class_name(setting(settings, "method._target_", "")) for settings in table["settings"]]
    pairs = zip(classes, table["method"], strict=True)
    return table.assign(family=[known[one].name if one in known else str(method) for one, method in pairs])


def emulated(run: pd.DataFrame) -> bool:
    """Whether the times of the link are modelled in any of these rows."""
    return "emulated" in run and bool((run["emulated"] == True).any())  # noqa: E712 - a column of mixed values


def link(run: pd.DataFrame) -> str:
    """Text such as ``, KV over PCIe`` for runs of a host store; empty for others."""
    name = run["link"].iloc[0] if "link" in run else None
    return f", KV over {name.removeprefix('emulated ')}" if isinstance(name, str) and name != "-" else ""


def samples(counts: pd.Series) -> str:
    """The number of samples behind the points of a group, as ``n = 3`` or ``n = 2 to 3``."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def machine(table: pd.DataFrame) -> str:
    """The machine of the runs, for the footer; timing records also say how many threads they used."""
    names = table["device"].fillna(table["machine"]) if "device" in table else table["machine"]
    words = [", ".join(dict.fromkeys(names.dropna().astype(str)))]
    if "threads" in table:
        words += [threads(value) for value in dict.fromkeys(map(number, table["threads"].dropna()))]
    if "dtype" in table:
        words += dict.fromkeys(table["dtype"].dropna().astype(str))
    return ", ".join(word for word in words if word and word != "-")


def published(name: str, folder: Path | None = None) -> pd.DataFrame:
    """Published numbers of results/paper/NAME.csv with their source and how certain they are; empty without the
    file."""
    path = (PAPER if folder is None else folder) / f"{name}.csv"
    if not path.exists():
        return pd.DataFrame(columns=PUBLISHED)
    return pd.read_csv(path, dtype={"budget": str, "setting": str}, keep_default_na=False)


def unique(name: str, taken: dict[str, int]) -> str:
    """``name``, then ``name-2``, ... for figures of the same name."""
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"
