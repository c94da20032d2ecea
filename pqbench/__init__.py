"""pqbench: an evaluation and benchmarking harness for KV-cache methods, with a full PQCache at its centre."""

from pqbench.custom_generate import decoding_with
from pqbench.generation import decode, generate, prefill
from pqbench.method import Budget, Method

__all__ = ["Budget", "Method", "decode", "decoding_with", "generate", "prefill"]
