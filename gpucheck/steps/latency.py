"""Step 6: ``benchmark=latency``, seconds per token of a model of Llama-3.1-8B's shape with random weights.

Every case is a process of its own: full attention and PQCache, keys and values on the device and on the host, ordinary
steps and steps captured in CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from gpucheck.options import Options
from gpucheck.product import listed, measure, report
from gpucheck.result import Result
from gpucheck.targets import MILLION

FIGURES = (
    "tpot_ms",
    "ttft_s",
    "tt2t_s",
    "select_step_s",
    "fetch_step_s",
    "attend_step_s",
    "append_step_s",
    "dense_step_s",
    "link_bytes_step",
    "kernels",
    "text",
    "weights",
)
LEAST, MOST = 12, 75  # least seconds with which a case is started, most seconds while others wait
ROW = 131_072  # bytes of the keys and values of a token in all layers, bfloat16


@dataclass(frozen=True)
class Case:
    """One process. ``budget`` is a number of tokens or a share of the context; ``graphs`` and ``select_ahead`` are
    options of the run."""

    method: str
    store: str
    budget: float = 1024
    graphs: bool = False
    select_ahead: bool = False
    cache_tokens: int = 0

    @property
    def label(self) -> str:
        """The name of the case in the summary."""
        parts = [self.method, self.store, f"{self.budget:g}" if self.method != "full" else "all"]
        parts += [name for name in ("graphs", "select_ahead") if getattr(self, name)]
        return " ".join(parts + ([f"cache {self.cache_tokens}"] if self.cache_tokens else []))

    @property
    def switches(self) -> list[str]:
        """The options that are switched on."""
        return [f"{name}=true" for name in ("graphs", "select_ahead") if getattr(self, name)]


CASES = (
    Case("full", "device"),
    Case("pqcache", "device"),
    Case("pqcache", "host"),
    Case("full", "device", graphs=True),
    Case("pqcache", "device", graphs=True),
    Case("pqcache", "host", graphs=True),
    Case("pqcache", "device", 0.1, graphs=True),
    Case("pqcache", "host", select_ahead=True, graphs=True),
    Case("pqcache", "host", cache_tokens=8_192),
    Case("pqcache", "host", 0.1),
)


TINY = (
    Case("full", "device", 64),
    Case("pqcache", "device", 64),
    Case("pqcache", "host", 64),
    Case("pqcache", "host", 64, graphs=True, select_ahead=True),
)


def run(result: Result, options: Options) -> None:
    """Run the cases in the order of their importance while time allows; a million tokens come last."""
    contexts = (256, 512) if options.tiny else (16_384, 131_072)
    for case in TINY if options.tiny else CASES:
        if result.left < LEAST:
            result.row(case.label, skipped="no time left")
        else:
            _case(result, options, case, contexts)
    if not options.tiny:
        _million(result, options)


def _case(result: Result, options: Options, case: Case, contexts: tuple[int, ...], *more: str) -> None:
    budget = ("{:.0f}", "null") if case.budget >= 2 else ("null", "{}")
    tokens, ratio = (text.format(case.budget) for text in budget)
    measured = measure(
        options,
        f"latency {case.label}",
        [
            "benchmark=latency",
            f"method={case.method}",
            f"store={case.store}",
            f"benchmark.contexts={listed(contexts)}",
            f"benchmark.new_tokens={12 if options.tiny else 80}",
            "benchmark.repeats=1",
            f"budget.tokens={tokens}",
            f"budget.ratio={ratio}",
            *model(options),
            *case.switches,
            *small(options, case.method),
            *([f"store.cache_tokens={case.cache_tokens}"] if case.cache_tokens else []),
            *more,
        ],
        min(result.left - 3, max(result.left / 2, MOST)),
    )
    report(
        result,
        measured,
        case.label,
        len(contexts),
        FIGURES,
        store=case.store,
        wanted_budget=case.budget,
        graphs=case.graphs,
        select_ahead=case.select_ahead,
        cache_tokens=case.cache_tokens,
    )


def model(options: Options) -> list[str]:
    """The overrides that build the model on the device that was asked for."""
    found = ["model=llama31_8b", "model.weights=random", f"model.device={options.device}"]
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    }
    if options.tiny:
        found += ["model.dtype=float32", *(f"model.shape.{name}={value}" for name, value in tiny.items())]
    return found


def small(options: Options, method: str) -> list[str]:
    """The overrides of a tiny run."""
    own = ["methods.pqcache.b=4", "methods.pqcache.m=2"] if method == "pqcache" else []
    return own if options.tiny else []


def _million(result: Result, options: Options) -> None:
    """Measure a million tokens on the host, if memory and time allow: the prefill alone takes minutes."""
    needed, free = MILLION * ROW, psutil.virtual_memory().available
    case = Case("pqcache", "host", graphs=True)
    if needed > free:
        result.row(
            "pqcache host, a million tokens",
            skipped=f"its KV needs {needed / 1e9:.0f} GB of host memory and "
            f"{free / 1e9:.0f} GB are free; step 5 has one layer of it",
        )
    elif result.left < 400:
        result.row("pqcache host, a million tokens", skipped=f"its prefill takes longer than {result.left:.0f} s")
    else:
        _case(result, options, case, (MILLION,), "chunk=32768", f"model.shape.max_position_embeddings={MILLION + 128}")
