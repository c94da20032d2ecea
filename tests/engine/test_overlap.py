"""Indices built in the background: same tokens, really beside the prefill, awaited layer by layer, with errors
reported."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.pqcache import PQCache
from pqbench.engine.decode import decode, generate
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.setting import Setting
from pqbench.kernels.threads import usable_cores
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.engine.test_generation import SMALL, methods
from tests.support import prompt_of

ALONE, BESIDE = Setting(overlap=False), Setting(overlap=True)
PATIENCE = 20.0  # seconds; reached only when the order under test does not hold


@pytest.fixture(autouse=True)
def idle_core() -> Iterator[None]:
    """Let the model compute on one core, so that another core is idle."""
    if usable_cores() < 2:
        pytest.skip("one core: nothing can run beside the model")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Log:
    """The events of an index, in their order."""

    entered: dict[int, threading.Event] = field(default_factory=lambda: {i: threading.Event() for i in range(2)})
    passed: dict[int, threading.Event] = field(default_factory=lambda: {i: threading.Event() for i in range(2)})
    threads: set[str] = field(default_factory=set)
    late: list[str] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Log:
        return self


@dataclass(frozen=True)
class Watcher(Method):
    """Full attention whose index in layer ``layer`` is finished only after ``condition`` has happened."""

    log: Log
    rule: str
    evicts = False

    def layer(self, geometry: Geometry) -> LayerState:
        return WatcherState(self, geometry)


class WatcherState(LayerState):
    """Logs when it was called, and waits for the condition."""

    def __init__(self, method: Watcher, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method, self.log = method, method.log

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.log.entered[self.geometry.layer].set()

    def finish_prefill(self, kv: KV) -> None:
        self.log.threads.add(threading.current_thread().name)
        layer, rule = self.geometry.layer, self.method.rule
        if rule == "fail":
            raise ValueError("no index today")
        if rule == "next layer computes" and layer == 0 and not self.log.entered[1].wait(PATIENCE):
            self.log.late.append("layer 1 waited for the index of layer 0")
        if rule == "first step begins" and layer == 1 and not self.log.passed[0].wait(PATIENCE):
            self.log.late.append("the first step waited for the index of layer 1 before layer 0 answered")

    def select(self, q: Tensor, kv: KV) -> Selection:
        self.log.passed[self.geometry.layer].set()
        return Selection()


@pytest.mark.parametrize("name", list(methods(SMALL)))
def test_overlap_changes_no_token(model: PreTrainedModel, name: str) -> None:
    ids = prompt_of(90, seed=4)
    method = methods(SMALL)[name]
    assert torch.equal(
        generate(model, ids, method, max_new_tokens=12, setting=ALONE),
        generate(model, ids, method, max_new_tokens=12, setting=BESIDE),
    )


def test_codes_and_codebooks_are_bitwise_the_same(llama: PreTrainedModel) -> None:
    ids, states = prompt_of(300, seed=5), []
    for setting in (ALONE, BESIDE):
        prefilled = prefill(llama, ids, [PQCache(Budget(ratio=0.2), m=2, b=5)], setting=setting)
        prefilled.build(0)
        states.append([prefilled.observer(0, layer, 0).state for layer in prefilled.layers])
    for alone, beside in zip(*states, strict=True):
        assert isinstance(alone, LayerState)
        assert torch.equal(alone.index.codebook, beside.index.codebook)  # type: ignore[attr-defined]
        assert torch.equal(alone.index.codes.view(), beside.index.codes.view())  # type: ignore[attr-defined]


def test_a_layers_index_is_built_while_the_next_layer_computes(llama: PreTrainedModel) -> None:
    log = Log()
    prefilled = prefill(llama, prompt_of(20), [Watcher(log, "next layer computes")], setting=BESIDE)
    prefilled.build(0)
    assert log.late == []
    assert log.threads.isdisjoint({threading.current_thread().name})


def test_the_first_step_waits_only_for_the_layers_it_reaches(llama: PreTrainedModel) -> None:
    log = Log()
    prefilled = prefill(llama, prompt_of(20), [Watcher(log, "first step begins")], setting=BESIDE)
    decode(prefilled, 0, 3)
    assert log.late == []


def test_without_overlap_the_caller_builds(llama: PreTrainedModel) -> None:
    log = Log()
    decode(prefill(llama, prompt_of(20), [Watcher(log, "none")], setting=ALONE), 0, 2)
    assert log.threads == {threading.current_thread().name}


def test_a_model_that_takes_all_cores_has_nothing_beside_it(llama: PreTrainedModel) -> None:
    torch.set_num_threads(usable_cores())
    log = Log()
    prefilled = prefill(llama, prompt_of(20), [Watcher(log, "none")], setting=BESIDE)
    assert log.threads == set()
    generation = decode(prefilled, 0, 2)
    assert log.threads == {threading.current_thread().name}
    assert generation.pending_s > 0  # of the index, between the first token and the step to the second


def test_several_methods_never_overlap(llama: PreTrainedModel) -> None:
    log = Log()
    prefilled = prefill(llama, prompt_of(20), [Watcher(log, "none"), Watcher(log, "none")], setting=BESIDE)
    prefilled.build(1)
    assert log.threads == {threading.current_thread().name}


@pytest.mark.parametrize("setting", [ALONE, BESIDE])
def test_an_index_that_fails_says_so_where_it_is_needed(llama: PreTrainedModel, setting: Setting) -> None:
    prefilled = prefill(llama, prompt_of(20), [Watcher(Log(), "fail")], setting=setting)
    for _ in range(2):  # every time
        with pytest.raises(ValueError, match="no index today"):
            decode(prefilled, 0, 3)


def test_a_spent_method_cannot_decode_again_and_an_unspent_one_can(llama: PreTrainedModel) -> None:
    def fresh() -> Prefilled:
        return prefill(llama, prompt_of(60, seed=6), [methods(SMALL)["h2o"]], setting=BESIDE)

    kept, spent = fresh(), fresh()
    first = decode(kept, 0, 8).tokens
    assert torch.equal(decode(kept, 0, 8).tokens, first)
    assert torch.equal(decode(spent, 0, 8, spend=True).tokens, first)
    with pytest.raises(RuntimeError, match="spent"):
        decode(spent, 0, 8)


def test_time_to_second_token_counts_an_index_once(llama: PreTrainedModel) -> None:
    for setting in (ALONE, BESIDE):
        prefilled = prefill(llama, prompt_of(60), [PQCache(SMALL, m=2, b=3)], setting=setting)
        generation = decode(prefilled, 0, 4)
        own = generation.pending_s if setting is ALONE else 0.0
        assert (generation.pending_s > 0) == (setting is ALONE)
        assert generation.tt2t_s == pytest.approx(generation.ttft_s + own + generation.steps_s[0])
        assert generation.index_s > 0


@pytest.mark.parametrize("tier", [DeviceTier(), HostTier(link="local")])
@pytest.mark.parametrize("setting", [ALONE, BESIDE])
def test_what_an_evicting_method_dropped_is_freed_while_it_decodes(
    llama: PreTrainedModel, setting: Setting, tier: Tier
) -> None:
    ids = prompt_of(60, seed=6)
    prefilled = prefill(llama, ids, [methods(SMALL)["h2o"]], setting=replace(setting, tier=tier))
    prompts = [weakref.ref(layer.prompt(layer.rows[0])) for layer in prefilled.layers.values()]
    held = decode(prefilled, 0, 4, spend=True)
    held.settle()
    assert [prompt() for prompt in prompts] == [None, None]  # the prefilled prompt itself is still held
    whole = decode(prefill(llama, ids, [methods(SMALL)["h2o"]], setting=setting), 0, 4)
    assert torch.equal(held.tokens, whole.tokens)


@pytest.mark.parametrize("name", ["h2o", "pqcache_plus arranged"])
def test_rows_are_kept_or_arranged_beside_the_prefill(llama: PreTrainedModel, name: str) -> None:
    prefilled = prefill(llama, prompt_of(300, seed=6), [methods(SMALL)[name]], setting=BESIDE)
    prefilled.build(0)
    before = [prefilled.built(0, layer, 0).stores[0] for layer in prefilled.layers]
    groups = decode(prefilled, 0, 4, spend=True).cohorts()
    assert [group.store for group in groups] == before
