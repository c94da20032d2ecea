"""Step 5: ``benchmark=attention``, one layer's decode step by phase, with KV on the device and then on the host."""

from __future__ import annotations

from gpucheck.options import Options
from gpucheck.product import listed, measure, report
from gpucheck.result import Result
from gpucheck.targets import MILLION

FIGURES = ("total_ms", "select_s", "fetch_s", "attend_s", "append_s", "kernel", "build_s", "dense_ratio", "model_ms")
LAYERS = 32  # of Llama-3.1-8B
WEIGHTS_MS = 4.8  # time of a token to read 16.1 GB of weights at 3.35 TB/s (H100)


def run(result: Result, options: Options) -> None:
    """Measure both tiers at two lengths and two budgets; then a million tokens on the host, if time allows."""
    contexts, budgets = ((512, 1024), (64, 0.1)) if options.tiny else ((16_384, 131_072), (1024, 0.1))
    for store in ("device", "host"):
        share = result.left / (2 if store == "device" else 1) - 3
        measured = measure(
            options,
            f"attention {store}",
            [
                "benchmark=attention",
                "method=[full,pqcache]",
                f"store={store}",
                f"benchmark.device={options.device}",
                f"benchmark.dtypes=[{'float32' if options.tiny else 'bfloat16'}]",
                "benchmark.repeats=3",
                f"benchmark.contexts={listed(contexts)}",
                f"benchmark.budgets={listed(budgets)}",
                *small(options),
            ],
            share,
        )
        report(result, measured, store, len(contexts) * (len(budgets) + 1), FIGURES, store=store)
    if not options.tiny and result.left > 30:
        _million(result, options)


def small(options: Options) -> list[str]:
    """The overrides of a tiny run."""
    tiny = ["benchmark.geometry=tiny", "methods.pqcache.b=4", "methods.pqcache.m=2", "benchmark.steps=2"]
    return tiny if options.tiny else []


def _million(result: Result, options: Options) -> None:
    """Measure one layer with a million tokens. All layers would not fit into the memory of this host; ``model_ms`` is
    the time that all layers and the weights would take at the speed of this layer, without further launches of a
    model."""
    measured = measure(
        options,
        "attention million",
        [
            "benchmark=attention",
            "method=pqcache",
            "store=host",
            f"benchmark.device={options.device}",
            "benchmark.dtypes=[bfloat16]",
            "benchmark.repeats=2",
            f"benchmark.contexts=[{MILLION}]",
            "benchmark.budgets=[1024]",
        ],
        result.left - 3,
    )
    for record in measured.records:
        if record.get("total_s") and record["method"] != "full":
            record["model_ms"] = LAYERS * record["total_s"] * 1e3 + WEIGHTS_MS
    report(result, measured, "a million tokens, host", 1, FIGURES, store="host")
