"""Compiled K-Means and codes against brute force in float64, the reference and scikit-learn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from pqbench.kernels import cpu, reference

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 150),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 40),
    st.sampled_from([1, 4, 8, 12, 19]),
    st.integers(0, 999),
)
Size = tuple[int, int, int, int, int, int, int]


def made(batch: int, heads: int, count: int, dims: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys ``[B, H, S, D]``, every second row of a larger buffer."""
    storage = torch.randn(batch, heads, count + 3, 2, dims, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return storage[:, :, :count, 1]


def distances(keys: Tensor, codebook: Tensor) -> np.ndarray:
    """Squared distances ``[B, H, S, m, K]`` in float64, from differences and not from the expansion that the kernel
    uses."""
    batch, heads, count, _ = keys.shape
    parts, width = codebook.shape[2], codebook.shape[4]
    points = keys.double().numpy().reshape(batch, heads, count, parts, 1, width)
    centroids = codebook.double().numpy()[:, :, None]  # [B, H, 1, m, K, D/m]
    return ((points - centroids) ** 2).sum(-1)


def assert_nearest(keys: Tensor, codebook: Tensor, codes: Tensor) -> None:
    every = distances(keys, codebook)
    chosen = np.take_along_axis(every, codes.numpy()[..., None].astype(int), -1)[..., 0]
    assert np.allclose(chosen, every.min(-1), atol=1e-5 * max(1.0, float(keys.float().abs().max()) ** 2))


def error(keys: Tensor, codebook: Tensor, codes: Tensor) -> np.ndarray:
    """The sum of squared errors of each problem ``[B, H, m]``."""
    every = distances(keys, codebook)
    return np.take_along_axis(every, codes.numpy()[..., None].astype(int), -1)[..., 0].sum(2)


@given(sizes, st.sampled_from(DTYPES))
def test_encode_takes_the_nearest_centroid(size: Size, dtype: torch.dtype) -> None:
    batch, heads, count, parts, clusters, width, seed = size
    keys = made(batch, heads, count, parts * width, seed, dtype)
    codebook = torch.randn(batch, heads, parts, clusters, width, generator=torch.Generator().manual_seed(seed))
    codes = cpu.encode(keys, codebook)
    assert codes.dtype == reference.CODE
    assert codes.shape == (batch, heads, count, parts)
    assert_nearest(keys, codebook, codes)
    for first in (0, count - 1):  # one row at a time is what decoding asks for
        assert torch.equal(cpu.encode(keys[:, :, first : first + 1], codebook), codes[:, :, first : first + 1])


def test_encode_takes_the_lowest_index_on_ties() -> None:
    codebook = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).repeat(10, 1)[None, None, None]
    keys = made(1, 1, 300, 16, 1)
    codes = cpu.encode(keys, codebook)
    assert int(codes.max()) < 20  # the other nine copies are never first
    assert_nearest(keys, codebook, codes)
    assert cpu.encode(keys, torch.zeros(1, 1, 1, 256, 16)).unique().tolist() == [0]


def test_256_centroids_fit_a_byte() -> None:
    keys = torch.arange(256.0)[None, None, :, None].repeat(1, 1, 1, 16)
    assert cpu.encode(keys, keys[:, :, None])[0, 0, :, 0].tolist() == list(range(256))


