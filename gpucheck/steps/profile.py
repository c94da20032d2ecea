"""Step 7: what the host does in three steps of decoding with KV on the host: launches, synchronisations, time."""

from __future__ import annotations

from gpucheck.options import Options
from gpucheck.product import measure, offered, report
from gpucheck.result import Result, Skipped
from gpucheck.steps.latency import model, small

FIGURES = ("tpot_ms", "profile")


def run(result: Result, options: Options) -> None:
    """PQCache on the host at 16K tokens through torch's profiler, by the product's own option."""
    if not offered("benchmark/latency.yaml", "profile"):
        raise Skipped("benchmark=latency has no profile=true")
    measured = measure(options, "profile host", [
        "benchmark=latency", "method=pqcache", "store=host", f"benchmark.contexts=[{512 if options.tiny else 16_384}]",
        "benchmark.new_tokens=8", "benchmark.repeats=1", "benchmark.profile=true", "budget.tokens=1024",
        "budget.ratio=null", *model(options), *small(options, "pqcache"),
    ], result.left - 3)  # fmt: skip
    report(result, measured, "three steps from the host", 1, FIGURES, store="host")
