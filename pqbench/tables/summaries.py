"""Computes figures from records: scores by task with averages and intervals, and the costs of each run."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from pqbench.benchmarks.averages import GROUPS, PQCACHE_TABLE2, averages
from pqbench.records.file import Record
from pqbench.records.kinds import budget_of, kind_of, skipped_nothing
from pqbench.terminal import plain

KEYS = ["benchmark", "model", "method", "budget", "question", "variant", "key"]  # fields by which runs differ
MEANS = ["score", "mass", "recall", "output_error"]
MEDIANS = ["ttft_s", "tt2t_s", "tpot_s"]
COSTS = [*MEANS[1:], *MEDIANS, "attended_tokens", "index_bytes", "kv_bytes"]
DRAWS = 1000  # bootstrap resamples
LEVEL = 95  # percent


@dataclass(frozen=True)
class Estimate:
    """A mean score in percent over ``n`` samples, with its bootstrap interval, which is not shown if n is 1."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        interval = f" [{self.low:.1f}, {self.high:.1f}]" if self.n > 1 else ""
        return f"{self.value:.1f}{interval} n={self.n}"


@dataclass
class Run:
    """One method in one configuration: its names (:data:`KEYS`), sample counts, scores by column, and costs."""

    names: dict[str, str]
    n: int
    failed: int
    score: float | None  # over all samples, whatever the task
    scores: dict[str, Estimate] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    further: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # task -> other metrics, or length buckets
    too_short: int = 0  # samples in which nothing could be skipped


@dataclass
class Suite:
    """All runs of one benchmark on one model. ``columns`` are tasks, then averages."""

    benchmark: str
    model: str
    columns: list[str]
    runs: list[Run]

    @property
    def labels(self) -> list[str]:
        """The names that distinguish the runs: always the method, and others only if runs of a method differ in
        them."""
        shown = ["method"]
        for name in ("budget", "question", "variant", "key"):
            alike = {tuple(run.names[label] for label in shown) for run in self.runs}
            different = len({run.names[name] for run in self.runs}) > 1
            if different and (name not in ("variant", "key") or len(alike) < len(self.runs)):
                shown.append(name)
        return shown


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A table with one row per record. Fields that a record lacks are empty. Names are plain text."""
    try:
        table = pd.DataFrame(list(records))
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and pandas cannot
        table = pd.DataFrame([{_whole(name): _whole(value) for name, value in record.items()} for record in records])
    table["kind"] = [kind_of(record) for record in records]
    table["too_short"] = [skipped_nothing(record) for record in records]
    table["budget"] = [budget_of(record) for record in records]
    for column in (*KEYS, "status", "task", "sample_id", "score", *COSTS):
        if column not in table:
            table[column] = None
    for column in (*KEYS, "task"):
        table[column] = [plain("-" if _missing(value) else value) for value in table[column]]
    sizes = table.reindex(columns=["device_bytes", "host_bytes"]).apply(pd.to_numeric, errors="coerce")
    table["kv_bytes"] = sizes.sum(axis=1, min_count=1)
    return table.copy()  # as one block of memory, because columns were added one by one


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run, in the order in which runs first appear: counts, mean score, and costs in the units of the
    records."""
    rows = []
    for names, group in table.groupby(KEYS, sort=False, dropna=False):
        good = group[group["status"] == "ok"]
        row = dict(zip(KEYS, names, strict=True)) | {"n": len(good), "failed": len(group) - len(good)}
        row["too_short"] = int(good["too_short"].sum())
        rows.append(row | {column: centre(good[column], column) for column in ("score", *COSTS)})
    return pd.DataFrame(rows, columns=[*KEYS, "n", "failed", "too_short", "score", *COSTS])


def centre(values: pd.Series, column: str) -> float | None:
    """Mean of the numbers in a column of records, or their median if they are timings; None if there are no numbers."""
    numbers = pd.to_numeric(values, errors="coerce").dropna()
    if numbers.empty:
        return None
    return float(numbers.median() if column in MEDIANS else numbers.mean())


def suites(table: pd.DataFrame) -> list[Suite]:
    """Scores and costs of every benchmark and model in the table."""
    if table.empty:
        return []
    extended = (table["benchmark"] == "longbench") & table["task"].str.endswith("_e")
    titled = table.assign(suite=table["benchmark"].where(~extended, "longbench_e"))
    return [
        _suite(str(names[0]), str(names[1]), group) for names, group in titled.groupby(["suite", "model"], sort=False)
    ]


