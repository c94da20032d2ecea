"""Decoding from a captured step gives the same tokens as ordinary steps; a step that is wrong in a graph is wrong here
too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.pqcache import PQCache
from methods.pqcache.index import step_numbers
from methods.pqcache.state import PQCacheState
from pqbench.engine.decode import Generation, decode, generate
from pqbench.engine.graphs.steps import WARM
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.errors import ModelError
from pqbench.method import KV, Budget, Geometry, LayerState, Method, PaperBudget, Selection
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import prompt_of

NEW = 80  # several batches of tokens go to the host, and several of sixteen are encoded
GROWING = Budget(sink=4, ratio=0.3, minimum=12)
BUDGETS = {
    "growing": GROWING,
    "tokens": Budget(sink=3, window=5, tokens=40, ratio=None),
    "paper": PaperBudget(4, ratio=0.3),
}
TIERS: dict[str, Tier] = {
    "device": DeviceTier(),
    "host": HostTier(link="local", margin=16),
    "host, poisoned": HostTier(link="local", margin=8, debug=True),
    "host, cache": HostTier(link="local", margin=16, cache_tokens=64, cache_block=16, cache_admit=2),
}


def decoded(model: PreTrainedModel, ids: Tensor, method: Method, setting: Setting, question: int = 0) -> Generation:
    """The continuation by one method; the last ``question`` tokens of the prompt go through the method one by one."""
    known = ids[0, ids.shape[1] - question :].tolist()
    prefilled = prefill(model, ids[:, : ids.shape[1] - question], [method], None, None, NEW + question, setting)
    generation = decode(prefilled, 0, NEW, question=known, spend=True)
    generation.settle()
    prefilled.close()
    return generation


def same(first: Generation, second: Generation) -> None:
    """Check that tokens and counters are equal."""
    assert torch.equal(first.tokens, second.tokens)
    for one, other in zip(first.cohorts(), second.cohorts(), strict=True):
        assert (one.meter.steps, one.meter.attended) == (other.meter.steps, other.meter.attended)
        assert one.meter.index_bytes == other.meter.index_bytes
        assert one.store.length == other.store.length
        assert one.store.usage.bytes_to_host == other.store.usage.bytes_to_host
        assert one.state.facts == other.state.facts


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_full_attention_gives_the_same_tokens(llama: PreTrainedModel, kernels: str) -> None:
    ids = prompt_of(90, seed=3)
    alone, graphed = (decoded(llama, ids, Full(), Setting(backend=kernels, graphs=on)) for on in (False, True))
    same(alone, graphed)
    expected = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    assert torch.equal(graphed.tokens, expected[:, 90:])


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_pqcache_gives_the_same_tokens(llama: PreTrainedModel, tier: Tier, kernels: str, budget: Budget) -> None:
    ids, method = prompt_of(200, seed=7), PQCache(budget, m=2, b=4)
    same(*(decoded(llama, ids, method, Setting(tier, backend=kernels, graphs=on)) for on in (False, True)))


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_with_selection_ahead(llama: PreTrainedModel, tier: Tier) -> None:
    ids, method = prompt_of(200, seed=7), PQCache(GROWING, m=2, b=4)
    settings = (Setting(tier, graphs=on, select_ahead=True, correction=0.3) for on in (False, True))
    alone, graphed = (decoded(llama, ids, method, setting) for setting in settings)
    same(alone, graphed)
    assert 0 < graphed.cohorts()[0].state.facts["corrected_heads"] < 1


def test_a_question_a_batch_and_a_short_context(llama: PreTrainedModel) -> None:
    """Question tokens are captured steps too. For a short context, ordinary steps are used until the index can be
    made."""
    method = PQCache(GROWING, m=2, b=4)
    cases = ((prompt_of(120, seed=1), 9), (prompt_of(100, seed=2, batch=3), 0), (prompt_of(20, seed=4), 0))
    for ids, question in cases:
        same(*(decoded(llama, ids, method, Setting(graphs=on), question) for on in (False, True)))


def test_methods_that_share_a_prompt(llama: PreTrainedModel) -> None:
    ids, methods = prompt_of(150, seed=5), [Full(), PQCache(GROWING, m=2, b=4)]
    prefilled = prefill(llama, ids, methods, setting=Setting(graphs=True))
    shared = [decode(prefilled, m, NEW).tokens for m in (0, 1, 0)]
    for tokens, method in zip(shared, [*methods, methods[0]], strict=True):
        assert torch.equal(tokens, generate(llama, ids, method, max_new_tokens=NEW))


@dataclass(frozen=True)
class Frozen(PQCache):
    """A PQCache with a fault that only a graph shows."""

    fault: str = "all"

    def layer(self, geometry: Geometry) -> LayerState:
        return FrozenState(self, geometry)


class FrozenState(PQCacheState):
    """Passes Python numbers to the kernels, or reads a number of the device."""

    def select(self, q: Tensor, kv: KV) -> Selection:
        fault: Any = self.method
        if self.numbers is not None and fault.fault == "all":
            self.numbers = step_numbers(self.method.budget, kv.length + 1, self.geometry.prompt)
        if self.numbers is not None and fault.fault == "attended":
            attended = torch.tensor(
                [step_numbers(self.method.budget, kv.length + 1, self.geometry.prompt)[4]], dtype=torch.int32
            )
            self.numbers = (*self.numbers[:4], attended, self.numbers[5])
        if self.numbers is not None and fault.fault == "read":
            q = q * float(q.abs().max() > 0)
        return super().select(q, kv)


@pytest.mark.parametrize("fault", ["all", "attended"])
def test_a_frozen_number_is_noticed(llama: PreTrainedModel, fault: str) -> None:
    ids, method = prompt_of(200, seed=7), Frozen(GROWING, m=2, b=4, fault=fault)
    assert not torch.equal(
        generate(llama, ids, method, max_new_tokens=NEW, setting=Setting(graphs=True)),
        generate(llama, ids, method, max_new_tokens=NEW),
    )


def test_a_step_that_reads_the_device_is_refused(llama: PreTrainedModel) -> None:
    method = Frozen(GROWING, m=2, b=4, fault="read")
    with pytest.raises(ModelError, match="reads on the host"):
        generate(llama, prompt_of(200), method, max_new_tokens=WARM + 3, setting=Setting(graphs=True))


def test_a_buffer_that_moves_is_noticed(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(self: PQCacheState, kv: KV, length: int) -> Any:
        assert self.index.codebook is not None
        self.index.codebook = self.index.codebook.clone()
        return plan(self, kv, length)

    plan = PQCacheState.plan
    monkeypatch.setattr(PQCacheState, "plan", moves)
    with pytest.raises(RuntimeError, match="has moved"):
        generate(llama, prompt_of(200), PQCache(GROWING, m=2, b=4), max_new_tokens=9, setting=Setting(graphs=True))
