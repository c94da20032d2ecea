"""The fidelity benchmark: one prefill per document gives complete records, runs resume, failures become records, and
wrong options end in one line."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.oracle import Oracle
from methods.pqcache import PQCache
from pqbench import __main__ as command
from pqbench import prefill
from pqbench.errors import ConfigError, DataError
from pqbench.measure.fidelity import passage
from pqbench.measure.fidelity.benchmark import FidelityBenchmark
from pqbench.method import KV, Budget, Geometry, LayerState, Method, PaperBudget
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record, read_all
from pqbench.tables.document import run_table
from tests.measure.fidelity.conftest import Run

SMALL: dict[str, Any] = {"lengths": [200, 320], "documents": 2, "steps": 6, "ratios": [0.3, 0.5]}
OWN = Budget(sink=4, window=10, ratio=0.9, minimum=16)
METHODS: dict[str, Method] = {"full": Full(), "oracle": Oracle(OWN), "h2o": H2O(OWN), "pqcache": PQCache(OWN, m=2, b=3)}
FIELDS = (
    "document",
    "length",
    "prompt_tokens",
    "steps",
    "budget",
    "dtype",
    "device",
    "threads",
    "kernels",
    "mass",
    "output_error",
    "kl",
    "top1_agreement",
    "nll",
    "nll_full",
    "perplexity",
    "bits_per_key",
    "attended_tokens",
    "skipped_nothing",
    "index_bytes",
    "attended_bytes",
    "bytes_per_head",
    "layer",
    "kv_head",
    "layers",
    "heads",
    "token_age",
    "entropy",
    "steps_kl",
)


class HungryState(LayerState):
    def finish_prefill(self, kv: KV) -> None:
        raise MemoryError


@dataclass(frozen=True)
class Hungry(Method):
    """Runs out of memory when its index is built."""

    budget: Budget = field(default_factory=lambda: OWN)

    def layer(self, geometry: Geometry) -> LayerState:
        return HungryState(geometry)


@dataclass(frozen=True)
class Idle(Method):
    """Has a budget, but attends to all tokens."""

    budget: Budget = field(default_factory=lambda: OWN)

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry)


@pytest.fixture
def small(book: Path) -> FidelityBenchmark:
    return FidelityBenchmark(**SMALL, text=str(book))


def rows(records: list[Record], method: str, **fields: Any) -> list[Record]:
    return [r for r in records if r["method"] == method and fields.items() <= r.items()]


def test_every_document_length_method_and_ratio_is_a_complete_row(measure: Run, small: FidelityBenchmark) -> None:
    done, records = measure(small, METHODS)
    assert (done.measured, done.failures) == (4 + 3 * 8, [])
    for record in records:
        assert [name for name in FIELDS if record.get(name) is None] == []
        ratio = "all" if record["ratio"] is None else f"{record['ratio']:g}"
        assert record["sample_id"] == f"{record['document']}-{record['length']}-{ratio}"
        assert len(record["steps_kl"]) == record["steps"] == 6
        assert (record["prompt_tokens"], record["benchmark"]) == (record["length"], "fidelity")
        assert [len(record["heads"][name]) for name in ("recall", "mass", "output_error", "entropy")] == [2] * 4
    assert {r["budget"] for r in rows(records, "h2o")} == {"30 %", "50 %"}
    assert {(r["ratio"], r["budget"]) for r in rows(records, "full")} == {(None, "all")}
    assert len({r["document"] for r in records}) == 2


def test_methods_and_budgets_are_told_apart(measure: Run, small: FidelityBenchmark) -> None:
    _, records = measure(small, METHODS)
    for ratio in (0.3, 0.5):
        for record in rows(records, "oracle", ratio=ratio, length=320):
            assert record["recall"] == pytest.approx(1, abs=1e-3)  # up to ties in float32
            assert record["attended_tokens"] == pytest.approx(ratio * 323.5, abs=1)
            assert record["bits_per_key"] == pytest.approx(16 * 32)  # it reads every key
    for record in rows(records, "full"):
        assert (record["kl"], record["top1_agreement"], record["recall"]) == (pytest.approx(0, abs=1e-9), 1, None)
        assert record["nll"] == pytest.approx(record["nll_full"], abs=1e-5)
        assert record["output_error"] == pytest.approx(0, abs=1e-5)
    for name in ("oracle", "h2o"):
        few, many = (rows(records, name, ratio=r, length=320) for r in (0.3, 0.5))
        assert sum(r["mass"] for r in few) < sum(r["mass"] for r in many)
        assert sum(r["output_error"] for r in few) > sum(r["output_error"] for r in many) > 0
    assert len({r["nll_full"] for r in records if r["length"] == 320}) == 2  # one a document


def test_figures_do_not_depend_on_what_shares_the_prefill(measure: Run, small: FidelityBenchmark) -> None:
    _, together = measure(replace(small, lengths=[320], documents=1), METHODS)
    alone = FidelityBenchmark(**SMALL | {"lengths": [320], "documents": 1, "ratios": [0.5]}, text=small.text)
    _, records = measure(alone, {"only": H2O(OWN)})
    (other,) = rows(together, "h2o", ratio=0.5)
    for name in ("kl", "nll", "output_error", "recall", "mass", "bytes_per_head"):
        assert records[0][name] == pytest.approx(other[name], abs=1e-5), name


@pytest.mark.parametrize(("most", "calls"), [(None, 4), (5, 8), (1, 28)])
def test_one_prefill_of_a_document_serves_all(
    measure: Run, small: FidelityBenchmark, monkeypatch: pytest.MonkeyPatch, most: int | None, calls: int
) -> None:
    seen = []

    def counted(model: Any, ids: torch.Tensor, methods: list[Method], *rest: Any) -> Any:
        seen.append((ids.shape[1], len(methods)))
        return prefill(model, ids, methods, *rest)

    monkeypatch.setattr(passage, "prefill", counted)
    done, _ = measure(replace(small, variants_per_prefill=most), METHODS)
    assert (done.measured, len(seen)) == (28, calls)
    assert seen[0] == (200, 1 + (most or 7))


def test_what_is_on_record_is_not_measured_again(
    measure: Run, small: FidelityBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: METHODS[name] for name in ("full", "h2o")}
    _, before = measure(small, methods)
    with monkeypatch.context() as patch:
        patch.setattr(passage, "prefill", lambda *_: pytest.fail("measured again"))
        done, after = measure(small, methods)
    assert (done.measured, done.resumed, after == before) == (0, 12, True)
    done, _ = measure(replace(small, ratios=[0.3, 0.4, 0.5]), methods)
    assert (done.measured, done.resumed) == (4, 12)


def test_killed_and_started_again_nothing_is_measured_twice(tmp_path: Path, book: Path) -> None:
    words = [
        "benchmark=fidelity",
        "model=tiny",
        "method=[full,h2o,oracle]",
        "benchmark.lengths=[300]",
        "threads=1",
        "benchmark.documents=6",
        "benchmark.steps=4",
        f"benchmark.text={book}",
        "benchmark.ratios=[0.3,0.5]",
        "kernels=reference",
        f"results={tmp_path}",
    ]
    line = [sys.executable, "-m", "pqbench", *words]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not sum(count_lines(tmp_path)):
            time.sleep(0.005)
        process.kill()
    before = sum(count_lines(tmp_path))
    assert 0 < before < 30
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert f"{30 - before} measured, {before} already there, 0 failed" in done.stdout
    assert count_lines(tmp_path) == [6, 12, 12]
    ids = [(r["method"], r["sample_id"]) for r in read_all(tmp_path)]
    assert len(set(ids)) == len(ids) == 30


def count_lines(results: Path) -> list[int]:
    """The number of complete records of every method."""
    return sorted(path.read_bytes().count(b"\n") for path in results.rglob("records.jsonl"))


def test_failures_are_rows_of_the_method_at_fault(measure: Run, small: FidelityBenchmark) -> None:
    methods = {"h2o": H2O(OWN), "hungry": Hungry(), "idle": Idle()}
    done, records = measure(replace(small, lengths=[320], documents=1), methods)
    assert (done.measured, len(done.failures)) == (2, 4)
    assert {r["status"] for r in rows(records, "hungry")} == {"oom"}
    assert all("SelectionError: Idle, layer 0, step 1: the sel" in r["error"] for r in rows(records, "idle"))
    assert {(r["ratio"], r["length"]) for r in rows(records, "hungry")} == {(0.3, 320), (0.5, 320)}
    again, _ = measure(replace(small, lengths=[320], documents=1), methods, retry_failed=True)
    assert (again.resumed, len(again.failures)) == (2, 4)


def test_a_prefill_that_fails_fails_every_method(
    measure: Run, small: FidelityBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(passage, "prefill", fail)
    done, records = measure(replace(small, lengths=[200], documents=1), {"full": Full(), "h2o": H2O(OWN)})
    assert [r["error"] for r in records] == ["RuntimeError: no luck"] * 3
    assert (done.measured, len(done.failures)) == (0, 3)


def test_rows_that_are_full_attention_say_so(measure: Run, small: FidelityBenchmark) -> None:
    """256 centroids are more than 200 keys to cluster, and fewer than 320."""
    methods: dict[str, Method] = {"full": Full(), "pqcache": PQCache(OWN, m=2, b=8), "h2o": H2O(OWN)}
    _, records = measure(replace(small, documents=1, ratios=[0.5]), methods)
    told = {(r["method"], r["length"]): r["skipped_nothing"] for r in records}
    assert [place for place, nothing in told.items() if nothing] == [("full", 200), ("full", 320), ("pqcache", 200)]


def test_a_whole_budget_changes_nothing(measure: Run, small: FidelityBenchmark) -> None:
    methods: dict[str, Method] = {**METHODS, "paper": PQCache(PaperBudget(sink=4, ratio=0.5), m=2, b=3)}
    _, records = measure(replace(small, lengths=[200], ratios=[1]), methods)
    for record in records:
        if record["method"] != "paper":  # half of it is top-k over what the sinks leave: nearly everything
            assert record["kl"] == pytest.approx(0, abs=1e-6)
            assert record["top1_agreement"] == 1
            assert record["output_error"] == pytest.approx(0, abs=1e-4)


def test_a_length_that_fills_the_model_leaves_room_for_the_steps(
    measure: Run, small: FidelityBenchmark, loaded: LoadedModel
) -> None:
    done, records = measure(small, {"full": Full()}, replace(loaded, max_length=320))
    assert done.failures == []
    assert {(r["length"], r["prompt_tokens"]) for r in records} == {(200, 200), (320, 314)}


def test_the_table_names_every_method_and_budget(measure: Run, small: FidelityBenchmark) -> None:
    _, records = measure(small, METHODS)
    *pivots, figures, parts = run_table(records).columns[0].cells
    assert (figures.row_count, parts.row_count) == (14, 12)  # type: ignore[union-attr]
    assert [pivot.row_count for pivot in pivots] == [3] * 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [0]}, ["benchmark.lengths"]),
        ({"lengths": []}, ["benchmark.lengths"]),
        ({"documents": 0}, ["benchmark.documents is 0", "from 1 up"]),
        ({"steps": 0}, ["benchmark.steps is 0", "from 1 up"]),
        ({"ratios": [1.5]}, ["benchmark.ratios is [1.5]", "(0, 1]"]),
        ({"ratios": [0]}, ["benchmark.ratios", "(0, 1]"]),
        ({"ratios": []}, ["benchmark.ratios", "(0, 1]"]),
        ({"ratios": 0.1}, ["benchmark.ratios is 0.1"]),
        ({"ratios": [0.1, 0.1]}, ["benchmark.ratios", "once"]),
        ({"ratios": [True]}, ["benchmark.ratios"]),
        ({"variants_per_prefill": 0}, ["benchmark.variants_per_prefill is 0"]),
        ({"variants_per_batch": 0}, ["benchmark.variants_per_batch is 0"]),
        ({"text": 7}, ["benchmark.text is 7"]),
        ({"seed": -1}, ["benchmark.seed is -1"]),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FidelityBenchmark(**{**SMALL, **options})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("options", "method", "words"),
    [
        ({"lengths": [8192]}, Full(), ["benchmark.lengths has 8192", "4096 tokens at most"]),
        ({"steps": 4096}, Full(), ["benchmark.steps is 4096", "4096"]),
        ({}, H2O(Budget(ratio=0.9, window=90, minimum=1)), ["method, 30 %", "below sink 32 + window 90"]),
        ({}, PQCache(m=3), ["method, 30 %", "divide the head dimension 16"]),
        ({}, InfLLM(Budget(ratio=0.9), prefill="infllm"), ["method has a prefill of its own"]),
        ({"text": "nowhere.txt"}, Full(), ["benchmark.text", "nowhere.txt"]),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_runs(
    measure: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: Method, words: list[str]
) -> None:
    monkeypatch.setattr(passage, "prefill", lambda *_: pytest.fail("something ran"))
    with pytest.raises((ConfigError, DataError)) as caught:
        measure(FidelityBenchmark(**{**SMALL, **options}), {"method": method})
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_it_needs_a_model(measure: Run, small: FidelityBenchmark) -> None:
    assert small.needs_model
    with pytest.raises(ConfigError, match="needs a model"):
        measure(small, {"full": Full()}, None)


def test_the_command_runs_it(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "benchmark=fidelity",
        "model=tiny",
        "method=[full,streaming_llm]",
        "benchmark.lengths=[256]",
        "threads=1",
        "benchmark.documents=1",
        "benchmark.steps=3",
        f"benchmark.text={book}",
        "kernels=reference",
        "benchmark.ratios=[0.5]",
        f"results={tmp_path / 'results'}",
    ]
    monkeypatch.setattr(sys, "argv", ["pqbench", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "fidelity of tiny to full attention over 3 teacher-forced steps" in printed
    assert "streaming_llm" in printed
    assert "2 measured, 0 already there, 0 failed" in printed
