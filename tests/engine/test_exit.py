"""A method whose code would end the process fails instead, in every measurement; a failed method is asked no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from methods.streaming_llm import StreamingLLM
from pqbench import decode, prefill
from pqbench.engine.dense import Dense
from pqbench.measure.base import Job
from pqbench.measure.fidelity.clean import each_alone
from pqbench.measure.fidelity.forced import read_in_one_batch
from pqbench.measure.layer.attention import Attention
from pqbench.method import Budget, Geometry, LayerState, Method, Selection
from pqbench.records.file import RecordFile
from tests.support import prompt_of, tiny_model

PROMPT, BUDGET = 96, Budget(sink=4, tokens=32, ratio=None)
PLACES = ("observe", "finish_prefill", "append", "prefetch", "select", "attended")
REASON = r"a method would end the process: SystemExit\(0\)"


class Leaving(LayerState):
    """Ends the process in one of its functions, and selects the last rows otherwise."""

    def __init__(self, method: Quits, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def __getattribute__(self, name: str) -> Any:
        if name in PLACES and name == super().__getattribute__("method").place:
            raise SystemExit(0)
        return super().__getattribute__(name)

    def select(self, q: torch.Tensor, kv: Any) -> Selection:
        return Selection(torch.arange(kv.length - 32, kv.length).expand(*q.shape[:2], -1))


@dataclass(frozen=True)
class Quits(Method):
    """Ends the process at ``place``."""

    place: str = "select"
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return Leaving(self, geometry)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("place", PLACES)
def test_a_decode_fails_instead_of_ending_the_process(llama: PreTrainedModel, place: str) -> None:
    with pytest.raises(RuntimeError, match=REASON):
        decode(prefill(llama, prompt_of(PROMPT), [Quits(place)]), 0, 4)


@pytest.mark.parametrize("place", ["finish_prefill", "append", "select", "attended"])
def test_fidelity_fails_instead_of_ending_the_process(llama: PreTrainedModel, place: str) -> None:
    """Both kinds of fidelity, and the method beside it is measured all the same."""
    prefilled = prefill(llama, prompt_of(PROMPT), [Dense(), Quits(place), StreamingLLM(BUDGET)])
    for quits, good in (
        each_alone(prefilled, [5, 6, 7], [1, 2]),
        read_in_one_batch(prefilled, [1, 2], [5, 6, 7], [lambda _: None] * 2),
    ):
        assert isinstance(quits, RuntimeError)
        assert "SystemExit(0)" in str(quits)
        assert not isinstance(good, Exception)


def records(path: Path, method: Method) -> list[dict[str, Any]]:
    """What ``benchmark=attention`` records of a method, over two rounds of two steps."""
    file = RecordFile.create(path, "attention", "tiny", "mine", {})
    benchmark = Attention(geometry="tiny", contexts=[512], budgets=[64], repeats=2, steps=2, warmup=1, sweep_mb=0)
    benchmark.measure(Job(None, {"mine": method}, {"mine": file}))
    return list(file.read())


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_s_timing_records_a_method_that_would_end_the_process(tmp_path: Path, place: str) -> None:
    (record,) = records(tmp_path, Quits(place))
    assert record["status"] == "error"
    assert "SystemExit(0)" in record["error"]


class Growing(LayerState):
    """Keeps to its budget in the first step alone. With ``ragged`` only the device knows how many tokens it selects."""

    def __init__(self, method: Grows, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def select(self, q: torch.Tensor, kv: Any) -> Selection:
        count = 10 if kv.length == self.geometry.prompt + 1 else kv.length
        rows = torch.arange(kv.length - count, kv.length).expand(*q.shape[:2], -1)
        return Selection(rows, torch.ones(*q.shape[:3], count, dtype=torch.bool) if self.method.ragged else None)


@dataclass(frozen=True)
class Grows(Method):
    """Attends to everything from its second step on."""

    ragged: bool = False
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return Growing(self, geometry)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_layer_s_timing_compares_every_step_with_the_budget(tmp_path: Path, ragged: bool) -> None:
    (record,) = records(tmp_path, Grows(ragged))
    assert record["status"] == "error"
    assert "SelectionError: Grows, layer 0, step" in record["error"]


class Counting(LayerState):
    """Fails whenever it is asked, and counts how often that is."""

    def __init__(self, geometry: Geometry, asked: list[str]) -> None:
        super().__init__(geometry)
        self.asked = asked

    def append(self, kv: Any) -> None:
        self.asked.append("append")

    def select(self, q: torch.Tensor, kv: Any) -> Selection:
        self.asked.append("select")
        raise ValueError("never")

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        return Counting(self.geometry, self.asked)


@dataclass(frozen=True)
class Fails(Method):
    """Cannot select."""

    asked: list[str] = field(default_factory=list)

    def layer(self, geometry: Geometry) -> LayerState:
        return Counting(geometry, self.asked)


def test_a_failed_method_is_asked_no_more(llama: PreTrainedModel) -> None:
    fails = Fails()
    prefilled = prefill(llama, prompt_of(PROMPT), [Dense(), fails])
    failed, dense = read_in_one_batch(prefilled, [1, 0], [5, 6, 7], [lambda _: None] * 2)
    assert isinstance(failed, ValueError)
    assert not isinstance(dense, Exception)
    assert fails.asked == ["append", "select"]
