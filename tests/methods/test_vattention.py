"""vAttention with other methods: it is unbiased, within its error bound, and counts every token once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.oracle import Oracle
from methods.pqcache import PQCache, PQCachePlus
from methods.quest import Quest
from methods.random_tokens import RandomTokens
from methods.sparq import SparQ
from methods.streaming_llm import StreamingLLM
from methods.vattention import VAttention, VAttentionState
from pqbench.method import Budget, ConfigError, Method
from pqbench.store.device import DeviceStore
from tests.support import Case, advance, append, assert_unbiased, case, estimate_of, output_of, start, tokens_of

BUDGET = Budget(sink=3, window=6, tokens=33, ratio=None)
BASES: dict[str, Method] = {
    "oracle": Oracle(),
    "oracle query_head": Oracle(rule="query_head"),
    "pqcache": PQCache(m=2, b=3),
    "pqcache_plus": PQCachePlus(b=3, b_v=3),
    "cells": PQCachePlus(m=2, b=3, tail="none", spread=False, search="cells"),
    "arranged": PQCachePlus(m=2, b=3, tail="none", spread=False, search="cells", arranged=True),
    "quest query_head": Quest(page_size=4, per_query_head=True),
    "random_tokens": RandomTokens(),
    "sparq": SparQ(rank=4),
}


def started(method: VAttention, data: Case) -> tuple[VAttentionState, DeviceStore]:
    state, store = start(method, data)
    assert isinstance(state, VAttentionState)
    return state, store


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_every_token_is_counted_once(base: Method, epsilon: float | None) -> None:
    """The weights of the attended rows of a KV head add up to the context length, and no row is selected twice."""
    data = case(120, 4)
    state, store = started(VAttention(base, BUDGET, epsilon=epsilon, base_sample=4), data)
    for step in range(4):
        selection = advance(state, store, data, step)
        assert selection.residual is None
        assert selection.log_weights is not None
        weights = selection.log_weights.exp().expand(2, 2, 2, -1)
        if selection.visible is not None:
            weights = weights * selection.visible
        assert torch.allclose(weights.sum(-1), torch.tensor(120.0 + step + 1), rtol=1e-5)
        tokens = tokens_of(selection, store)
        assert all(len(set(row)) == len(row) for row in tokens.flatten(0, 1).tolist())
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < 121 + step


@pytest.mark.parametrize("name", ["oracle", "pqcache", "cells"])
def test_the_rest_of_the_budget_is_the_selection_of_the_base(name: str) -> None:
    data = case(120, 3)
    state, store = started(VAttention(BASES[name], BUDGET, share=0.25), data)
    options: dict[str, Any] = {"budget": replace(BUDGET, tokens=33 - 6)}  # a quarter of 24
    alone, alone_store = start(replace(BASES[name], **options), data)
    for step in range(3):
        ours, theirs = advance(state, store, data, step), advance(alone, alone_store, data, step)
        assert theirs.indices is not None
        assert ours.indices is not None
        assert torch.equal(ours.indices[:, :, : 33 - 6], theirs.indices)
        assert ours.indices.shape[2] == 33


@pytest.mark.parametrize("name", ["oracle", "sparq"])
def test_numerator_and_denominator_are_unbiased(name: str) -> None:
    """The mean over 1000 seeds is within 4.5 standard errors of the truth (136 comparisons)."""
    data = case(80, 1, spread=1.0)
    state, store = started(VAttention(BASES[name], BUDGET), data)
    q, drawn = append(state, store, data, 0), []
    for seed in range(1000):
        state.method = replace(state.method, seed=seed)
        drawn.append(estimate_of(state.select(q, store), store, data))
    assert_unbiased(np.stack(drawn), data.sums(81))


def test_the_denominator_is_rarely_off_by_more_than_epsilon() -> None:
    """For every KV and query head, at most a share delta of 1000 samples is off by more. Samples are not needlessly
    large: some are off, and the budget would have allowed three times as many tokens."""
    epsilon, delta = 0.04, 0.1
    data = case(4000, 1, spread=0.8)
    budget = Budget(sink=3, window=6, tokens=9 + 2000, ratio=None)
    method = VAttention(BASES["oracle"], budget, share=0.8, epsilon=epsilon, delta=delta, base_sample=100)
    state, store = started(method, data)
    q, truth = append(state, store, data, 0), data.sums(4001)[..., -1]
    off, sizes = [], []
    for seed in range(1000):
        state.method = replace(state.method, seed=seed)
        selection = state.select(q, store)
        assert selection.visible is not None
        off.append(np.abs(estimate_of(selection, store, data)[..., -1] / truth - 1) > epsilon)
        sizes.append(selection.visible[:, :, 0].sum(-1).numpy() - 9 - 400)
    assert (np.mean(off, 0) <= delta).all()
    assert (np.mean(off, 0) > delta / 5).all()
    assert (np.mean(sizes, 0) < 1600 / 3).all()


def test_sizes_follow_the_bound() -> None:
    """The bound is written out in numpy for one step."""
    data = case(400, 1, group=3)
    budget = Budget(sink=3, window=6, tokens=209, ratio=None)
    state, store = started(VAttention(BASES["oracle"], budget, epsilon=0.06, delta=0.2, base_sample=20), data)
    q, exact = append(state, store, data, 0), data.terms(401)
    before = store.usage.key_bytes_read
    selection = state.select(q, store)
    read = store.usage.key_bytes_read - before
    assert selection.visible is not None
    chosen = tokens_of(selection, store).numpy()
    for b, h in np.ndindex(2, 2):
        certain, sample = exact[b, h][:, chosen[b, h, :109]], exact[b, h][:, chosen[b, h, 109:129]]
        rest = 401 - 109
        denominator = certain.sum(-1) + rest * sample.mean(-1)
        needed = np.ceil((1.2815516 * sample.std(-1, ddof=1) * rest / (0.06 * denominator)) ** 2).max()
        assert int(selection.visible[b, h, 0].sum()) - 109 == np.clip(needed, 20, 100)
    counts = selection.visible[:, :, 0].sum(-1) - 109
    assert len(counts.unique()) > 1
    assert read == 2 * 2 * (401 + 129) * 16 * 4  # the base reads all keys, the sample those of its rows once more


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("prompt", [1, 3, 40])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_budget_for_everything_is_full_attention(base: Method, prompt: int, epsilon: float | None) -> None:
    data = case(prompt, 10)
    budget = Budget(sink=4, ratio=1.0)
    state, store = started(VAttention(base, budget, epsilon=epsilon, base_sample=2), data)
    for step in range(10):
        selection = advance(state, store, data, step)
        output = output_of(selection, store, data.q[:, :, :, prompt + step], data)
        assert np.allclose(output, data.full(prompt + step + 1), atol=1e-5)


@pytest.mark.parametrize("tokens", [9, 10, 33, 80])
def test_identical_values_give_full_attention_at_any_budget(tokens: int) -> None:
    data = case(90, 3)
    data.values[:] = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(4))
    state, store = started(VAttention(BASES["sparq"], replace(BUDGET, tokens=tokens)), data)
    for step in range(3):
        selection = advance(state, store, data, step)
        output = output_of(selection, store, data.q[:, :, :, 90 + step], data)
        assert np.allclose(output, data.full(90 + step + 1), atol=1e-5)


def test_samples_differ_by_step_layer_head_and_seed_and_repeat() -> None:
    def draws(seed: int = 0, layer: int = 0) -> list[torch.Tensor]:
        data = case(120, 2)
        method = VAttention(RandomTokens(), BUDGET, share=1.0, seed=seed)
        state = method.layer(replace(data.geometry, layer=layer))
        _, store = start(method, data)
        state.finish_prefill(store)
        return [tokens_of(advance(state, store, data, step), store)[..., 9:] for step in range(2)]

    first = draws()
    assert torch.equal(first[0], draws()[0])
    assert not torch.equal(first[0][:, 0], first[0][:, 1])
    for other in (first[1], draws(seed=1)[0], draws(layer=1)[0]):
        assert not torch.equal(first[0], other)


@pytest.mark.parametrize("base", [Full(), H2O(), StreamingLLM(), InfLLM()], ids=lambda base: type(base).__name__)
def test_a_base_that_does_not_just_select_is_refused(base: Method) -> None:
    with pytest.raises(ConfigError, match=f"base is {type(base).__name__}"):
        VAttention(base)


@pytest.mark.parametrize(
    "options", [{"share": 1.5}, {"epsilon": 0.0}, {"delta": 1.0}, {"delta": 0.0}, {"base_sample": 1}]
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        VAttention(SparQ(), **options)
