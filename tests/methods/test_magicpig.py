"""MagicPIG: sampling probabilities, unbiased estimates, the cap, and hashes of every token that left the window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from methods.magicpig import MagicPIG, MagicPIGState, collision_chance
from pqbench.method import Budget, ConfigError
from pqbench.store.device import DeviceStore
from tests.support import Case, append, assert_unbiased, case, estimate_of, start, tokens_of

WIDE = Budget(sink=3, window=6, tokens=80, ratio=None)  # of 91 tokens, so the cap has no effect


def started(method: MagicPIG, data: Case) -> tuple[MagicPIGState, DeviceStore]:
    state, store = start(method, data)
    assert isinstance(state, MagicPIGState)
    return state, store


@pytest.mark.parametrize(("bits", "tables"), [(1, 2), (4, 10), (10, 150)])
def test_the_chance_is_how_often_two_hashes_agree(bits: int, tables: int) -> None:
    """Checked with 4000 sets of projections, for angles from 0 to pi, within 4.5 standard errors."""
    random = np.random.default_rng(0)
    angles = np.linspace(0, np.pi, 7)
    others = np.stack([np.cos(angles), np.sin(angles)], -1)
    both = np.zeros(7)
    for _ in range(4000):
        projections = random.normal(size=(2, tables, bits))
        signs = np.einsum("nd,dlk->nlk", others, projections) > 0
        own = projections[0] > 0  # of the vector (1, 0)
        both += ((signs == own).all(-1).sum(-1) >= 2) / 4000
    chance = collision_chance(torch.from_numpy(np.cos(angles)), bits, tables).numpy()
    assert (np.abs(both - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / 4000) + 1e-9).all()
    assert chance[0] == 1


def test_chances_too_small_for_a_difference_of_large_numbers() -> None:
    """If u^K is tiny, two tables agree with probability C(L, 2) u^2K."""
    cosine = torch.tensor(-0.9, dtype=torch.float64)
    hit = (1 - np.arccos(-0.9) / np.pi) ** 8
    expected = 75 * 74 / 2 * hit**2
    assert float(collision_chance(cosine, 8, 75)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tokens", [80, 21])
def test_numerator_and_denominator_are_unbiased(tokens: int) -> None:
    """The mean over 1500 seeds is within 4.5 standard errors of the truth (136 comparisons), with and without the
    cap."""
    data = case(90, 1, spread=1.0)
    budget = Budget(sink=3, window=6, tokens=tokens, ratio=None)
    drawn, seen = [], []
    for seed in range(1500):
        state, store = started(MagicPIG(budget, bits=3, tables=12, seed=seed), data)
        selection = state.select(append(state, store, data, 0), store)
        assert selection.visible is not None
        drawn.append(estimate_of(selection, store, data))
        seen.append(selection.visible.any(2).sum(-1).numpy())
    assert_unbiased(np.stack(drawn), data.sums(91))
    assert np.max(seen) <= tokens
    capped = np.mean(np.stack(seen) == tokens)
    assert capped > 0.9 if tokens == 21 else capped < 0.1  # by chance, unless there is a cap


def test_a_hash_is_the_signs_of_the_key_less_the_mean_also_of_tokens_that_left_the_window() -> None:
    data = case(90, 12)
    state, store = started(MagicPIG(Budget(sink=3, window=6, tokens=21, ratio=None), bits=5, tables=7), data)
    for step in range(12):
        append(state, store, data, step)
    assert state.hashes is not None
    keys = data.keys[:, :, 3 : 102 - 6].double().numpy()
    mean = data.keys[:, :, 3 : 90 - 6].double().numpy().mean(2, keepdims=True)  # of the prompt
    products = np.einsum("bhsd,hdn->bhsn", keys - mean, state.projections.double().numpy())
    expected = ((products > 0).reshape(2, 2, 93, 7, 5) * 2 ** np.arange(5)).sum(-1)
    certain = (np.abs(products) > 1e-4).reshape(2, 2, 93, 7, 5).all(-1)
    assert state.hashes.view().shape == (2, 2, 93, 7)
    assert (state.hashes.view().numpy() == expected)[certain].all()
    assert certain.mean() > 0.99


def test_equal_directions_are_always_sampled_and_count_once() -> None:
    """Keys that differ from their mean in the direction of the query have p = 1, so the result is full attention over
    them."""
    data = case(90, 1, group=1, batch=1)
    direction = data.q[:, :, :1, 90].expand(-1, -1, 91, -1).reshape(1, 2, 91, 16)
    sign = torch.where(torch.arange(91) % 2 == 0, 1.0, -1.0)[:, None]
    data.keys = direction * sign
    state, store = started(MagicPIG(WIDE), data)
    selection = state.select(append(state, store, data, 0), store)
    assert selection.visible is not None
    assert selection.log_weights is not None
    tokens = tokens_of(selection, store)[0, :, 3:-6]
    middle = slice(3, -6)
    assert torch.equal(selection.visible[0, :, 0, middle], tokens % 2 == 0)
    assert (selection.log_weights[0, :, 0, middle][tokens % 2 == 0].abs() < 1e-2).all()  # float32 angles near 0


def test_projections_differ_by_layer_head_and_seed() -> None:
    geometry = case(4, 1).geometry
    first = MagicPIG().layer(geometry)
    assert isinstance(first, MagicPIGState)
    assert not torch.equal(first.projections[0], first.projections[1])
    other = MagicPIG(seed=1).layer(geometry)
    assert isinstance(other, MagicPIGState)
    assert not torch.equal(first.projections, other.projections)


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 16}, {"tables": 1}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="bits from 1 to 15 and at least 2 tables"):
        MagicPIG(**options)
