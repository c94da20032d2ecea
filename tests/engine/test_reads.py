"""Keys that a method reads outside its selections count as reads of its index, except for the upkeep of an index."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench import decode, prefill
from pqbench.engine.reads import UPKEEP
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from tests.support import prompt_of, tiny_model

PROMPT, NEW = 300, 6


class Scoring(LayerState):
    """Reads the last ``rows`` keys in each of its functions that ``places`` names."""

    def __init__(self, method: Scores, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def _read(self, place: str, kv: KV) -> None:
        if place in self.method.places:
            kv.keys(max(0, kv.length - self.method.rows))

    def append(self, kv: KV) -> None:
        self._read("append", kv)

    def prefetch(self, kv: KV) -> None:
        self._read("prefetch", kv)

    def select(self, q: Tensor, kv: KV) -> Selection:
        self._read("select", kv)
        return Selection(torch.arange(kv.length - 32, kv.length).expand(*q.shape[:2], -1))

    def attended(self, weights: Tensor | None, kv: KV) -> None:
        self._read("attended", kv)


@dataclass(frozen=True)
class Scores(Method):
    """Looks at keys to find out what to attend to, and declares nothing."""

    places: tuple[str, ...] = ()
    rows: int = 1 << 30
    budget: Budget = field(default_factory=lambda: Budget(sink=4, tokens=32, ratio=None))

    def layer(self, geometry: Geometry) -> LayerState:
        return Scoring(self, geometry)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def keys_read(model: PreTrainedModel, method: Method) -> int:
    """Keys for which the last layer's index bytes stand, over all steps of a decode."""
    cohort = decode(prefill(model, prompt_of(PROMPT), [method]), 0, NEW, NEW).cohorts()[-1]
    known = cohort.state.geometry
    size, rest = divmod(cohort.meter.index_bytes, known.kv_heads * known.head_dim * 4)
    assert rest == 0
    return size


def test_reading_all_keys_before_selecting_counts_from_the_second_time_on(llama: PreTrainedModel) -> None:
    lengths = [PROMPT + step for step in range(1, NEW)]
    assert keys_read(llama, Scores(("append",))) == sum(length - UPKEEP for length in lengths[1:])
    # What is read after a step is read for the next one.
    assert keys_read(llama, Scores(("attended",))) == sum(length - UPKEEP for length in lengths[1:-1])
    # A prefetch comes before the token of its step is stored, and the first step has none.
    assert keys_read(llama, Scores(("prefetch",))) == sum(length - 1 - UPKEEP for length in lengths[2:])


def test_reads_of_a_selection_count_as_a_whole(llama: PreTrainedModel) -> None:
    lengths = [PROMPT + step for step in range(1, NEW)]
    assert keys_read(llama, Scores(("select",))) == sum(lengths)


@pytest.mark.parametrize("rows", [1, 16, UPKEEP])
def test_the_upkeep_of_an_index_does_not_count(llama: PreTrainedModel, rows: int) -> None:
    assert keys_read(llama, Scores(("append",), rows)) == 0
