"""Long generation: how well codebooks find tokens of each age while four times the prompt's length is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.pqcache import PQCachePlus
from pqbench import generate
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from tests.support import Case, advance, prompt_of, start, tokens_of


@dataclass(frozen=True)
class Recorder(Method):
    """Full attention that keeps what every layer saw."""

    layers: list[RecorderState] = field(default_factory=list)

    def layer(self, geometry: Geometry) -> LayerState:
        self.layers.append(RecorderState(geometry))
        return self.layers[-1]


class RecorderState(LayerState):
    """Queries ``[B, H, G, n, D]`` in order, and the last keys and values."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.queries: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RecorderState:
        return self

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries.append(q)

    def select(self, q: Tensor, kv: KV) -> Selection:
        self.queries.append(q[:, :, :, None])
        self.keys, self.values = kv.keys(), kv.values()
        return Selection()


def recall_by_age(method: PQCachePlus, data: Case) -> dict[str, float]:
    """The share of the exact top-k that is found in the last quarter of the steps, separately for tokens of the prompt
    and tokens of the last half of the generation."""
    state, store = start(method, data)
    prompt, new = data.prompt, data.q.shape[3] - data.prompt
    found, sought = dict.fromkeys(("prompt", "late"), 0), dict.fromkeys(("prompt", "late"), 0)
    for step in range(new):
        mine = tokens_of(advance(state, store, data, step), store).numpy()
        if step < new * 3 // 4:
            continue
        length = prompt + step + 1
        split = method.budget.resolve(length, prompt)
        first, stop = split.middle(length)
        shares = data.probabilities(length)[..., first:stop]
        best = first + np.argsort(-(shares / shares.sum(-1, keepdims=True)).sum(2), -1)[..., : split.top_k]
        hit = (best[..., None] == mine[:, :, None]).any(-1)
        for age, those in (("prompt", best < prompt), ("late", best >= prompt + new // 2)):
            found[age] += int((hit & those).sum())
            sought[age] += int(those.sum())
    assert min(sought.values()) > 2000
    return {age: found[age] / sought[age] for age in found}


def recorded(model: PreTrainedModel, prompt: int, new: int) -> Case:
    """Queries, keys and values of the layers of a model over a prompt and its continuation, as sequences of one
    case."""
    recorder = Recorder()
    generate(model, prompt_of(prompt, seed=3), recorder, max_new_tokens=new + 1)
    layers = recorder.layers
    data = Case(
        torch.cat([torch.cat(layer.queries, dim=3) for layer in layers]),
        torch.cat([layer.keys for layer in layers]),
        torch.cat([layer.values for layer in layers]),
        prompt,
        torch.ones(8),
    )
    assert data.q.shape[3] == data.keys.shape[2] == prompt + new
    return data


def test_refreshed_codebooks_find_late_tokens_as_well_as_those_of_the_prompt(llama: PreTrainedModel) -> None:
    """The two shares differ by at most 3 points; with frozen codebooks far fewer late tokens are found."""
    data = recorded(llama, 128, 512)
    options: dict[str, Any] = {"m": 2, "b": 4, "tail": "none", "spread": False}
    budget = Budget(sink=4, window=8, ratio=0.1)
    refreshed = recall_by_age(PQCachePlus(budget, refresh=64, **options), data)
    frozen = recall_by_age(PQCachePlus(budget, **options), data)
    assert refreshed["late"] >= refreshed["prompt"] - 0.03
    assert frozen["late"] < frozen["prompt"] - 0.06
    assert refreshed["late"] > frozen["late"] + 0.03
