"""``top_p`` against numpy: the fewest tokens that hold the share, at most the budget, and a tail of exactly the
others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from methods.pqcache import PQCachePlusState
from pqbench.method import Budget
from pqbench.store.device import DeviceStore
from tests.methods.test_pqcache_plus import BUDGET, append, estimates, lse, plus, softmax, started
from tests.support import advance, case, output_of


def attention_estimates(state: PQCachePlusState, store: DeviceStore, q: Tensor, budget: Budget) -> np.ndarray:
    """Softmax ``[B, H, G, S]`` of estimates in the middle and exact logits elsewhere."""
    first, stop = budget.resolve(store.length, state.geometry.prompt).middle(store.length)
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), store.keys().double().numpy()) * state.geometry.scaling
    logits[..., first:stop] = estimates(state, q)
    return softmax(logits)


@pytest.mark.parametrize("tail", ["none", "mean", "pq"])
@pytest.mark.parametrize("top_p", [0.5, 0.7, 0.97])
def test_top_p_takes_the_fewest_tokens_that_hold_the_share(tail: str, top_p: float) -> None:
    budget, sizes = replace(BUDGET, tokens=49), set()  # at most 40 of the middle
    data = case(90, 6, group=3, spread=4.0)
    state, store = started(plus(budget, tail=tail, top_p=top_p), data)
    for step in range(6):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert selection.visible is not None
        assert selection.indices is not None
        weights = attention_estimates(state, store, q, budget)
        shares, own = weights.mean(2), np.zeros((2, 2, store.length), dtype=bool)
        for b, h in np.ndindex(2, 2):
            seen = selection.visible[b, h].numpy()
            assert (seen == seen[0]).all()
            own[b, h, selection.indices[b, h].numpy()[seen[0]]] = True
            mine = own[b, h]
            assert mine[:3].all()
            assert mine[-6:].all()
            middle = np.sort(shares[b, h, 3:-6][mine[3:-6]])
            sizes.add(len(middle))
            rest = shares[b, h, 3:-6][~mine[3:-6]]
            assert len(middle) == 0 or middle[0] >= rest.max() - 1e-6
            held = shares[b, h][mine].sum()
            assert held >= top_p - 1e-5 or len(middle) == 40
            assert len(middle) == 0 or held - middle[0] < top_p + 1e-5  # one token fewer is not enough
        if tail != "none":
            assert selection.residual is not None
            free = np.where(own[:, :, None], -np.inf, np.log(weights))[..., 3:-6]
            exact = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), store.keys().double().numpy()) * data.scaling
            normaliser = (exact - np.log(weights))[..., 0]  # sinks are exact
            assert np.allclose(selection.residual.log_weight.numpy(), lse(free) + normaliser, atol=1e-4)
    assert len(sizes) > 3
    assert (40 in sizes) == (top_p > 0.9)


def test_top_p_of_everything_is_the_fixed_budget() -> None:
    # With several query heads, shares of all attention and shares of the middle rank tokens differently.
    data = case(90, 3, group=1)
    fixed, adaptive = started(plus(), data), started(plus(top_p=1.0), data)
    for step in range(3):
        selections = [advance(*pair, data, step) for pair in (fixed, adaptive)]
        outputs = [
            output_of(s, p[1], data.q[:, :, :, 90 + step], data)
            for s, p in zip(selections, (fixed, adaptive), strict=True)
        ]
        assert np.allclose(outputs[0], outputs[1], atol=1e-5)
        assert selections[1].visible is not None
        assert bool(selections[1].visible.all())
