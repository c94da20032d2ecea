"""The spread of estimated logits: its definition over the queries of the prompt, its four bits, and its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.pqcache import PQCachePlus, PQCachePlusState
from methods.pqcache.spread import Spread, decoded, half_variance
from pqbench.method import ConfigError
from tests.methods.test_pqcache_plus import KINDS, estimates, levels, plus, started
from tests.support import Case, append, case, softmax, tokens_of


def half_mean_square(state: PQCachePlusState, data: Case, stop: int) -> np.ndarray:
    """Half the mean of (true - estimated logit) ** 2 of middle tokens over all prompt queries, ``[B, H, M]``, in numpy;
    one constant per query is left out."""
    q = data.q[:, :, :, : data.prompt].flatten(2, 3)
    keys = data.keys[:, :, 3:stop].double().numpy()
    true = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), keys) * state.geometry.scaling
    spread, state.index.spread = state.index.spread, None
    error = true - estimates(state, q)
    state.index.spread = spread
    return (error**2).mean(2) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_hold_half_the_mean_squared_error_over_the_prompts_queries(kind: str) -> None:
    """This holds for tokens of the prompt and appended tokens, up to the resolution of four bits. The spread of a later
    token is at most the largest of the prompt."""
    data = case(90, 8, group=3)
    state, store = started(plus(codebook=kind, queries=None, spread=True), data)
    for step in range(8):
        append(state, store, data, step)
    assert state.index.codes is not None
    assert state.index.spread is not None
    expected = half_mean_square(state, data, 98 - 6)
    most = expected[..., : 90 - 9].max(-1, keepdims=True)
    share = np.sqrt(np.minimum(expected / most, 1))
    assert levels(state).shape == expected.shape
    assert np.abs(levels(state) - 15 * share).max() < 0.501
    assert np.allclose(state.index.spread.most.numpy(), most, rtol=1e-4)


@given(count=st.integers(1, 40), m=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_half_variance_is_the_quadratic_form(count: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, codebook = torch.randn(2, 3, count, 8, generator=generator), torch.randn(2, 3, m, 4, 8 // m)
    codes = torch.randint(4, (2, 3, count, m), generator=generator).byte()
    root = torch.randn(2, 3, 8, 8, generator=generator)
    moment = root @ root.transpose(2, 3)
    found = half_variance(keys, codebook, codes, moment)
    for b, h, s in np.ndindex(2, 3, count):
        row = torch.cat([codebook[b, h, j, int(codes[b, h, s, j])] for j in range(m)])
        assert torch.equal(decoded(codebook, codes)[b, h, s], row)
        error = (keys[b, h, s] - row).double()
        assert np.isclose(float(found[b, h, s]), float(error @ moment[b, h].double() @ error) / 2, rtol=1e-4, atol=1e-5)


def test_keys_that_are_their_centroids_add_nothing() -> None:
    codebook, codes = torch.randn(1, 2, 2, 4, 8), torch.randint(4, (1, 2, 30, 2)).byte()
    device, moment = torch.device("cpu"), torch.eye(16).expand(1, 2, 16, 16)
    spread = Spread(decoded(codebook, codes), codebook, codes, moment, device)
    assert not spread.numbers.pairs().any()
    assert not spread.added().any()


def test_rare_keys_are_found_in_the_steps_that_need_them() -> None:
    """Ten of 400 keys lie alone, away from the eight clusters of the others. Queries look for one of them as often as
    for a cluster."""
    generator = torch.Generator().manual_seed(1)
    data = case(400, 1, batch=1, heads=4, group=1, width=16)
    clusters, rare = torch.randn(8, 16, generator=generator), torch.randn(10, 16, generator=generator)
    data.keys[:] = clusters[torch.randint(8, (401,), generator=generator)] + 0.1 * torch.randn(1, 4, 401, 16)
    places = torch.randperm(380, generator=generator)[:10] + 5
    data.keys[:, :, places] = rare
    targets = torch.cat([clusters, rare])[torch.randint(18, (1, 4, 1, 401), generator=generator)]
    data.q[:] = 2 * targets
    found = {}
    for spread in (False, True):
        state, store = started(plus(codebook="plain", tail="none", m=1, spread=spread), data)
        q = append(state, store, data, 0)
        held = 0.0
        for target in rare:
            asked = (2 * target).expand_as(q).contiguous()
            mine = tokens_of(state.select(asked, store), store).numpy()
            exact = softmax((asked[:, :, :, None] @ data.keys[:, :, None].transpose(3, 4))[..., 0, :].numpy() / 4)
            held += np.take_along_axis(exact[:, :, 0], mine, 2).sum(-1).mean() / len(rare)
        found[spread] = held
    assert found[True] > found[False] + 0.05


def test_a_cell_has_one_score() -> None:
    with pytest.raises(ConfigError, match=r"spread=false"):
        PQCachePlus(m=2, search="cells")
