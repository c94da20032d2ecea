"""Whether a method skipped anything is recorded by every measurement, step by step and not on average."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.pqcache import PQCache
from pqbench import decode, prefill
from pqbench.engine.decode import Generation
from pqbench.measure.checks import attended_all, check_alive
from pqbench.measure.latency import Latency
from pqbench.measure.layer.attention import Attention
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.models.sources import LoadedModel
from tests.measure.conftest import Run

PROMPT = 100


@dataclass(frozen=True)
class Hiding(Method):
    """Attends to all rows, but from a context of ``start`` tokens on one KV head does not see the first one. Only the
    device knows how many tokens that makes."""

    start: int = 0
    budget: Budget = field(default_factory=lambda: Budget(tokens=64))

    @property
    def beyond_budget(self) -> str | None:
        return "sees what it likes"

    def layer(self, geometry: Geometry) -> LayerState:
        return HidingState(geometry, self.start)


class HidingState(LayerState):
    def __init__(self, geometry: Geometry, start: int) -> None:
        super().__init__(geometry)
        self.start = start

    def select(self, q: Tensor, kv: KV) -> Selection:
        known = self.geometry
        visible = torch.ones(known.batch, known.kv_heads, known.group, kv.length, dtype=torch.bool)
        visible[:, 0, :, 0] = kv.length < self.start
        return Selection(torch.arange(kv.length).expand(known.batch, known.kv_heads, -1), visible)


def decoded(loaded: LoadedModel, method: Method, new_tokens: int, prompt: int = PROMPT) -> Generation:
    ids = torch.randint(60, 120, (1, prompt), generator=torch.Generator().manual_seed(0))
    return decode(prefill(loaded.model, ids, [method]), 0, new_tokens, min_new_tokens=new_tokens)


@pytest.mark.parametrize(
    ("method", "new_tokens", "everything"),
    [
        (Full(), 9, True),
        (H2O(Budget(tokens=PROMPT + 8)), 9, True),  # the last of 8 steps has a context of 108 tokens
        (H2O(Budget(tokens=PROMPT + 7)), 9, False),
        (PQCache(Budget(tokens=PROMPT + 8), m=2, b=4), 9, True),
        (PQCache(Budget(tokens=PROMPT + 7), m=2, b=4), 9, False),  # 100.9 on average, more than the prompt
        (Hiding(PROMPT + 9), 9, True),
        (Hiding(PROMPT + 8), 9, False),
        (H2O(Budget(ratio=0.5)), 1, True),  # the only token comes from the dense prefill
        (InfLLM(Budget(ratio=0.5), prefill="infllm"), 1, False),  # which may skip tokens in the prefill
    ],
)
def test_one_skipped_token_is_enough(loaded: LoadedModel, method: Method, new_tokens: int, everything: bool) -> None:
    assert attended_all(decoded(loaded, method, new_tokens).cohorts()) is everything


def test_a_budget_that_grows_beyond_the_prompt_is_no_fault(loaded: LoadedModel) -> None:
    """90 % of 130 tokens are more than a prompt of 100, but they are not all."""
    method = H2O(Budget(ratio=0.9, sink=4))
    generation = decoded(loaded, method, 60)
    assert sum(meter.attended for meter in generation.meters()) / sum(m.steps for m in generation.meters()) > PROMPT
    check_alive(method, generation, PROMPT)


def test_latency_and_attention_record_it(loaded: LoadedModel, measure: Run) -> None:
    """After a prompt of 160 tokens, 8 steps end at 168; and 256 centroids are more than there are keys to cluster."""
    methods: dict[str, Method] = {"full": Full(), "pqcache": PQCache(Budget(tokens=168), m=2, b=4)}
    _, records = measure(Latency(contexts=[160, 161], new_tokens=9, repeats=1, warmup=0), methods, loaded)
    told = {(record["method"], record["context"]): record["skipped_nothing"] for record in records}
    assert told == {("full", 160): True, ("full", 161): True, ("pqcache", 160): True, ("pqcache", 161): False}
    methods = {"coarse": PQCache(m=2, b=4), "fine": PQCache(m=2, b=8)}
    layer = Attention(geometry="tiny", contexts=[160], budgets=[80], repeats=1, steps=2, warmup=0, sweep_mb=0)
    _, records = measure(layer, methods)
    assert {r["method"]: r["skipped_nothing"] for r in records} == {"coarse": False, "fine": True, "full": True}
