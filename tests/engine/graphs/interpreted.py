"""``python -m tests.engine.graphs.interpreted FILE``: decodes from a captured step with frozen launches, by Triton's
kernels in its interpreter, and also by the reference. It writes the tokens of both as JSON.

It runs in a process of its own, because Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from methods.full import Full
from methods.pqcache import PQCache
from pqbench.engine.decode import generate
from pqbench.engine.setting import Setting
from pqbench.method import Budget, Method
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import SHAPE, prompt_of, randomize

NEW = 14  # the interpreter takes a second for a step
PQ = PQCache(Budget(sink=4, ratio=0.3, minimum=12), m=2, b=2)
HOST = HostTier(link="local", margin=8)
CASES: dict[str, tuple[Method, Tier, bool]] = {
    "full": (Full(), DeviceTier(), False),
    "pqcache on the device": (PQ, DeviceTier(), False),
    "pqcache on the host": (PQ, HOST, False),
    "pqcache ahead": (PQ, HOST, True),
}


@cache
def model() -> PreTrainedModel:
    """A random model with one layer."""
    torch.manual_seed(0)
    return randomize(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})))


def tokens(name: str, body: str, graphs: bool) -> list[int]:
    """The continuation of a short prompt."""
    method, tier, ahead = CASES[name]
    # The interpreter supports only one thread at a time, so no index is built beside the prefill.
    setting = Setting(tier, overlap=False, backend=body, graphs=graphs, select_ahead=ahead, correction=0.3)
    found = generate(model(), prompt_of(60, seed=6), method, max_new_tokens=NEW, setting=setting)
    return [int(token) for token in found[0]]


def main() -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    results = {
        name: {"reference": tokens(name, "reference", False), "captured": tokens(name, "gpu", True)} for name in CASES
    }
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
