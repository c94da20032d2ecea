"""The targets on one H100, for a model of Llama-3.1-8B's shape in bfloat16 and one sequence.

A missed target is reported, but is no error; it shows where work is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]
K128, MILLION = 131_072, 1_048_576


@dataclass(frozen=True)
class Verdict:
    """A target with the measured figure; ``met`` is None if nothing was measured."""

    name: str
    wanted: str
    measured: str
    met: bool | None

    def facts(self) -> dict[str, Any]:
        """The verdict as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """A target. ``value`` finds the figure among the rows of all steps (by step number); it must be at most ``most`` or
    at least ``least``, if these are given."""

    name: str
    unit: str
    value: Callable[[Mapping[int, Sequence[Row]]], float | None]
    most: float | None = None
    least: float | None = None

    def judge(self, results: Iterable[Mapping[str, Any]]) -> Verdict:
        """Compare the target with the measured figure."""
        value = self.value({content["step"]: content["rows"] for content in results})
        wanted = f"<= {self.most:g} {self.unit}" if self.most is not None else f">= {self.least:g} {self.unit}"
        if value is None:
            return Verdict(self.name, wanted, "", None)
        met = value <= self.most if self.most is not None else value >= (self.least or 0.0)
        return Verdict(self.name, wanted, f"{value:.3g} {self.unit}", met)


def best(found: Iterable[Row], figure: str, **wanted: Any) -> float | None:
    """The smallest figure among the rows that have all the wanted values."""
    fitting = [row for row in found if all(row.get(name) == value for name, value in wanted.items())]
    return min((row[figure] for row in fitting if row.get(figure) is not None), default=None)


def _per_token(method: str, store: str, budget: float, context: int = K128) -> Callable[..., float | None]:
    def value(steps: Mapping[int, Sequence[Row]]) -> float | None:
        return best(steps.get(6, ()), "tpot_ms", method=method, store=store, wanted_budget=budget, context=context)

    return value


def _ratio(figure: str, budget: float) -> Callable[..., float | None]:
    """PQCache on the device over full attention, both at 128K."""

    def value(steps: Mapping[int, Sequence[Row]]) -> float | None:
        rows = steps.get(6, ())
        ours = best(rows, figure, method="pqcache", store="device", wanted_budget=budget, context=K128)
        full = best(rows, figure, method="full", context=K128)
        return ours / full if ours and full else None

    return value


def _step4(figure: str, **wanted: Any) -> Callable[..., float | None]:
    return lambda steps: best(steps.get(4, ()), figure, **wanted)


def _million(steps: Mapping[int, Sequence[Row]]) -> float | None:
    """A whole model with a million tokens: measured, or computed from the measured step of one layer."""
    whole = _per_token("pqcache", "host", 1024, MILLION)(steps)
    return whole or best(steps.get(5, ()), "model_ms", method="pqcache", store="host", context=MILLION)


def _slowest(steps: Mapping[int, Sequence[Row]]) -> float | None:
    """The smallest share of the memory bandwidth among the kernels that are bound by it."""
    return best(steps.get(4, ()), "hbm_share", bound="memory")


TARGETS = (
    Target("pqcache, 128K, 1024 tokens, KV on the device", "ms a token", _per_token("pqcache", "device", 1024), most=7),
    Target("pqcache, 128K, 1024 tokens, KV on the host", "ms a token", _per_token("pqcache", "host", 1024), most=10),
    Target("pqcache, 1M, 1024 tokens, KV on the host", "ms a token", _million, most=10),
    Target("pqcache, 128K, 10 %, KV on the device, against full", "x", _ratio("tpot_ms", 0.1), most=1),
    Target("time to second token, pqcache against full", "x", _ratio("tt2t_s", 1024), most=1.05),
    Target("selection at 128K", "microseconds a layer", _step4("microseconds", selects=True), most=60),
    Target("row gather from the host against memcpy", "x", _step4("memcpy_share", rows=32_768), least=0.8),
    Target("slowest kernel at 128K against HBM bandwidth", "x", _slowest, least=0.6),
)
