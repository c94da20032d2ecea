"""SparQ against its formulas, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.oracle import Oracle
from methods.sparq import SparQ, SparQState
from pqbench.method import Budget, ConfigError
from tests.support import Case, append, case, finish, output_of, softmax, start, tokens_of

BUDGET = Budget(sink=3, window=5, tokens=20, ratio=None)


def state_at(data: Case, method: SparQ, steps: int = 1) -> tuple[SparQState, object, torch.Tensor]:
    state, store = start(method, data)
    for step in range(steps):
        q = append(state, store, data, step)
        if step + 1 < steps:
            finish(state, store, state.select(q, store), q, data)
    assert isinstance(state, SparQState)
    return state, store, q


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_output_equals_the_formulas(rank: int) -> None:
    length, data = 63, case(60, 3, group=3)
    state, store, q = state_at(data, SparQ(BUDGET, rank=rank), 3)
    selection = state.select(q, store)  # type: ignore[arg-type]
    output = output_of(selection, store, q, data)  # type: ignore[arg-type]
    keys, values = data.keys[:, :, :length].double().numpy(), data.values[:, :, :length].double().numpy()
    for b, h in np.ndindex(2, 2):
        query = q[b, h].double().numpy()
        picked = np.argsort(-np.abs(query).sum(0))[:rank]
        tau = np.sqrt(16 * np.abs(query[:, picked]).sum(1) / np.abs(query).sum(1))
        logits = query[:, picked] @ keys[b, h][:, picked].T / tau[:, None]  # [G, S]
        top = 3 + np.argsort(-logits.sum(0)[3:-5])[:12]
        chosen = [0, 1, 2, *sorted(top), *range(length - 5, length)]
        assert sorted(tokens_of(selection, store)[b, h].tolist()) == chosen  # type: ignore[arg-type]
        alpha = softmax(logits)[:, chosen].sum(1, keepdims=True)
        exact = softmax(query @ keys[b, h, chosen].T / 4) @ values[b, h, chosen]
        assert np.allclose(output[b, h], alpha * exact + (1 - alpha) * values[b, h].mean(0), atol=1e-4)


def test_all_components_give_the_exact_logits_and_the_oracle_of_summed_logits() -> None:
    data = case(60, 1)
    state, _, q = state_at(data, SparQ(BUDGET, rank=16))
    exact = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), data.keys.double().numpy()) / np.sqrt(16)
    assert np.allclose(state.scores(q).numpy(), exact, atol=1e-4)  # tau is sqrt(D)
    # One query head per group: summing logits and summing probabilities rank alike.
    single = case(60, 1, group=1)
    sparq = state_at(single, SparQ(BUDGET, rank=16, reallocate=False))
    oracle, oracle_store = start(Oracle(BUDGET), single)
    q = append(oracle, oracle_store, single, 0)
    mine, theirs = sparq[0].select(q, sparq[1]).indices, oracle.select(q, oracle_store).indices  # type: ignore[arg-type]
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine.sort().values, theirs.sort().values)


def test_logits_follow_a_scaling_other_than_the_usual() -> None:
    data = case(60, 1)
    usual, store, q = state_at(data, SparQ(BUDGET, rank=16))
    geometry = data.geometry.__class__(**{**data.geometry.__dict__, "scaling": 0.7})
    other = SparQState(SparQ(BUDGET, rank=16), geometry)
    other.finish_prefill(store)  # type: ignore[arg-type]
    assert torch.allclose(other.scores(q), usual.scores(q) * 0.7 * 4, atol=1e-4)


@pytest.mark.parametrize(("rank", "tokens"), [(1, 20), (4, 20), (16, 20), (16, 61)])
def test_alpha_lies_between_zero_and_one(rank: int, tokens: int) -> None:
    data = case(60, 1, spread=4.0)
    state, store, q = state_at(data, SparQ(Budget(sink=3, window=5, tokens=tokens, ratio=None), rank=rank))
    residual = state.select(q, store).residual  # type: ignore[arg-type]
    assert residual is not None
    assert residual.relative
    alpha = 1 / (1 + residual.log_weight.double().exp())
    assert bool(((alpha >= 0) & (alpha <= 1)).all())
    if tokens == 61:
        assert np.allclose(alpha.numpy(), 1, atol=1e-5)


def test_equal_keys_give_the_mean_value() -> None:
    data = case(60, 1)
    data.keys[:] = data.keys[:, :, :1]
    state, store, q = state_at(data, SparQ(BUDGET, rank=4))
    selection = state.select(q, store)  # type: ignore[arg-type]
    assert selection.residual is not None
    # With equal keys every token weighs the same, so alpha is the share of the tokens selected.
    alpha = 1 / (1 + selection.residual.log_weight.exp())
    assert torch.allclose(alpha, torch.full_like(alpha, 20 / 61), atol=1e-5)
    chosen = data.values.double().numpy()[:, :, tokens_of(selection, store)[0, 0].numpy()]  # type: ignore[arg-type]
    assert chosen.shape[2] == 20
    state, store, q = state_at(data, SparQ(Budget(sink=0, ratio=1.0), rank=4))
    output = output_of(state.select(q, store), store, q, data)  # type: ignore[arg-type]
    assert np.allclose(output, data.values.double().mean(2, keepdim=True).numpy(), atol=1e-4)


def test_both_key_layouts_hold_the_same_bytes_after_appends() -> None:
    data = case(60, 25)
    data.keys = data.keys.bfloat16()
    state, store, _ = state_at(data, SparQ(BUDGET, rank=4), 25)
    columns = state.columns
    assert columns is not None
    assert torch.equal(columns.view().view(2, 2, 16, 85).transpose(2, 3), store.keys())  # type: ignore[attr-defined]


def test_the_mean_value_counts_every_token_so_far() -> None:
    data = case(60, 25)
    state, store, q = state_at(data, SparQ(BUDGET, rank=4), 25)
    residual = state.select(q, store).residual  # type: ignore[arg-type]
    assert residual is not None
    assert np.allclose(residual.value.numpy(), data.values.double().mean(2, keepdim=True).numpy(), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_outside_the_head_dimension_is_named(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"rank.*head dimension 16"):
        SparQ(BUDGET, rank=rank).layer(case(4, 1).geometry)
