"""PyramidKV: the schedule against the released formula and its stated properties, selections against a naive loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods.pyramidkv import PyramidKV, layer_budget
from methods.snapkv import SnapKV
from pqbench import decode, prefill
from pqbench.method import Budget, ConfigError, Geometry
from pqbench.store.device import DeviceStore
from tests.methods.test_snapkv import best, pool, votes
from tests.support import Case, append, case, finish, prompt_of, start


@dataclass
class Layer(Case):
    """A case that is one of several layers."""

    layers: int = 1
    rank: int = 0

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, layers=self.layers, rank=self.rank)


def stack(data: Case, layers: int) -> list[Layer]:
    """The same tensors for every layer of a model, so that layers differ only in their budgets."""
    tensors = data.q, data.keys, data.values
    return [Layer(*tensors, data.prompt, data.frequencies, layers, rank) for rank in range(layers)]


def released(mean: int, middle: int, beta: int, layers: int) -> list[int]:
    """The released schedule, which rounds the step down, so that the sum is slightly too large."""
    low = mean // beta
    high = 2 * mean - low
    if high >= middle:
        high = middle
        low = 2 * mean - middle
    return [high - layer * ((high - low) // (layers - 1)) for layer in range(layers)]


def schedule(mean: int, middle: int, beta: int, layers: int, context: int | None = None) -> list[int]:
    context = 32 + middle if context is None else context
    return [layer_budget(mean, middle, context, beta, layers, rank) for rank in range(layers)]


SIZES = {
    "mean": st.integers(0, 3000),
    "more": st.integers(0, 9000),
    "beta": st.integers(1, 60),
    "layers": st.integers(2, 80),
}


@given(**SIZES)
def test_schedule_sums_to_the_budget_falls_and_stays_within_its_clamps(
    mean: int, more: int, beta: int, layers: int
) -> None:
    middle = mean + more
    found = schedule(mean, middle, beta, layers, context=middle + mean)  # never short enough for the fallback
    assert sum(found) == layers * mean
    assert found == sorted(found, reverse=True)
    assert 0 <= found[-1] <= mean <= found[0] <= middle
    first = min(2 * mean - mean // beta, middle)
    assert (found[0], found[-1]) == (first, 2 * mean - first)
    if first < middle:
        assert found[-1] == mean // beta


@given(**SIZES)
def test_schedule_is_the_released_one_but_for_its_rounding(mean: int, more: int, beta: int, layers: int) -> None:
    found = schedule(mean, mean + more, beta, layers, context=2 * mean + more)
    theirs = released(mean, mean + more, beta, layers)
    assert layers * mean <= sum(theirs) <= layers * mean + layers * (layers - 1) // 2
    assert all(0 <= t - f <= layers - 1 for t, f in zip(theirs, found, strict=True))
    straight = np.linspace(theirs[0], found[-1], layers)
    assert np.abs(np.array(found) - straight).max() < 1  # no layer is a whole token off the line


def test_schedules_by_hand() -> None:
    assert schedule(100, 1000, 20, 5) == [195, 148, 100, 52, 5]  # 195, 147.5, 100, 52.5, 5
    assert schedule(100, 1000, 20, 2) == [195, 5]
    assert schedule(100, 1000, 10, 3) == [190, 100, 10]
    assert schedule(100, 150, 20, 3, context=200) == [150, 100, 50]  # the first layer keeps all there is
    assert schedule(100, 168, 20, 3, context=200) == [168, 100, 32]
    assert schedule(100, 167, 20, 3, context=199) == [100, 100, 100]  # shorter than twice the budget
    assert schedule(100, 1000, 1, 4) == [100, 100, 100, 100]
    assert schedule(0, 1000, 20, 4) == [0, 0, 0, 0]
    assert schedule(100, 1000, 20, 1) == [100]


@given(
    prompt=st.integers(1, 90),
    tokens=st.integers(9, 60),
    layers=st.integers(1, 6),
    beta=st.integers(1, 25),
    kind=st.sampled_from(["avg", "max"]),
    kernel=st.sampled_from([1, 3, 7]),
    chunk=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_every_layer_keeps_the_best_of_its_own_number(
    prompt: int, tokens: int, layers: int, beta: int, kind: str, kernel: int, chunk: int, seed: int
) -> None:
    budget = Budget(sink=3, window=5, tokens=tokens, ratio=None)
    data = case(prompt, 1, seed=seed, spread=2.0)
    split, total = budget.resolve(prompt + 1, prompt), 0
    edge = prompt - (split.window - 1)
    counted = votes(data, 8)[:, :, split.sink : edge]
    for layer in stack(data, layers):
        store = start(PyramidKV(budget, 8, kernel, kind, beta), layer, chunk)[1]
        count = layer_budget(split.top_k, edge - split.sink, prompt, beta, layers, layer.rank)
        total += store.length
        for b, h in np.ndindex(2, 2):
            top = best(pool(counted[b, h], kernel, kind), count)
            expected = {*range(split.sink), *(split.sink + i for i in top), *range(edge, prompt)}
            assert set(store.positions[b, h].tolist()) == expected
            assert store.length == len(expected)
    assert total == layers * (split.total - 1)


@pytest.mark.parametrize("budget", [Budget(sink=3, window=5, tokens=21, ratio=None), Budget(sink=3, ratio=0.3)])
@pytest.mark.parametrize("layers", [2, 3, 7])
def test_layers_together_hold_the_budget_in_every_step_and_each_keeps_its_lead(budget: Budget, layers: int) -> None:
    prompt, steps = 240, 20
    data = case(prompt, steps, batch=1, heads=1)
    models = [(layer, *start(PyramidKV(budget, 8, 3), layer)) for layer in stack(data, layers)]
    leads: list[int] | None = None
    for step in range(steps):
        lengths = []
        for layer, state, store in models:
            q = append(state, store, layer, step)
            lengths.append(store.length)
            assert set(range(prompt + step - 3, prompt + step + 1)) <= set(store.positions[0, 0].tolist())
            finish(state, store, state.select(q, store), q, layer)
        mean = budget.resolve(prompt + step + 1, prompt).total
        assert sum(lengths) == layers * mean
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] > lengths[-1]
        leads = [length - mean for length in lengths] if leads is None else leads
        assert leads == [length - mean for length in lengths]


def test_beta_of_one_and_a_single_layer_are_snapkv() -> None:
    budget = Budget(sink=3, ratio=0.3, minimum=12)
    data = case(60, 15, spread=2.0)
    plain = SnapKV(budget, 8, 3, "avg")
    pairs: list[tuple[PyramidKV, Layer]] = [
        (PyramidKV(budget, 8, 3, "avg"), stack(data, 1)[0]),
        (PyramidKV(budget, 8, 3, "avg", beta=1), stack(data, 4)[0]),
        (PyramidKV(budget, 8, 3, "avg", beta=1), stack(data, 4)[3]),
        (PyramidKV(budget, 8, 3, "avg"), stack(data, 3)[1]),  # the middle layer of an odd number
    ]
    for method, layer in pairs:
        (state, store), (twin, twin_store) = start(method, layer), start(plain, data)
        for step in range(15):
            q = append(state, store, layer, step)
            append(twin, twin_store, data, step)
            assert (store.positions == twin_store.positions).all()
            finish(state, store, state.select(q, store), q, layer)
            finish(twin, twin_store, twin.select(q, twin_store), q, data)


def test_generated_tokens_all_stay_as_published() -> None:
    budget = Budget(sink=3, window=5, tokens=21, ratio=None)
    held: list[DeviceStore] = []
    for layer in stack(case(240, 6), 2):
        state, store = start(PyramidKV(budget, evict_generated=False), layer)
        before = store.length
        for step in range(6):
            q = append(state, store, layer, step)
            finish(state, store, state.select(q, store), q, layer)
            assert store.length == before + step + 1
        held.append(store)
    assert sum(store.length - 6 for store in held) == 2 * 20


def test_a_model_attends_to_the_budget_on_average_over_its_layers(llama: PreTrainedModel) -> None:
    budget = Budget(sink=4, ratio=0.3, minimum=12)
    generation = decode(prefill(llama, prompt_of(130), [PyramidKV(budget, 8, 3)]), 0, 8)
    first, last = (meter.attended / meter.steps for meter in generation.meters())
    mean = sum(budget.resolve(context, 130).total for context in range(131, 138)) / 7
    assert (first + last) / 2 == pytest.approx(mean)
    assert first > last + 20


@pytest.mark.parametrize(
    ("options", "word"),
    [({"observation": 0}, "observation"), ({"kernel": 2}, "odd"), ({"pooling": "mean"}, "avg"), ({"beta": 0}, "beta")],
)
def test_wrong_options_are_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        PyramidKV(**options)  # type: ignore[arg-type]
