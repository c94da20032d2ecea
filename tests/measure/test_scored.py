"""Scored evaluation on a real, tiny model: one prefill per sample, consistent records, and failures as records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.pqcache import PQCache
from pqbench import generate, load_model
from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.benchmarks.recall import string_recall
from pqbench.errors import BudgetError
from pqbench.kernels import cpu
from pqbench.measure.base import COMPILING, Job, Measured
from pqbench.measure.scored import Scored
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.models.sources import LoadedModel
from pqbench.records.file import RecordFile


@dataclass
class Letters(Benchmark):
    """Three prompts of random letters."""

    name: ClassVar[str] = "letters"
    lengths: tuple[int, ...] = (200, 250, 300)

    def samples(self, prompter: Prompter) -> Iterable[Sample]:
        generator = torch.Generator().manual_seed(0)
        for length in self.lengths:
            ids = torch.randint(60, 120, (length,), generator=generator).tolist()
            yield Sample(f"s{length}", "letters", ids, ["abcdefgh"], 6, question_tokens=10)

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"score": string_recall(record["prediction"], record["references"])}


@dataclass(frozen=True)
class Lazy(Method):
    """Has a budget, but attends to all tokens."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=0.3))

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry)


@dataclass(frozen=True)
class Varying(Lazy):
    """Declares that it exceeds its budget by design."""

    @property
    def beyond_budget(self) -> str | None:
        return "takes what it needs"


class BrokenState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        raise torch.OutOfMemoryError("no room for the index")


@dataclass(frozen=True)
class Broken(Lazy):
    """Runs out of memory in its first step."""

    def layer(self, geometry: Geometry) -> LayerState:
        return BrokenState(geometry)


class BlindState(LayerState):
    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        raise ValueError("observe broke")


@dataclass(frozen=True)
class Blind(Lazy):
    """Fails while it watches the prefill that it shares with others."""

    def layer(self, geometry: Geometry) -> LayerState:
        return BlindState(geometry)


class TwiceState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        last = torch.tensor([kv.length - 1, kv.length - 1])
        return Selection(last.expand(*q.shape[:2], -1))


@dataclass(frozen=True)
class Twice(Lazy):
    """Selects the current token twice."""

    def layer(self, geometry: Geometry) -> LayerState:
        return TwiceState(geometry)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("tiny")  # as a run gets it: rehearsed


def job(loaded: LoadedModel, folder: Path, methods: Mapping[str, Method], **options: Any) -> Job:
    files = {
        name: RecordFile.create(folder, "letters", "tiny", name, {"method": repr(methods[name])}) for name in methods
    }
    return Job(loaded, methods, files, **options)


def run(job: Job, **options: Any) -> Measured:
    """Score the methods of a job on the letters."""
    return Scored(Letters(), **options).measure(job)


def prompts(loaded: LoadedModel) -> Prompter:
    """The prompter for the letters."""
    return Prompter(loaded.tokenizer, loaded.max_length)


def records(done: Job, method: str) -> list[dict[str, Any]]:
    return done.files[method].read()


def test_a_method_with_a_prefill_of_its_own_leaves_the_others_theirs(loaded: LoadedModel, tmp_path: Path) -> None:
    budget = Budget(ratio=0.3, sink=4)
    own = InfLLM(budget, block_size=8, prefill="infllm", exec_block=32)
    methods = {"full": Full(), "own": own, "h2o": H2O(budget)}
    done = job(loaded, tmp_path / "together", methods)
    assert run(done).failures == []
    shared = {"full": True, "own": False, "h2o": True}
    for name, method in methods.items():
        alone = job(loaded, tmp_path / name, {name: method})
        assert run(alone).failures == []
        for record, single in zip(records(done, name), records(alone, name), strict=True):
            assert (record["prediction"], record["shared_prefill"]) == (single["prediction"], shared[name])
            assert ("recall" in record) == (name != "own")  # nothing to compare an own prefill with
    for record, length in zip(records(done, "own"), Letters.lengths, strict=True):
        ids = torch.tensor(
            [next(s.input_ids for s in Letters().samples(prompts(loaded)) if len(s.input_ids) == length)]
        )
        assert record["prediction"] == prompts(loaded).decode(
            generate(loaded.model, ids, own, max_new_tokens=6)[0].tolist()
        )