@given(sizes, st.sampled_from(DTYPES), st.integers(0, 6), st.sampled_from([None, 1, 30, 60, 1000]))
def test_training_is_that_of_the_reference(size: Size, dtype: torch.dtype, iterations: int, sample: int | None) -> None:
    """Both draw the same rows and follow the same rules, so centroids agree, except where rounding decides for a point
    between two centroids."""
    batch, heads, count, parts, clusters, width, seed = size
    keys = made(batch, heads, max(count, clusters), parts * width, seed, dtype)
    codebook, codes = cpu.train_codebook(keys, parts, clusters, iterations, seed, sample)
    theirs, their_codes = reference.train_codebook(keys, parts, clusters, iterations, seed, sample)
    assert codebook.shape == theirs.shape
    assert codes.shape == their_codes.shape
    assert (codebook.dtype, codes.dtype) == (torch.float32, reference.CODE)
    assert_nearest(keys, codebook, codes)
    same = (codes == their_codes).all(2).flatten()  # per problem [B, H, m]
    assert float(same.float().mean()) >= 0.5
    assert torch.allclose(codebook.flatten(0, 2)[same], theirs.flatten(0, 2)[same], atol=1e-4)
    assert np.allclose(error(keys, codebook, codes), error(keys, theirs, their_codes), rtol=0.1, atol=1e-3)


def test_training_equals_scikit_learn_from_the_same_start() -> None:
    keys = made(1, 2, 400, 12)
    start, _ = cpu.train_codebook(keys, 2, 8, 0, seed=5)
    codebook, codes = cpu.train_codebook(keys, 2, 8, 200, seed=5)
    for head in range(2):
        for part in range(2):
            points = keys[0, head, :, part * 6 : part * 6 + 6].numpy()
            theirs = KMeans(8, init=start[0, head, part].numpy(), n_init=1, max_iter=200, tol=0).fit(points)
            assert np.allclose(codebook[0, head, part].numpy(), theirs.cluster_centers_, atol=1e-4)
            assert np.array_equal(codes[0, head, :, part].numpy(), theirs.labels_)


def test_error_never_rises() -> None:
    keys = made(1, 3, 500, 32)
    errors = np.stack([error(keys, *cpu.train_codebook(keys, 2, 16, count, seed=3)) for count in range(8)])
    assert (np.diff(errors, axis=0) <= 1e-6 * errors[0]).all()
    assert (errors[-1] < 0.9 * errors[0]).all()


def test_duplicates_and_empty_clusters_keep_their_centroid() -> None:
    """With four distinct keys for 16 centroids at most four clusters have points; the other centroids do not move."""
    keys = made(1, 2, 4, 16)[:, :, torch.arange(100) % 4]
    start, _ = cpu.train_codebook(keys, 1, 16, 0, seed=1)
    codebook, codes = cpu.train_codebook(keys, 1, 16, 10, seed=1)
    assert torch.allclose(codebook, start, atol=1e-5)
    assert len(codes[0, 0, :, 0].unique()) <= 4
    theirs, their_codes = reference.train_codebook(keys, 1, 16, 10, 1)
    assert torch.allclose(codebook, theirs, atol=1e-5)
    assert torch.equal(codes, their_codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_cluster_is_the_mean_and_as_many_as_keys_are_the_keys(dtype: torch.dtype) -> None:
    keys = made(2, 2, 50, 16, dtype=dtype)
    codebook, codes = cpu.train_codebook(keys, 2, 1, 3, seed=0)
    assert torch.allclose(codebook[:, :, :, 0].flatten(2), keys.float().mean(2), atol=1e-5)
    assert int(codes.max()) == 0
    codebook, codes = cpu.train_codebook(keys, 1, 50, 3, seed=0)
    for b, h in np.ndindex(2, 2):
        assert torch.equal(codebook[b, h, 0, codes[b, h, :, 0].long()], keys[b, h].float())
    with pytest.raises(ValueError, match="51 centroids"):
        cpu.train_codebook(keys, 1, 51, 3, seed=0)


def test_settled_problems_stop_and_others_go_on() -> None:
    keys = torch.cat([made(1, 2, 300, 8, 1), made(1, 1, 300, 8, 2).round()], 1)
    codebook, codes = cpu.train_codebook(keys, 1, 8, 100, seed=2)
    for head in range(3):
        alone = cpu.train_codebook(keys[:, head : head + 1], 1, 8, 100, seed=2)
        assert torch.equal(alone[0], codebook[:, head : head + 1])
        assert torch.equal(alone[1], codes[:, head : head + 1])
    again = cpu.train_codebook(keys, 1, 8, 1000, seed=2)
    assert torch.equal(again[0], codebook)  # settled


@pytest.mark.parametrize("iterations", [2, 4, 7, 40])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.1])
def test_few_points_per_centroid_and_an_early_stop_are_the_references(iterations: int, kept: float) -> None:
    """With few keys per centroid, few centroids move after the first iterations, and the compiled search skips the
    others."""
    keys = made(1, 3, 800, 32)
    codebook, codes = cpu.train_codebook(keys, 2, 200, iterations, 3, tolerance=kept)
    theirs, their_codes = reference.train_codebook(keys, 2, 200, iterations, 3, tolerance=kept)
    assert torch.allclose(codebook, theirs, atol=1e-5)
    assert torch.equal(codes, their_codes)
    assert torch.equal(codes, cpu.encode(keys, codebook))


