"""Random numbers from a hash are the same in every backend, and random enough for a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pqbench.kernels import cpu, reference
from pqbench.kernels.sampling import draw_rest

CPU = torch.device("cpu")
SEEDS = [0, 1, 2**31, 2**32 + 7, 2**63 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_bodies_draw_the_same(seed: int) -> None:
    assert torch.equal(cpu.noise(3, 1001, seed, CPU), reference.noise(3, 1001, seed, CPU))
    assert cpu.noise(2, 0, seed, CPU).shape == (2, 0)


def test_the_definition_in_python() -> None:
    """The definition of one number with Python's integers."""

    def mixed(word: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word ^ (word >> 16)

    seed, head, token = 2**40 + 12345, 2, 77
    first = mixed(mixed(head + 0x9E3779B9) ^ (seed % 2**32))
    second = mixed((first + (seed >> 32)) % 2**32)
    word = mixed((mixed(token ^ first) + second) % 2**32)
    assert int(reference.noise(3, 78, seed, CPU)[head, token]) == (word if word < 2**31 else word - 2**32)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    """A good generator exceeds these bounds once in about ten thousand runs; the draws here are fixed."""
    distances = (1, 2, 4, 16, 128, 1024, 4096)
    for seed in range(20):
        numbers = reference.noise(8, 8192, seed, CPU).double().numpy() / 2**32 + 0.5
        assert min(stats.kstest(row, "uniform").pvalue for row in numbers) > 1e-6
        between = np.corrcoef(numbers) - np.eye(8)
        assert np.abs(between).max() * np.sqrt(8192) < 5
        for apart in distances:
            within = [np.corrcoef(row[:-apart], row[apart:])[0, 1] for row in numbers]
            assert np.abs(within).max() * np.sqrt(8192 - apart) < 5


def test_numbers_of_a_head_differ() -> None:
    assert len(torch.unique(cpu.noise(1, 131_072, 5, CPU))) == 131_072


def test_every_token_of_the_rest_is_drawn_as_often_as_the_others() -> None:
    """A chi-square test of the counts at every place of the order; selected tokens are never drawn."""
    selected, draws = torch.tensor([[[0, 7, 9, 20], [3, 4, 5, 6]]]), 2000
    counts = np.zeros((2, 24))
    firsts = np.zeros((2, 24))
    for seed in range(draws):
        drawn = draw_rest(selected, 24, 5, seed)[0].numpy()
        for head in range(2):
            counts[head, drawn[head]] += 1
            firsts[head, drawn[head][0]] += 1
    for head in range(2):
        rest = np.setdiff1d(np.arange(24), selected[0, head].numpy())
        assert counts[head, selected[0, head].numpy()].sum() == 0
        assert stats.chisquare(counts[head, rest]).pvalue > 1e-4
        assert stats.chisquare(firsts[head, rest]).pvalue > 1e-4


def test_all_of_the_rest_can_be_drawn() -> None:
    selected = torch.tensor([[[1, 2]], [[0, 5]]])
    drawn = draw_rest(selected, 6, 100, 3)
    assert drawn.sort(-1).values.tolist() == [[[0, 3, 4, 5]], [[1, 2, 3, 4]]]
