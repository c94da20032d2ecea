"""The constants of the latency model for a machine, fitted to its records, and the errors of the predictions.

Constants are fitted on every second context. The predictions are checked on the other contexts, which the fit has not
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from pqbench.costs.model import Hardware, MethodProfile, ModelShape, prefill_operations, step_cost, tpot, ttft
from pqbench.errors import DataError

FIELDS = ("ttft_s", "tpot_s")
_NEVER = 1e30  # a rate so high that its term vanishes; used when the fit gives the term no time


@dataclass(frozen=True)
class Check:
    """One time that the fit has not seen: the measured time (median over repeats) and the predicted time, in
    seconds."""

    method: str
    context: int
    field: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Absolute error as a share of the measured time."""
        return abs(self.predicted - self.measured) / self.measured


@dataclass(frozen=True)
class Fit:
    """The fitted machine, the methods measured on it, and the checks on contexts that were not fitted."""

    hardware: Hardware
    profiles: dict[str, MethodProfile]
    fitted: list[int]  # contexts used by the fit
    checks: list[Check]

    def median_error(self, field: str) -> float | None:
        """Median error of the checks of a field; None if there are no checks."""
        errors = [check.error for check in self.checks if check.field == field]
        return median(errors) if errors else None


def fit_machine(run: pd.DataFrame, shape: ModelShape) -> Fit:
    """Fit the latency model to records of one machine, model, dtype and link.

    Args:
        run: rows of ``benchmark=latency`` with status ok; ``method`` tells the methods apart. Each kind of time in the
            records determines some constants. Times of the model and of attention give the bandwidth of memory and the
            overhead of a layer. Times of select and append give the rate of index scans and their overhead. Times of
            fetch give the link, and TTFT gives the rate of matrix products.

    Raises:
        DataError: there are fewer than two contexts, or the records lack figures.
    """
    points = _points(run)
    contexts = sorted(points["context"].unique())
    if len(contexts) < 2:
        raise DataError("the latency model needs records of two contexts or more: set benchmark.contexts=[1024,4096]")
    fitted = contexts[::2] if len(contexts) > 2 else contexts
    known = points[points["context"].isin(fitted)]
    dtype = str(run["dtype"].iloc[0])
    profiles = {str(name): profile(part, shape, dtype, 0.0) for name, part in known.groupby("method", sort=False)}
    hardware = _hardware(known, shape, profiles, dtype, str(run["device"].iloc[0]))
    profiles = {
        str(name): profile(part, shape, dtype, hardware.peak[dtype])
        for name, part in known.groupby("method", sort=False)
    }
    unseen = points[~points["context"].isin(fitted)]
    checks = [check for _, row in unseen.iterrows() for check in _checks(row, hardware, shape, profiles, dtype)]
    return Fit(hardware, profiles, [int(context) for context in fitted], checks)


def profile(rows: pd.DataFrame, shape: ModelShape, dtype: str, peak: float) -> MethodProfile:
    """The profile of one method from its records, as means over contexts.

    ``index_bytes`` and the fetched rows come from the meters in the records. ``build`` is the time of the index,
    converted to operations at ``peak`` operations per second.
    """
    length = rows["prompt_tokens"] + rows["new_tokens"] / 2  # number of cached tokens in the middle of decoding
    moved = rows["attended_tokens"] * shape.row_bytes(dtype)
    heads = shape.layers * shape.kv_heads
    fetched = float((rows["to_device_bytes_step"] / moved).mean()) if _on_host(rows) else 0.0
    return MethodProfile(
        attended=min(1.0, float((rows["attended_tokens"] / length).mean())),
        index_bytes=float((rows["index_bytes"] / (length * heads)).mean()),
        fetched=min(1.0, fetched),
        on_host=_on_host(rows),
        build=float((rows["index_build_s"] * peak / (rows["prompt_tokens"] * heads)).mean()),
    )