def test_an_early_stop_is_the_first_step_that_changes_few_codes() -> None:
    points = made(1, 1, 600, 8)[0]
    steps = [reference.kmeans(points, 24, n, 0) for n in range(30)]
    changes = [float((after[1] != before[1]).float().mean()) for before, after in pairwise(steps)]
    for tolerance in (0.2, 0.05, 0.01, 0.0):
        wanted = next(n for n, change in enumerate(changes, 1) if change <= tolerance)
        centroids, codes = reference.kmeans(points, 24, 100, 0, tolerance=tolerance)
        assert torch.equal(codes, steps[wanted][1])
        assert torch.equal(centroids, steps[wanted][0])


def test_a_sample_reaches_nearly_the_same_error() -> None:
    centres = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)) * 2
    picks = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(1))
    keys = (centres[picks] + made(1, 1, 4000, 16)[0, 0])[None, None]
    whole = error(keys, *cpu.train_codebook(keys, 1, 16, 10, seed=0)).sum()
    part = error(keys, *cpu.train_codebook(keys, 1, 16, 10, seed=0, sample=1600)).sum()
    assert part < 1.05 * whole


def test_huge_and_tiny_keys() -> None:
    for factor in (1e-15, 1e15):
        keys = made(1, 1, 200, 16) * factor
        codebook, codes = cpu.train_codebook(keys, 2, 8, 5, seed=0)
        plain, plain_codes = cpu.train_codebook(keys / factor, 2, 8, 5, seed=0)
        assert torch.allclose(codebook / factor, plain, atol=1e-4)
        assert float((codes == plain_codes).float().mean()) > 0.99


@pytest.mark.parametrize("sample", [None, 700])
def test_results_do_not_depend_on_the_number_of_threads(sample: int | None) -> None:
    keys = made(2, 3, 3000, 32)
    results = []
    before = numba.get_num_threads()
    for count in (1, 2):
        cpu.use_threads(count)
        codebook, codes = cpu.train_codebook(keys, 2, 32, 5, 0, sample)
        results.append((codebook, codes, cpu.encode(keys, codebook)))
    cpu.use_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert torch.equal(results[0][1], results[0][2])


def test_training_in_the_background_while_torch_computes() -> None:
    keys, x = made(1, 4, 6000, 64), torch.randn(300, 300)
    expected, product = cpu.train_codebook(keys, 2, 32, 5, 0), x @ x
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            future = pool.submit(cpu.train_codebook, keys, 2, 32, 5, 0)
            while not future.done():
                assert torch.equal(x @ x, product)
                assert torch.equal(cpu.encode(keys[:, :, :50], expected[0]), expected[1][:, :, :50])
            assert all(torch.equal(a, b) for a, b in zip(future.result(), expected, strict=True))


def test_threads_are_those_of_the_calling_thread() -> None:
    before, seen = numba.get_num_threads(), []

    def other() -> None:
        cpu.use_threads(1)
        cpu.train_codebook(made(1, 2, 500, 32), 2, 16, 2, 0)
        seen.append(numba.get_num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [1]
    assert numba.get_num_threads() == before
