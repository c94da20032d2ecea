"""Step 7: the work of the host in three decode steps with keys and values on the host: launches, synchronisations,
time."""

from __future__ import annotations

from gpucheck.options import Options
from gpucheck.product import Measured, measure, report
from gpucheck.result import Result
from gpucheck.steps.latency import model, small

PHASE = ("launches", "synchronisations", "operations", "host_s", "device_s", "copied_bytes")
CONTEXT, SMALL = 16_384, 512


def run(result: Result, options: Options) -> None:
    """Profile PQCache with ``store=host`` by torch's profiler, with the option ``benchmark.profile``."""
    context, tokens = (SMALL, 64) if options.tiny else (CONTEXT, 1_024)
    measured = measure(
        options,
        "profile host",
        [
            "benchmark=latency",
            "method=pqcache",
            "store=host",
            f"benchmark.contexts=[{context}]",
            "benchmark.new_tokens=6",
            "benchmark.repeats=1",
            "benchmark.profile=true",
            f"budget.tokens={tokens}",
            "budget.ratio=null",
            *model(options),
            *small(options, "pqcache"),
        ],
        result.left - 3,
    )
    report(result, measured, "from the host", 1, ("tpot_ms", "trace", "profile_error"), store="host")
    _phases(result, measured)


def _phases(result: Result, measured: Measured) -> None:
    """Add a row for every phase of a step, over all layers."""
    for record in measured.records:
        for phase, figures in record.get("profile", {}).items():
            result.row(f"{record['method']}: {phase}", **figures, shown=PHASE)
        if "profile" not in record:
            result.row("the profile", False, error=record.get("profile_error") or record.get("error"))
