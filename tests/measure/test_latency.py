"""``benchmark=latency``: the content of a record, the order of measurements, and failures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import pytest
import torch

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from pqbench.benchmarks.base import Prompter
from pqbench.engine.meter import PHASES
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.measure import latency
from pqbench.measure.latency import Latency, weight_bytes
from pqbench.measure.source import prose_tokens
from pqbench.method import KV, Budget, Geometry, LayerState, Method
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record
from pqbench.store.tiers import HostTier
from tests.measure.conftest import Run

SMALL: dict[str, Any] = {"contexts": [160, 320], "new_tokens": 5, "repeats": 2, "warmup": 0}
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQCache(Budget(ratio=0.5), m=2, b=4)}
FIELDS = (
    "context",
    "prompt_tokens",
    "new_tokens",
    "repeat",
    "ttft_s",
    "tt2t_s",
    "tpot_s",
    "tpot_p90_s",
    "tpot_released_s",
    "select_step_s",
    "fetch_step_s",
    "attend_step_s",
    "append_step_s",
    "dense_step_s",
    "wait_s",
    "index_build_s",
    "attended_tokens",
    "skipped_nothing",
    "index_bytes",
    "device_bytes",
    "host_bytes",
    "to_device_bytes_step",
    "to_host_bytes_step",
    "peak_rss_bytes",
    "copy_bandwidth_gbps",
    "copy_share",
    "dtype",
    "threads",
    "kernels",
    "warmup_s",
    "device",
    "overlap",
    "emulated",
    "weight_bytes",
    "text",
)


@dataclass(frozen=True)
class Hungry(Method):
    """Runs out of memory when its index is built."""

    budget: Budget = field(default_factory=Budget)

    def layer(self, geometry: Geometry) -> LayerState:
        return HungryState(geometry)


class HungryState(LayerState):
    """See above."""

    def finish_prefill(self, kv: KV) -> None:
        raise MemoryError


def rows(records: list[Record], method: str) -> list[Record]:
    return [record for record in records if record["method"] == method]


def test_every_repeat_is_a_complete_row(measure: Run, loaded: LoadedModel) -> None:
    done, records = measure(Latency(**SMALL), METHODS, loaded)
    assert (done.measured, done.failures) == (8, [])
    assert [r["sample_id"] for r in rows(records, "pqcache")] == ["160-0", "320-0", "160-1", "320-1"]
    for record in records:
        assert [name for name in FIELDS if record.get(name) is None] == []
        assert record["new_tokens"] == 5
        assert record["prompt_tokens"] == record["context"]
        assert len(record["steps_s"]) == 4
        assert (record["model"], record["dtype"], record["kernels"]) == ("tiny", "float32", "reference")


def test_times_follow_their_definitions(measure: Run, loaded: LoadedModel) -> None:
    _, records = measure(Latency(**SMALL), METHODS, loaded)
    for record in records:
        first, *later = record["steps_s"]
        assert record["tpot_s"] == pytest.approx(median(later), abs=1e-8)
        assert record["tt2t_s"] == pytest.approx(record["ttft_s"] + record["pending_s"] + first, abs=1e-8)
        assert record["tpot_released_s"] == pytest.approx(sum(later) / 3, abs=1e-8)
        phases = sum(record[f"{phase}_step_s"] for phase in PHASES)
        assert 0 < phases <= sum(record["steps_s"]) / 4
        mean = (sum(later) + min(first, median(later))) / 4
        assert record["dense_step_s"] == pytest.approx(max(0.0, mean - phases), abs=1e-8)


def test_bytes_follow_the_model_and_the_budget(measure: Run, loaded: LoadedModel) -> None:
    _, records = measure(Latency(**SMALL), METHODS, loaded)
    row = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, width, float32
    for record in records:
        assert record["attended_bytes"] == pytest.approx(record["attended_tokens"] * row)
        moved = record["weight_bytes"] + record["attended_bytes"] + record["index_bytes"]
        assert record["bandwidth_gbps"] == pytest.approx(moved / record["tpot_s"] / 1e9, rel=1e-3)
    full = rows(records, "full")[0]
    assert full["attended_tokens"] == 160 + 2.5  # four steps that see 161 to 164 tokens
    assert rows(records, "pqcache")[0]["attended_tokens"] < 85
    everything = sum(p.nbytes for p in loaded.model.parameters())
    untied = loaded.model.get_input_embeddings().weight.nbytes
    assert full["weight_bytes"] == weight_bytes(loaded.model) == everything - untied


def test_rounds_go_through_contexts_and_methods(
    measure: Run, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, str]] = []
    run_once = latency.run_once

    def noted(job: Any, model: Any, method: Method, prompt: list[int], new_tokens: int) -> Any:
        calls.append((len(prompt), type(method).__name__))
        return run_once(job, model, method, prompt, new_tokens)

    monkeypatch.setattr(latency, "run_once", noted)
    measure(Latency(**{**SMALL, "warmup": 1}), METHODS, loaded)
    once = [(160, "Full"), (160, "PQCache"), (320, "Full"), (320, "PQCache")]
    assert calls == [(160, "Full"), (160, "PQCache"), *once, *once]


def test_what_is_on_record_is_not_measured_again(
    measure: Run, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = measure(Latency(**SMALL), METHODS, loaded)
    with monkeypatch.context() as patch:
        patch.setattr(latency, "run_once", lambda *_: pytest.fail("measured again"))
        done, after = measure(Latency(**SMALL), METHODS, loaded)
    assert (done.measured, done.resumed, after == before) == (0, 8, True)
    done, _ = measure(Latency(**{**SMALL, "repeats": 3}), METHODS, loaded)
    assert (done.measured, done.resumed) == (4, 8)


def test_running_out_of_memory_is_a_row(measure: Run, loaded: LoadedModel) -> None:
    done, records = measure(Latency(**{**SMALL, "warmup": 1}), {**METHODS, "hungry": Hungry()}, loaded)
    assert (done.measured, len(done.failures)) == (8, 4)
    assert {r["status"] for r in rows(records, "hungry")} == {"oom"}
    assert {r["context"] for r in rows(records, "hungry")} == {160, 320}


def test_a_prompt_that_fills_the_model_leaves_room_for_the_answer(measure: Run, loaded: LoadedModel) -> None:
    short = replace(loaded, max_length=320)
    _, records = measure(Latency(**{**SMALL, "repeats": 1}), {"full": Full()}, short)
    assert [(r["context"], r["prompt_tokens"]) for r in records] == [(160, 160), (320, 315)]


@pytest.mark.parametrize("cache", [0, 128])
def test_a_host_tier_reports_its_link_and_cache(measure: Run, loaded: LoadedModel, cache: int) -> None:
    setting = Setting(HostTier(link="pcie5", cache_tokens=cache, cache_block=16), backend="reference")
    done, records = measure(Latency(**{**SMALL, "repeats": 1}), {**METHODS, "h2o": H2O()}, loaded, setting=setting)
    assert done.failures == []
    record = rows(records, "pqcache")[1]
    assert record["emulated"] is True
    assert record["link"] == "emulated PCIe 5.0 x16"
    assert record["to_device_bytes_step"] > 0
    assert record["host_bytes"] >= 320 * 2 * 2 * 2 * 16 * 4
    assert (record["cache_hit_rate"] is not None) == bool(record["cache_lookups"])


def test_threads_of_background_work_end(measure: Run, loaded: LoadedModel) -> None:
    done, records = measure(Latency(**SMALL), METHODS, loaded, setting=Setting(overlap=True, backend="reference"))
    assert done.failures == []
    assert all(r["overlap"] and r["pending_s"] < r["ttft_s"] for r in records)


def test_prompts_are_prose_of_exactly_the_wanted_length(loaded: LoadedModel) -> None:
    prompter = Prompter(loaded.tokenizer, loaded.max_length)
    ids = prose_tokens(prompter, 1000, 0)
    assert len(ids) == 1000
    assert prose_tokens(prompter, 200, 0) == ids[:200]
    assert prose_tokens(prompter, 1000, 1) != ids
    assert loaded.tokenizer.decode(ids).count(" ") > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contexts": [0]}, ["benchmark.contexts"]),
        ({"contexts": []}, ["benchmark.contexts"]),
        ({"new_tokens": 2}, ["benchmark.new_tokens is 2", "from 3 up"]),
        ({"repeats": 0}, ["benchmark.repeats is 0"]),
        ({"warmup": -1}, ["benchmark.warmup is -1"]),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Latency(**{**SMALL, **options})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("options", "method", "words"),
    [
        ({"contexts": [8192]}, Full(), ["benchmark.contexts has 8192", "4096 tokens at most"]),
        ({"new_tokens": 5000}, Full(), ["benchmark.new_tokens is 5000", "4096"]),
        ({}, H2O(Budget(ratio=0.1, window=60, minimum=1)), ["method", "below sink 32 + window 60"]),
        ({}, PQCache(m=3), ["method", "divide the head dimension 16"]),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_runs(
    measure: Run,
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    method: Method,
    words: list[str],
) -> None:
    monkeypatch.setattr(latency, "run_once", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ConfigError) as caught:
        measure(Latency(**{**SMALL, **options}), {"method": method}, loaded)
    assert [word for word in words if word not in str(caught.value)] == []


def test_latency_needs_a_model(measure: Run) -> None:
    assert Latency().needs_model
    with pytest.raises(ConfigError, match="needs a model"):
        measure(Latency(**SMALL), METHODS)


def test_tied_weights_count_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.table

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    assert weight_bytes(Tied()) == 10 * 4 * 4  # type: ignore[arg-type]