def test_kernels_are_compiled_before_anything_is_timed_and_only_if_something_is(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    forward = loaded.model.forward

    def computing(*ids: Tensor, **options: Any) -> Any:
        order.append("model")
        return forward(*ids, **options)

    def compiling() -> float:
        order.append("compile")
        return 7.0

    monkeypatch.setattr(loaded.model, "forward", computing)
    monkeypatch.setattr(cpu, "warm_up", compiling)
    done = job(loaded, tmp_path, {"full": Full()})
    assert run(done).seconds[COMPILING] == 7.0
    assert order[:2] == ["compile", "model"]
    assert order.count("compile") == 1
    assert run(done).seconds[COMPILING] == 0.0
    assert order.count("compile") == 1


def test_methods_share_one_prefill_and_get_a_record_each(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = loaded.model.forward

    def counting(ids: Tensor, **options: Any) -> Any:
        calls.append(ids.shape[1])
        return forward(ids, **options)

    monkeypatch.setattr(loaded.model, "forward", counting)
    done = job(loaded, tmp_path, {"full": Full(), "pqcache": PQCache(Budget(ratio=0.3, sink=4), b=4)})
    summary = run(done)
    assert (summary.measured, summary.failures) == (6, [])
    assert [n for n in calls if n > 1] == [200, 250, 300]
    for full, pq in zip(records(done, "full"), records(done, "pqcache"), strict=True):
        length = full["prompt_tokens"]
        steps = full["new_tokens"] - 1
        assert full["attended_tokens"] == pytest.approx(length + (steps + 1) / 2)
        assert pq["attended_tokens"] <= max(64, 0.3 * (length + steps))  # 64: the floor of a ratio budget
        assert full["mass"] == pytest.approx(1, abs=1e-5)
        assert full["output_error"] == pytest.approx(0, abs=1e-5)
        assert 0 < pq["mass"] < 1
        assert pq["output_error"] > 0
        # float32 keys and values of 2 layers, 2 KV heads, 16 dimensions
        assert full["device_bytes"] == 2 * 2 * 2 * 16 * 4 * (length + steps)
        assert full["tt2t_s"] > full["ttft_s"] > 0
        [ids] = [sample.input_ids for sample in Letters().samples(prompts(loaded)) if sample.id == full["sample_id"]]
        assert full["prompt_sha256"] == hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
        assert full["prompt_tail"] == pq["prompt_tail"] == loaded.tokenizer.decode(ids[-200:])


def test_a_second_run_measures_nothing_and_a_new_method_only_itself(loaded: LoadedModel, tmp_path: Path) -> None:
    run(job(loaded, tmp_path, {"full": Full()}))
    again = run(job(loaded, tmp_path, {"full": Full()}))
    assert (again.measured, again.resumed, again.seconds["prefill"]) == (0, 3, 0.0)
    more = run(job(loaded, tmp_path, {"full": Full(), "h2o": H2O(Budget(ratio=0.3, sink=4))}))
    assert (more.measured, more.resumed) == (3, 3)


def test_a_method_that_never_skips_a_token_fails_loudly(loaded: LoadedModel, tmp_path: Path) -> None:
    done = job(loaded, tmp_path, {"full": Full(), "lazy": Lazy(), "varying": Varying()})
    summary = run(done)
    assert len(summary.failures) == 6
    assert "Lazy, layer 0, step 1: the selection has 201 tokens, but the budget allows 64" in summary.failures[0]
    assert "the method is not active" in summary.failures[1]
    assert {r["status"] for name in ("lazy", "varying") for r in records(done, name)} == {"error"}
    assert {r["beyond_budget"] for r in records(done, "varying")} == {"takes what it needs"}
    assert {r["status"] for r in records(done, "full")} == {"ok"}


def test_out_of_memory_is_a_row_and_the_others_go_on(loaded: LoadedModel, tmp_path: Path) -> None:
    done = job(loaded, tmp_path, {"broken": Broken(), "full": Full()})
    run(done)
    assert {r["status"] for r in records(done, "broken")} == {"oom"}
    assert {r["status"] for r in records(done, "full")} == {"ok"}
    resumed = run(job(loaded, tmp_path, {"broken": Broken()}))
    assert (resumed.measured, len(resumed.failures)) == (0, 3)  # not run again, and not forgotten either
    assert "retry_failed=true" in resumed.failures[0]
    retried = run(job(loaded, tmp_path, {"broken": Broken()}, retry_failed=True))
    assert len(retried.failures) == 3


def test_a_failing_method_costs_the_others_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    done = job(loaded, tmp_path, {"full": Full(), "broken": Broken(), "blind": Blind(), "twice": Twice()})
    run(done)
    assert {r["error"] for r in records(done, "blind")} == {"ValueError: observe broke"}
    assert {r["status"] for r in records(done, "broken")} == {"oom"}
    assert {r["status"] for r in records(done, "full")} == {"ok"}
    assert all(r["mass"] == pytest.approx(1, abs=1e-5) for r in records(done, "full"))
    # A selection that the harness refuses is a failure of that method, even if decoding finished.
    assert all("names a row twice" in r["error"] for r in records(done, "twice"))


def test_the_question_can_go_through_the_method(loaded: LoadedModel, tmp_path: Path) -> None:
    full = {"full": Full()}
    dense, select = job(loaded, tmp_path / "a", full), job(loaded, tmp_path / "b", full)
    run(dense)
    run(select, question="select")
    assert [r["prediction"] for r in records(dense, "full")] == [r["prediction"] for r in records(select, "full")]
    assert [r["question"] for r in records(select, "full")] == ["select"] * 3
    steps = [r["new_tokens"] - 1 for r in records(select, "full")]
    lengths = [r["prompt_tokens"] for r in records(select, "full")]
    for record, n, length in zip(records(select, "full"), steps, lengths, strict=True):
        assert record["attended_tokens"] == pytest.approx(length - 10 + (10 + n + 1) / 2)


def test_an_impossible_budget_stops_before_anything_runs(loaded: LoadedModel, tmp_path: Path) -> None:
    above = job(loaded, tmp_path, {"full": Full(), "h2o": H2O(Budget(tokens=5000, ratio=None))})
    with pytest.raises(BudgetError, match=r"h2o.*5000.*above the longest context.*306"):
        run(above)
    tight = job(loaded, tmp_path, {"h2o": H2O(Budget(ratio=0.1, sink=32, window=60))})
    with pytest.raises(BudgetError, match="below sink 32"):
        run(tight)
    assert records(above, "full") == []