def _points(run: pd.DataFrame) -> pd.DataFrame:
    """One row per method and context, with medians over repeats. Rows that lack a figure are left out, such as those of
    captured steps, which have no phases."""
    missing = [name for name in _NEEDED if name not in run]
    if missing:
        raise DataError(f"latency records without {', '.join(missing)}: measure again with this version of pqbench")
    numbers = run[["method", "context"]].assign(**{name: pd.to_numeric(run[name], errors="coerce") for name in _NEEDED})
    whole = numbers.dropna()
    points = whole.groupby(["method", "context"], as_index=False, sort=False).median()
    return points.assign(context=points["context"].astype(int))


_PHASES = ("dense_step_s", "attend_step_s", "fetch_step_s", "select_step_s", "append_step_s")
_METERS = (
    "prompt_tokens",
    "new_tokens",
    "attended_tokens",
    "index_bytes",
    "index_build_s",
    "to_device_bytes_step",
    "host_bytes",
)
_NEEDED = (*FIELDS, *_PHASES, *_METERS)


def _hardware(
    points: pd.DataFrame, shape: ModelShape, profiles: dict[str, MethodProfile], dtype: str, name: str
) -> Hardware:
    """Rates and overheads, fitted by least squares of relative errors, none of them negative."""
    length = points["prompt_tokens"] + points["new_tokens"] / 2
    costs = [
        step_cost(shape, profiles[str(method)], float(tokens), 1, dtype)
        for method, tokens in zip(points["method"], length, strict=True)
    ]
    layers = [float(shape.layers)] * len(costs)
    linked = bool((points["host_bytes"] > 0).any())
    dense = points["dense_step_s"] + points["attend_step_s"] + (0.0 if linked else points["fetch_step_s"])
    reading, layer = _solve([[c.read_bytes for c in costs], layers], dense)
    fetching, latency = 0.0, 0.0
    if linked:
        fetching, latency = _solve([[c.link_bytes for c in costs], layers], points["fetch_step_s"])
    indexed = [shape.layers * float(c.index_bytes > 0) for c in costs]
    scanning, select, appending = _solve(
        [[c.index_operations for c in costs], indexed, layers], points["select_step_s"] + points["append_step_s"]
    )
    whole = [prefill_operations(shape, float(tokens)) for tokens in points["prompt_tokens"]]
    products = points["ttft_s"] - points["index_build_s"] - shape.layers * (layer + appending)
    (multiplying,) = _solve([whole], products)
    return Hardware(
        name,
        _rate(reading),
        {dtype: _rate(multiplying)},
        _rate(scanning),
        _rate(fetching),
        latency,
        layer + appending,
        select,
        None,
        builds_apart=False,
    )


def _solve(columns: Sequence[Sequence[float]], seconds: pd.Series) -> list[float]:
    """Coefficients >= 0 with which the columns add up to ``seconds`` with the least squares of relative errors. Columns
    are first scaled to a largest value of 1, so that bytes and layers have similar weight."""
    matrix, target = np.array(columns, dtype=float).T, np.maximum(np.asarray(seconds, dtype=float), 1e-12)
    sizes = np.maximum(matrix.max(0), 1e-30)
    solution, _ = nnls(matrix / sizes / target[:, None], np.ones(len(target)))
    return [float(value) for value in solution / sizes]


def _rate(seconds_per_unit: float) -> float:
    return 1 / seconds_per_unit if seconds_per_unit > 1 / _NEVER else _NEVER


def _on_host(rows: pd.DataFrame) -> bool:
    return bool((rows["host_bytes"] > 0).all())


def _checks(
    row: pd.Series, hardware: Hardware, shape: ModelShape, profiles: dict[str, MethodProfile], dtype: str
) -> list[Check]:
    method = profiles.get(str(row["method"]))
    if method is None:
        return []
    prompt = float(row["prompt_tokens"])
    predicted = {
        "ttft_s": ttft(hardware, shape, method, prompt, 1, dtype),
        "tpot_s": tpot(hardware, shape, method, prompt + float(row["new_tokens"]) / 2, 1, dtype),
    }
    return [Check(str(row["method"]), int(row["context"]), name, float(row[name]), predicted[name]) for name in FIELDS]
