"""Compiled product-quantised scores and top-k against the reference and float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels import cpu, reference
from tests.support import softmax

sizes = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 16),
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.sampled_from([1, 3, 16, 64, 256]),
    st.integers(0, 999),
)
Size = tuple[int, int, int, int, int, int, int]


def made(size: Size, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, G, D]``, codebook ``[B, H, m, K, D/m]``, and codes ``[B, H, S, m]`` as a view of a larger
    buffer."""
    batch, heads, group, count, parts, clusters, seed = size
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, group, parts * width, generator=generator)
    codebook = torch.randn(batch, heads, parts, clusters, width, generator=generator)
    codes = torch.randint(clusters, (batch, heads, count + 7, parts), generator=generator).to(torch.uint8)
    return q, codebook, codes[:, :, 2 : count + 2]


def exact(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> np.ndarray:
    """Softmax summed over the query group, in float64, from reconstructed keys."""
    parts = range(codebook.shape[2])
    index = codes.long()[..., None].expand(*codes.shape, codebook.shape[4])  # [B, H, S, m, D/m]
    keys = torch.cat([codebook[:, :, j].gather(2, index[:, :, :, j]) for j in parts], -1)  # [B, H, S, D]
    scores = (q.double() @ keys.double().transpose(2, 3) * scaling).numpy()
    return softmax(scores).sum(2)


@given(sizes, st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_probabilities_equal_float64(size: Size, scaling: float) -> None:
    q, codebook, codes = made(size)
    ours = cpu.pq_probabilities(q, codebook, codes, scaling)
    assert ours.dtype == torch.float32
    assert np.allclose(ours.numpy(), exact(q, codebook, codes, scaling), atol=1e-6, rtol=2e-4)
    assert torch.allclose(ours, reference.pq_probabilities(q, codebook, codes, scaling), atol=1e-6, rtol=2e-4)


@given(sizes, st.sampled_from([30.0, 100.0, 1000.0]))
def test_sharp_scores(size: Size, scaling: float) -> None:
    """Scores differ by hundreds to thousands: nothing overflows, no sum is zero, and tiny values keep their order."""
    q, codebook, codes = made(size)
    ours = cpu.pq_probabilities(q, codebook, codes, scaling)
    theirs = exact(q, codebook, codes, scaling)
    assert np.allclose(ours.numpy(), theirs, atol=1e-6, rtol=scaling * 1e-4)  # rounding of the scores themselves
    small = theirs > 1e-36  # what float32 can say
    assert np.allclose(np.log(ours.numpy()[small]), np.log(theirs[small]), atol=scaling * 1e-4)


def test_best_token_far_below_the_best_of_every_subspace() -> None:
    """The table of each sub-space has an entry that is 400 above the entries of all tokens."""
    q = torch.ones(1, 1, 2, 2)
    codebook = torch.tensor([[0.0, -400.0, -401.0], [0.0, -400.0, -402.0]])[None, None, :, :, None]
    codes = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2], [1, 1]], dtype=torch.uint8)[None, None]
    ours = cpu.pq_probabilities(q, codebook, codes, 1.0)[0, 0].double().numpy()
    expected = 2 * softmax(np.array([-400.0, -400.0, -401.0, -402.0, -800.0]))
    assert np.allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("clusters", [16, 256])
def test_many_tokens_in_several_parts(clusters: int) -> None:
    size = (1, 2, 5, 20000, 2, clusters, 5)
    q, codebook, codes = made(size, width=8)
    ours = cpu.pq_probabilities(q, codebook, codes, 0.7)
    expected = exact(q, codebook, codes, 0.7)
    assert np.allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-9)
    assert torch.allclose(ours.double().sum(-1), torch.tensor(5.0).double(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_any_type(dtype: torch.dtype) -> None:
    q, codebook, codes = made((2, 2, 3, 50, 2, 16, 1))
    ours = cpu.pq_probabilities(q.to(dtype), codebook, codes, 0.5)
    assert np.allclose(ours.numpy(), exact(q.to(dtype), codebook, codes, 0.5), atol=1e-6, rtol=2e-4)


def test_nan_in_a_query_is_not_hidden() -> None:
    q, codebook, codes = made((1, 2, 3, 50, 2, 16, 1))
    q[0, 1, 2, 0] = torch.nan
    ours = cpu.pq_probabilities(q, codebook, codes, 0.5)
    assert bool(ours[0, 1].isnan().all())
    assert not bool(ours[0, 0].isnan().any())


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, np.inf, -np.inf, np.nan, 3e38, 0.5, 0.25])
scores = st.lists(st.one_of(special, st.floats(width=32), st.floats(0, 1, width=32)), min_size=1, max_size=60)


@given(scores, st.integers(-1, 62))
def test_top_k_of_any_floats(numbers: list[float], count: int) -> None:
    row = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(cpu.top_k(row, count), reference.top_k(row, count))


@given(st.integers(2, 700), st.data(), st.integers(0, 999), st.sampled_from([1, 4, 40, 10**6]))
def test_top_k_against_sorting(total: int, data: st.DataObject, seed: int, levels: int) -> None:
    """Few distinct values give many ties, in which the lower index wins."""
    count = data.draw(st.integers(1, total))
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(2, 3, total, generator=generator) * levels).round() / levels
    expected = np.sort(np.argsort(-rows.numpy(), -1, kind="stable")[..., :count], -1)
    ours = cpu.top_k(rows, count)
    assert ours.dtype == torch.int64
    assert np.array_equal(ours.numpy(), expected)
    assert torch.equal(ours, reference.top_k(rows, count))


@pytest.mark.parametrize("count", [1, 1000, 50000, 99999])
def test_top_k_of_long_rows(count: int) -> None:
    rows = torch.rand(2, 100000, generator=torch.Generator().manual_seed(0)).pow(20)
    rows[1] = rows[1].round(decimals=2)
    assert torch.equal(cpu.top_k(rows, count), reference.top_k(rows, count))


def test_top_k_of_views_and_other_types() -> None:
    rows = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.top_k(rows.transpose(1, 2), 7), reference.top_k(rows.transpose(1, 2), 7))
    assert torch.equal(cpu.top_k(rows.double(), 2), reference.top_k(rows.double(), 2))
    assert cpu.top_k(torch.empty(2, 0, 5), 3).shape == (2, 0, 3)


def test_all_scores_equal() -> None:
    for value in (0.0, -0.0, 2.5, -torch.inf, torch.inf, torch.nan):
        assert cpu.top_k(torch.full((2, 100), value), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    q, codebook, codes = made((2, 3, 6, 20000, 4, 64, 9))
    results = []
    before = numba.get_num_threads()
    for count in (1, 2):
        cpu.use_threads(count)
        results.append(cpu.pq_probabilities(q, codebook, codes, 0.8))
    cpu.use_threads(before)
    assert torch.equal(*results)


def test_two_python_threads_at_once() -> None:
    cases = [made((1, 3, 4, 9000, 2, 64, seed)) for seed in range(2)]

    def chosen(case: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, codebook, codes = case
        return cpu.top_k(cpu.pq_probabilities(q, codebook, codes, 0.8), 100)

    alone = [chosen(case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            together = list(pool.map(chosen, cases))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
