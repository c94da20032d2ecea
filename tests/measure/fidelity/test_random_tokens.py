"""Random tokens are uniform over the middle, without replacement, and the same in every run."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from methods.random_tokens import RandomTokens
from pqbench.method import Budget, Geometry
from tests.support import case, store_of

BUDGET = Budget(sink=2, window=3, tokens=15, ratio=None)


def tops(layer: int = 0, seed: int = 0, length: int = 45, batch: int = 2) -> Tensor:
    """The selected middle tokens, ``[B, H, 10]``."""
    data = case(length, 0, batch=batch)
    geometry = Geometry(layer, batch, 2, 2, 16, 0.25, length)
    selection = RandomTokens(BUDGET, seed).layer(geometry).select(data.q[:, :, :, -1], store_of(data.keys, data.values))
    assert selection.indices is not None
    assert selection.indices[0, 0, :2].tolist() == [0, 1]
    assert selection.indices[0, 0, 12:].tolist() == [length - 3, length - 2, length - 1]
    return selection.indices[:, :, 2:12]


def test_it_repeats_itself_but_differs_between_layers_steps_heads_and_seeds() -> None:
    assert tops().equal(tops())
    assert tops()[0].equal(tops()[1])  # sequences of a batch are alike
    assert tops(batch=1)[0].equal(tops()[0])
    draws = [tops(), tops(layer=1), tops(length=46), tops(seed=1)]
    sets = [frozenset(draw[0, head].tolist()) for draw in draws for head in range(2)]
    assert len(set(sets)) == 8


def test_every_middle_token_is_as_likely() -> None:
    counts = np.zeros(45)
    for seed in range(400):
        chosen = tops(seed=seed, batch=1)[0]
        for head in range(2):
            assert len(set(chosen[head].tolist())) == 10
            counts[chosen[head].numpy()] += 1
    assert counts[[0, 1, 42, 43, 44]].sum() == 0
    expected = 800 * 10 / 40
    chi = ((counts[2:42] - expected) ** 2 / expected).sum()
    assert chi < 73  # 39 degrees of freedom: exceeded once in 1000