def _suite(benchmark: str, model: str, table: pd.DataFrame) -> Suite:
    tasks = list(dict.fromkeys(table["task"]))
    runs, columns = [], dict.fromkeys(tasks)
    for names, group in table.groupby(KEYS, sort=False, dropna=False):
        good = group[group["status"] == "ok"]
        draws = {task: resampled(task, scores) for task, scores in _by_task(good).items()}
        scores = {task: _estimate(draw) for task, draw in draws.items()}
        scores |= _averages(benchmark, tasks, draws)
        columns |= dict.fromkeys(scores)
        run = Run(dict(zip(KEYS, map(str, names), strict=True)), len(good), len(group) - len(good), None, scores)
        run.score = centre(good["score"], "score")
        run.too_short = int(good["too_short"].sum()) if "too_short" in good else 0
        run.further = {str(task): _further(str(task), rows) for task, rows in good.groupby("task", sort=False)}
        run.costs = {column: centre(good[column], column) for column in COSTS}
        runs.append(run)
    return Suite(benchmark, model, list(columns), runs)


def _by_task(good: pd.DataFrame) -> dict[str, np.ndarray]:
    """Scores of every task in the order of sample ids, so that runs over the same samples are resampled alike."""
    found: dict[str, list[float]] = {}
    numbers = pd.to_numeric(good["score"], errors="coerce").astype(float)
    rows = zip(good["sample_id"], good["task"], numbers, strict=True)
    for _, task, score in sorted(rows, key=lambda row: str(row[0])):  # lists, not frames: there are many small groups
        if score == score:
            found.setdefault(str(task), []).append(score)
    return {task: np.array(scores) for task, scores in found.items()}


def _further(task: str, good: pd.DataFrame) -> dict[str, Estimate]:
    """Estimates of the scores that a benchmark reports in addition to the official score."""
    values: dict[str, list[float]] = {}
    rows = zip(good["sample_id"], good["scores"], strict=True) if "scores" in good else ()
    for _, scores in sorted(rows, key=lambda row: str(row[0])):
        for name, value in scores.items() if isinstance(scores, dict) else ():
            if name != "score" and isinstance(value, int | float):
                values.setdefault(plain(name), []).append(float(value))
    return {name: _estimate(resampled(task, np.array(members))) for name, members in values.items()}


@dataclass(frozen=True)
class Draws:
    """A mean, and the same mean over each resample of its ``n`` samples."""

    value: float
    means: np.ndarray
    n: int


def resampled(task: str, scores: np.ndarray) -> Draws:
    """Bootstrap of a task's mean. The seed depends on the task's name, so that resamples are the same for every run and
    independent between tasks."""
    generator = np.random.default_rng(zlib.crc32(task.encode()))
    block = max(1, (1 << 20) // len(scores))
    means = [
        scores[generator.integers(0, len(scores), (min(block, DRAWS - start), len(scores)))].mean(1)
        for start in range(0, DRAWS, block)
    ]
    return Draws(float(scores.mean()), np.concatenate(means), len(scores))


def _estimate(draws: Draws) -> Estimate:
    low, high = np.percentile(draws.means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(draws.value, float(low), float(high), draws.n)


def _averages(benchmark: str, tasks: Sequence[str], draws: Mapping[str, Draws]) -> dict[str, Estimate]:
    """Averages over tasks: the official averages for LongBench, and the plain mean for other benchmarks. There is no
    average over an incomplete set of tasks."""

    official = benchmark.startswith("longbench")

    def over(scores: Mapping[str, float]) -> dict[str, float]:
        if official:
            return averages(scores)
        return {"mean": fmean(scores.values())} if len(tasks) > 1 and set(tasks) == scores.keys() else {}

    values = over({task: draw.value for task, draw in draws.items()})
    resamples = zip(*(draw.means.tolist() for draw in draws.values()), strict=True) if values else ()
    replicas = [over(dict(zip(draws, means, strict=True))) for means in resamples]
    return {
        name: _estimate(Draws(value, np.array([replica[name] for replica in replicas]), _count(name, draws)))
        for name, value in values.items()
    }


def _count(average: str, draws: Mapping[str, Draws]) -> int:
    """Number of samples in an average."""
    members = PQCACHE_TABLE2 if average == "pqcache_table2" else GROUPS.get(average.removesuffix("_e"), tuple(draws))
    return sum(draw.n for task, draw in draws.items() if task.removesuffix("_e") in members or task in members)


def _whole(value: object) -> Any:
    """Text in which every half of a surrogate pair is replaced by U+FFFD. Other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)
