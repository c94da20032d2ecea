"""``benchmark=attention``: the content of a record, the turns of methods and dense kernels, and failures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.pqcache import PQCache
from methods.streaming_llm import StreamingLLM
from pqbench.engine.clock import HostClock
from pqbench.engine.meter import PHASES
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.measure import dense
from pqbench.measure.geometries import SHAPES
from pqbench.measure.layer import attention
from pqbench.measure.layer.attention import Attention
from pqbench.measure.layer.turns import Layer, Subject
from pqbench.measure.source import synthetic
from pqbench.method import KV, Budget, Geometry, LayerState, Method, PaperBudget, Selection
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record
from pqbench.store.tiers import HostTier
from tests.measure.conftest import Run

SMALL: dict[str, Any] = {
    "geometry": "tiny",
    "contexts": [512],
    "budgets": [0.25],
    "repeats": 2,
    "steps": 2,
    "warmup": 1,
    "sweep_mb": 0,
}
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQCache(m=2, b=4), "h2o": H2O()}
FIELDS = (
    "geometry",
    "context",
    "budget",
    "dtype",
    "kernel",
    "threads",
    "select_s",
    "fetch_s",
    "attend_s",
    "append_s",
    "total_s",
    "total_p10_s",
    "total_p90_s",
    "total_min_s",
    "bandwidth_gbps",
    "copy_bandwidth_gbps",
    "copy_read_gbps",
    "gather_bandwidth_gbps",
    "copy_share",
    "build_s",
    "observe_s",
    "warmup_s",
    "index_bytes",
    "attended_tokens",
    "skipped_nothing",
    "attended_bytes",
    "peak_rss_bytes",
    "dense_ratio",
    "device",
    "keys",
    "steps",
)


@dataclass(frozen=True)
class Hungry(Method):
    """Runs out of memory when its state is made, or in its selection."""

    budget: Budget = field(default_factory=Budget)
    late: bool = False

    def layer(self, geometry: Geometry) -> LayerState:
        if not self.late:
            raise MemoryError
        return HungryState(geometry)


class HungryState(LayerState):
    """Fails in a step."""

    def select(self, q: Any, kv: Any) -> Any:
        raise MemoryError("no room for scores")


def rows(records: list[Record], method: str, **wanted: Any) -> list[Record]:
    return [r for r in records if r["method"] == method and all(r[name] == value for name, value in wanted.items())]


def test_every_method_and_dense_kernel_is_a_complete_row(measure: Run) -> None:
    done, records = measure(Attention(**{**SMALL, "budgets": [0.25, 100]}), METHODS)
    assert (done.measured, done.resumed, done.failures) == (6, 0, [])
    assert [r["kernel"] for r in rows(records, "full")] == ["torch sdpa grouped", "torch sdpa enable_gqa"]
    assert [r["budget"] for r in rows(records, "pqcache")] == ["25 %", "100 tokens"]
    for record in records:
        assert [name for name in FIELDS if record.get(name) is None] == []
        assert (record["status"], record["model"], record["threads"], record["dtype"]) == ("ok", "tiny", 1, "float32")
        assert record["warmup_s"] > 0
        assert record["timed_steps"] == 4


def test_phases_of_a_step_sum_to_at_most_its_total(measure: Run) -> None:
    _, records = measure(Attention(**SMALL), METHODS)
    for record in records:
        steps = record["steps"]
        assert len(steps["total"]) == 4
        for i, total in enumerate(steps["total"]):
            assert 0 < sum(steps[phase][i] for phase in PHASES) <= total + 1e-8  # stored to the nanosecond
        assert record["total_min_s"] <= record["total_p10_s"] <= record["total_s"] <= record["total_p90_s"]


def test_bytes_follow_the_shape_and_the_budget(measure: Run) -> None:
    _, records = measure(Attention(**{**SMALL, "budgets": [100]}), METHODS)
    row = 2 * 2 * 16 * 4  # K and V, heads, width, float32
    (pqcache,) = rows(records, "pqcache")
    (h2o,) = rows(records, "h2o")
    full = rows(records, "full")[0]
    assert pqcache["attended_tokens"] == h2o["attended_tokens"] == 100
    assert full["attended_tokens"] == 512 + (2 + 5) / 2  # after one warm-up step, steps 2 to 5 see one token more each
    for record in (pqcache, h2o, full):
        assert record["attended_bytes"] == record["attended_tokens"] * row
        rate = record["attended_bytes"] / (record["fetch_s"] + record["attend_s"])
        assert record["bandwidth_gbps"] == pytest.approx(rate / 1e9)
        assert record["copy_share"] == pytest.approx(record["bandwidth_gbps"] / record["copy_bandwidth_gbps"])
    window = (100 - 32) // 2
    assert pqcache["index_bytes"] == pytest.approx(2 * 2 * (512 - 32 - window + (2 + 5) / 2), abs=2)  # a byte per code
    assert h2o["device_bytes"] < full["device_bytes"] == (512 + 5) * row


def test_the_ratio_is_to_the_fastest_dense_kernel_of_the_run(measure: Run) -> None:
    _, records = measure(Attention(**SMALL), METHODS)
    fastest = min(r["total_s"] for r in rows(records, "full"))
    for record in records:
        assert record["dense_ratio"] == pytest.approx(fastest / record["total_s"])
    assert max(r["dense_ratio"] for r in rows(records, "full")) == 1


def test_subjects_take_turns_step_by_step(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str]] = []
    take_turn = Subject.take_turn

    def noted(self: Subject, layer: Layer, number: int, layer_before: Callable[[], None]) -> None:
        calls.append((number, f"{self.name} {self.kernel}"))
        take_turn(self, layer, number, layer_before)

    monkeypatch.setattr(Subject, "take_turn", noted)
    measure(Attention(**{**SMALL, "repeats": 6}), METHODS)
    assert [number for number, _ in calls] == sorted(number for number, _ in calls)
    turns = [tuple(name for number, name in calls if number == step) for step in range(1, 13)]
    assert all(len(turn) == 4 and set(turn) == set(turns[0]) for turn in turns)
    assert len(set(turns)) > 1  # every round draws an order
    assert all(turns[i] == turns[i + 1] for i in range(0, 12, 2))


def test_what_is_on_record_is_not_measured_again(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = measure(Attention(**SMALL), METHODS)
    done, after = measure(Attention(**SMALL), METHODS)
    assert (done.measured, done.resumed) == (0, 4)
    assert after == before
    done, more = measure(Attention(**SMALL), {**METHODS, "streaming_llm": StreamingLLM()})
    assert (done.measured, done.resumed) == (1, 4)
    assert [r for r in more if r["method"] != "streaming_llm"] == before
    assert rows(more, "streaming_llm")[0]["dense_ratio"] > 0  # dense kernels took part again


@pytest.mark.parametrize("late", [False, True])
def test_running_out_of_memory_is_a_row(measure: Run, late: bool) -> None:
    methods: dict[str, Method] = {**METHODS, "hungry": Hungry(late=late)}
    done, records = measure(Attention(**SMALL), methods)
    assert (done.measured, len(done.failures)) == (4, 1)
    (failed,) = rows(records, "hungry")
    assert failed["status"] == "oom"
    assert failed["error"].startswith("MemoryError")
    assert (failed["context"], failed["dtype"], failed["budget"]) == (512, "float32", "25 %")
    again, _ = measure(Attention(**SMALL), methods)
    assert (again.measured, again.resumed) == (0, 5)
    assert "failed before" in again.failures[0]
    retried, _ = measure(Attention(**SMALL), methods, retry_failed=True)
    assert len(retried.failures) == 1
    assert "failed before" not in retried.failures[0]


def test_a_dense_kernel_that_would_copy_too_much_is_a_row(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "available_bytes", lambda _: 1000)
    _, records = measure(Attention(**SMALL), METHODS)
    status = {r["kernel"]: r["status"] for r in rows(records, "full")}
    assert status == {"torch sdpa grouped": "ok", "torch sdpa enable_gqa": "oom"}
    assert rows(records, "pqcache")[0]["status"] == "ok"


def test_slow_subjects_have_one_round(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqbench.measure.layer.turns.SLOW", 0.0)
    _, records = measure(Attention(**SMALL), METHODS)
    assert {r["timed_steps"] for r in records} == {2}


def test_methods_that_renumber_or_watch_run_in_half_precision(measure: Run) -> None:
    methods: dict[str, Method] = {"infllm": InfLLM(block_size=16), "streaming_llm": StreamingLLM(), "h2o": H2O()}
    done, records = measure(Attention(**{**SMALL, "dtypes": ["bfloat16"]}), methods)
    assert done.failures == []
    assert {r["attended_bytes"] / r["attended_tokens"] for r in records} == {2 * 2 * 16 * 2}
    assert rows(records, "h2o")[0]["observe_s"] > 0


def test_a_host_tier_reports_its_link(measure: Run) -> None:
    setting = Setting(HostTier(link="pcie4"), backend="reference")
    done, records = measure(Attention(**SMALL), METHODS, setting=setting)
    assert done.failures == []
    (record,) = rows(records, "pqcache")
    assert record["emulated"] is True
    assert "PCIe 4.0" in record["link"]
    assert record["to_device_bytes"] > 0
    assert record["host_bytes"] > 0


def test_real_keys_come_from_the_model(measure: Run, loaded: LoadedModel) -> None:
    assert Attention(keys="real").needs_model
    assert not Attention().needs_model
    done, records = measure(Attention(**{**SMALL, "keys": "real", "geometry": "smollm2"}), METHODS, loaded)
    assert (done.measured, done.failures) == (4, [])
    assert {r["keys"] for r in records} == {"real"}


def test_results_are_named_by_the_geometry() -> None:
    assert Attention(geometry="qwen25_7b").subject("smollm2") == "qwen25_7b"
    assert set(SHAPES) >= {"llama31_8b", "mistral_7b", "qwen25_7b", "smollm2"}
    qwen = SHAPES["qwen25_7b"]
    assert (qwen.query_heads, qwen.kv_heads, qwen.head_dim, qwen.layers, qwen.group) == (28, 4, 128, 28, 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"geometry": "nope"}, ["benchmark.geometry is 'nope'", "llama31_8b"]),
        ({"contexts": [0]}, ["benchmark.contexts", "positive"]),
        ({"contexts": []}, ["benchmark.contexts"]),
        ({"contexts": [512, 512]}, ["benchmark.contexts", "different"]),
        ({"budgets": []}, ["benchmark.budgets"]),
        ({"budgets": [0]}, ["benchmark.budgets", "(0, 1]"]),
        ({"budgets": [1.5]}, ["benchmark.budgets"]),
        ({"dtypes": []}, ["benchmark.dtypes"]),
        ({"dtypes": ["int8"]}, ["benchmark.dtypes", "float32, bfloat16, float16"]),
        ({"repeats": 0}, ["benchmark.repeats is 0"]),
        ({"steps": 0}, ["benchmark.steps is 0"]),
        ({"sweep_mb": -1}, ["benchmark.sweep_mb is -1"]),
        ({"keys": "fake"}, ["benchmark.keys is 'fake'", "real or random"]),
        ({"device": "nope"}, ["device is 'nope'"]),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ConfigError, attention.ModelError)) as caught:
        Attention(**{**SMALL, **options})
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "method", "words"),
    [
        ({"budgets": [20]}, PQCache(), ["pqcache", "budget.tokens is 20, below sink + window"]),
        ({"budgets": [0.1]}, PQCache(Budget(window=60, minimum=1)), ["pqcache", "below sink 32 + window 60"]),
        ({"budgets": [600]}, PQCache(), ["600 tokens", "context of 512"]),
        ({"budgets": [100]}, PQCache(PaperBudget()), ["pqcache", "the paper's budget is a ratio"]),
        ({}, PQCache(m=3), ["pqcache", "divide the head dimension 16"]),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_runs(
    measure: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: Method, words: list[str]
) -> None:
    monkeypatch.setattr(attention, "take_turns", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ConfigError) as caught:
        measure(Attention(**{**SMALL, **options}), {"pqcache": method})
    assert [word for word in words if word not in str(caught.value)] == []


class Counting(HostClock):
    """A clock that counts its marks as seconds."""

    def __init__(self) -> None:
        self._marks = itertools.count()

    def mark(self) -> float:
        return float(next(self._marks))


def test_what_is_asked_for_ahead_may_arrive_while_the_layer_before_computes() -> None:
    order: list[str] = []

    class State(LayerState):
        def prefetch(self, kv: KV) -> None:
            order.append("asks")

        def select(self, q: Tensor, kv: KV) -> Selection:
            order.append("selects")
            return Selection()

    @dataclass(frozen=True)
    class Asking(Method):
        def layer(self, geometry: Geometry) -> LayerState:
            return State(geometry)

    shape, subject = SHAPES["tiny"], Subject("asking", "reference", "all", Asking())
    layer = Layer(shape, torch.float32, 64, 2, synthetic(shape, 0), torch.device("cpu"), Setting(backend="reference"))
    layer.clock = Counting()
    subject.build(layer)
    times = subject.step(layer, 0, lambda: order.append("layer before"))
    assert order == ["asks", "layer before", "selects"]
    assert times["select"] == 2.0  # asking, and selecting
    # The request ahead, then two marks each around the whole step, the two parts of append, select, fetch and attend.
    # The check of the first step adds two marks, and the second between them is subtracted.
    assert times["total"] == 1.0 + 11.0 + 1.0
