"""K-Means and product quantisation against brute force, numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from pqbench.kernels import reference

shapes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.integers(0, 999))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_distances(points: Tensor, centroids: Tensor) -> np.ndarray:
    """Squared distances ``[P, N, K]`` in float64, from differences and not from the expansion that the kernel uses."""
    difference = points.double().numpy()[:, :, None] - centroids.double().numpy()[:, None]
    return (difference**2).sum(-1)


def error(points: Tensor, centroids: Tensor, codes: Tensor) -> np.ndarray:
    """Mean squared error of each problem."""
    return np.take_along_axis(squared_distances(points, centroids), codes.numpy()[..., None], 2).mean((1, 2))


@given(shapes)
def test_assign_is_the_nearest_centroid(shape: tuple[int, int, int, int, int]) -> None:
    problems, count, clusters, width, seed = shape
    points, centroids = normal(problems, count, width, seed=seed), normal(problems, clusters, width, seed=seed + 1)
    codes = reference.assign(points, centroids)
    distances = squared_distances(points, centroids)
    chosen = np.take_along_axis(distances, codes.numpy()[..., None], 2)[..., 0]
    assert np.allclose(chosen, distances.min(-1), atol=1e-5)
    gap = np.sort(distances, -1)[..., 1] - distances.min(-1) if clusters > 1 else np.full(chosen.shape, 1.0)
    assert (codes.numpy() == distances.argmin(-1))[gap > 1e-5].all()


def test_assign_takes_the_lowest_index_on_ties() -> None:
    points = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    centroids = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert reference.assign(points, centroids).tolist() == [[1, 3, 0]]


def test_assign_does_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = normal(3, 101, 5), normal(3, 7, 5, seed=1)
    whole = reference.assign(points, centroids)
    monkeypatch.setattr("pqbench.kernels.reference.operations._TILE", 3 * 7 * 10)
    assert torch.equal(reference.assign(points, centroids), whole)


@given(shapes)
def test_update_is_the_mean_of_each_cluster(shape: tuple[int, int, int, int, int]) -> None:
    problems, count, clusters, width, seed = shape
    points, centroids = normal(problems, count, width, seed=seed), normal(problems, clusters, width, seed=seed + 1)
    codes = torch.randint(clusters, (problems, count), generator=torch.Generator().manual_seed(seed))
    result = reference.update(points, codes, centroids)
    for p in range(problems):
        for k in range(clusters):
            mine = points[p, codes[p] == k]
            expected = mine.double().mean(0) if len(mine) else centroids[p, k].double()
            assert torch.allclose(result[p, k].double(), expected, atol=1e-5)


def test_kmeans_error_never_rises_and_codes_are_nearest() -> None:
    points = normal(4, 200, 8)
    errors = []
    for iterations in range(8):
        centroids, codes = reference.kmeans(points, 16, iterations, seed=3)
        assert np.array_equal(codes.numpy(), squared_distances(points, centroids).argmin(-1))
        errors.append(error(points, centroids, codes))
    assert (np.diff(np.stack(errors), axis=0) <= 1e-6).all()
    assert (errors[-1] < 0.9 * errors[0]).all()


def test_kmeans_starts_from_distinct_points_of_the_problem() -> None:
    points = normal(2, 50, 3)
    centroids, _ = reference.kmeans(points, 50, 0, seed=0)
    for p in range(2):
        assert sorted(map(tuple, centroids[p].tolist())) == sorted(map(tuple, points[p].tolist()))


def test_kmeans_equals_scikit_learn_from_the_same_start() -> None:
    points = normal(1, 300, 6)
    start, _ = reference.kmeans(points, 8, 0, seed=5)
    centroids, codes = reference.kmeans(points, 8, 200, seed=5)
    theirs = KMeans(8, init=start[0].numpy(), n_init=1, max_iter=200, tol=0, algorithm="lloyd").fit(points[0].numpy())
    assert np.allclose(centroids[0].numpy(), theirs.cluster_centers_, atol=1e-4)
    assert np.array_equal(codes[0].numpy(), theirs.labels_)


def test_kmeans_depends_on_the_seed_alone() -> None:
    points = normal(3, 120, 4)
    first = reference.kmeans(points, 8, 5, seed=1)
    torch.manual_seed(99)
    again, other = reference.kmeans(points, 8, 5, seed=1), reference.kmeans(points, 8, 5, seed=2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], other[0])


def test_a_problem_alone_equals_the_problem_in_a_batch() -> None:
    points = torch.cat([normal(3, 150, 4), normal(1, 150, 4).round()])  # the last settles earlier than the others
    centroids, codes = reference.kmeans(points, 8, 30, seed=1)
    for p in range(4):
        alone = reference.kmeans(points[p : p + 1], 8, 30, seed=1)
        assert torch.allclose(alone[0][0], centroids[p], atol=1e-5)
        assert torch.equal(alone[1][0], codes[p])


@given(st.sampled_from([1, 2, 4]), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_pq_score_is_the_product_with_the_reconstructed_key(
    m: int, count: int, heads: int, group: int, seed: int
) -> None:
    width, clusters = 8, 5
    q, keys = normal(2, heads, group, width, seed=seed), normal(2, heads, count, width, seed=seed + 1)
    codebook = normal(2, heads, m, clusters, width // m, seed=seed + 2)
    codes = reference.encode(keys, codebook)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, heads, count, m)
    scores = reference.pq_scores(q, codebook, codes)
    for b in range(2):
        for h in range(heads):
            for s in range(count):
                parts = [codebook[b, h, j, int(codes[b, h, s, j])] for j in range(m)]
                for j, part in enumerate(parts):
                    own = keys[b, h, s, j * width // m : (j + 1) * width // m]
                    every = (codebook[b, h, j] - own).square().sum(-1)
                    assert (part - own).square().sum() <= every.min() + 1e-5
                assert torch.allclose(scores[b, h, :, s], q[b, h] @ torch.cat(parts), atol=1e-4)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_few_distinct_subvectors_make_scores_exact(m: int) -> None:
    width, clusters, count = 16, 8, 200
    pool = normal(m, clusters, width // m)
    picks = torch.randint(clusters, (m, count), generator=torch.Generator().manual_seed(0))
    keys = torch.cat([pool[j, picks[j]] for j in range(m)], -1)[None, None]  # [1, 1, S, D]
    # K-Means starts from the distinct vectors, so each is its own cluster.
    codebook = pool[None, None]
    q = normal(1, 1, 3, width, seed=7)
    scores = reference.pq_scores(q, codebook, reference.encode(keys, codebook))
    assert torch.allclose(scores, q @ keys.transpose(2, 3), atol=1e-4)


def test_as_many_centroids_as_keys_make_scores_exact() -> None:
    keys, q = normal(2, 2, 64, 8), normal(2, 2, 2, 8, seed=1)
    centroids, codes = reference.kmeans(reference.subspaces(keys, 1), 64, 10, seed=0)
    scores = reference.pq_scores(q, centroids.view(2, 2, 1, 64, 8), codes.view(2, 2, 64, 1).to(reference.CODE))
    assert torch.allclose(scores, q @ keys.transpose(2, 3), atol=1e-4)


def test_256_centroids_fit_a_byte() -> None:
    keys = torch.arange(256.0)[None, None, :, None]
    codebook = torch.arange(256.0)[None, None, None, :, None]
    assert reference.encode(keys, codebook)[0, 0, :, 0].tolist() == list(range(256))


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.sampled_from([1, 2, 3, 6]))
def test_subspaces_are_slices_of_the_head_dimension(batch: int, heads: int, count: int, parts: int) -> None:
    x = normal(batch, heads, count, 12)
    split = reference.subspaces(x, parts).view(batch, heads, parts, count, 12 // parts)
    for j in range(parts):
        assert torch.equal(split[:, :, j], x[..., j * 12 // parts : (j + 1) * 12 // parts])
