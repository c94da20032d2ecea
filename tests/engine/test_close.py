"""A prompt ends what runs in the background, whatever goes wrong while it is prefilled or decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.streaming_llm import StreamingLLM
from pqbench import decode, decoding_with, generate, prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.setting import Setting
from pqbench.errors import RoomError
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.store.link.base import OrderingError
from pqbench.store.tiers import HostTier, Placement
from tests.support import prompt_of, tiny_model

BUDGET = Budget(sink=4, tokens=32, ratio=None)
HOST = Setting(HostTier())


class Failing(LayerState):
    """Fails when its index is built, or in its second selection."""

    def __init__(self, method: Fails, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if self.method.early:
            raise ValueError("too early")

    def select(self, q: Tensor, kv: KV) -> Selection:
        if kv.length > self.geometry.prompt + 1:
            raise ValueError("no more")
        return Selection(torch.arange(kv.length - 32, kv.length).expand(*q.shape[:2], -1))


@dataclass(frozen=True)
class Fails(Method):
    """Fails while the prompt is prefilled if ``early``, else while it is decoded."""

    early: bool = False
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return Failing(self, geometry)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def in_background(work: Callable[[], Any]) -> int:
    """How many threads that some failing work started do not end; each has half a minute for it."""
    before = set(threading.enumerate())
    with pytest.raises((ValueError, RoomError)):
        work()
    started = set(threading.enumerate()) - before
    for thread in started:
        thread.join(30)
    return sum(thread.is_alive() for thread in started)


@pytest.mark.parametrize("early", [True, False])
def test_nothing_goes_on_after_an_error(llama: PreTrainedModel, early: bool) -> None:
    assert in_background(lambda: generate(llama, prompt_of(96), Fails(early), max_new_tokens=4, setting=HOST)) == 0


def test_nothing_goes_on_where_there_is_no_room(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    none = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr("pqbench.store.tiers.psutil.virtual_memory", lambda: none)
    assert in_background(lambda: prefill(llama, prompt_of(96), [StreamingLLM(BUDGET)], setting=HOST)) == 0


@pytest.mark.parametrize("method", [Fails(), StreamingLLM(BUDGET)], ids=["failing", "sound"])
def test_generate_of_transformers_closes(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    closed: list[Prefilled] = []
    close = Prefilled.close

    def watched(self: Prefilled) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(Prefilled, "close", watched)
    try:
        llama.generate(prompt_of(96), max_new_tokens=4, custom_generate=decoding_with(method))
    except ValueError:
        assert isinstance(method, Fails)
    assert len(closed) == 1


class Complaining(Placement):
    """A place whose transfers were never waited for."""

    def __init__(self, inner: Placement) -> None:
        self.inner = inner

    def prompt(self, *given: Any) -> Any:
        return self.inner.prompt(*given)

    def close(self) -> None:
        self.inner.close()
        raise OrderingError("a transfer was never waited for")


def test_the_first_error_is_told_and_one_of_closing_only_where_there_is_no_other(llama: PreTrainedModel) -> None:
    for method, error in ((Fails(), "no more"), (StreamingLLM(BUDGET), "never waited for")):
        prefilled = prefill(llama, prompt_of(96), [method], setting=HOST)
        prefilled.placement = Complaining(prefilled.placement)
        with pytest.raises((ValueError, OrderingError), match=error), prefilled:
            decode(prefilled, 0, 4).settle()
