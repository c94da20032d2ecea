"""pqbench: an evaluation and benchmarking harness for KV-cache methods, with a full PQCache at its centre."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqbench.engine.decode import decode, generate, prefill
    from pqbench.integrations.transformers import decoding_with
    from pqbench.method import Budget, Method
    from pqbench.support.loading import load_model

__all__ = ["Budget", "Method", "decode", "decoding_with", "generate", "load_model", "prefill"]

_HOMES = {
    "Budget": "pqbench.method",
    "Method": "pqbench.method",
    "decode": "pqbench.engine.decode",
    "decoding_with": "pqbench.integrations.transformers",
    "generate": "pqbench.engine.decode",
    "load_model": "pqbench.support.loading",
    "prefill": "pqbench.engine.decode",
}


def __getattr__(name: str) -> Any:
    """Public names load their module on first use: reading records needs neither torch nor transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
