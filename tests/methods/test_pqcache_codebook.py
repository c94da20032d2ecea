"""Maps of keys for product quantisation against their definitions in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.pqcache.codebook import KeyMap, dealt, key_map, query_aware, rotation
from methods.pqcache.queries import Moment, SeenQueries
from pqbench.kernels import reference
from tests.support import case

CPU = torch.device("cpu")


def anisotropic(count: int, width: int = 16, seed: int = 0, decay: float = 0.7) -> Tensor:
    """Vectors ``[2, 2, count, width]`` with standard deviations decay**i along directions that differ by head."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(2, 2, width, width, generator=generator, dtype=torch.float64))[0]
    scaled = torch.randn(2, 2, count, width, generator=generator, dtype=torch.float64) * decay ** torch.arange(width)
    return (3 * scaled @ turns).float()


def moment_of(q: Tensor) -> Tensor:
    """Mean of q q^T by numpy, ``[B, H, D, D]``."""
    x = q.double().numpy()
    return torch.from_numpy(np.einsum("bhnd,bhne->bhde", x, x) / x.shape[2])


@pytest.mark.parametrize("kind", ["plain", "centred", "rotated", "query_aware"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_products_are_preserved(kind: str, parts: int) -> None:
    q, keys = anisotropic(60), anisotropic(50, seed=1) + 2
    mapping = key_map(kind, keys, moment_of(q), parts, 0, CPU)
    mapped = mapping.queries(q) @ mapping.keys(keys).transpose(2, 3) + mapping.constant(q)[..., None]
    exact = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), keys.double().numpy())
    assert np.allclose(mapped.numpy(), exact, atol=1e-4)
    assert np.abs(exact).max() > 10


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_squared_error_is_the_expected_error_of_the_product(ridge: float) -> None:
    q, errors = anisotropic(80), anisotropic(30, seed=2, decay=0.95)
    mapped = query_aware(moment_of(q), 4, ridge).keys(errors).double().square().sum(-1).numpy()
    products = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), errors.double().numpy())
    mean_eigenvalue = np.square(q.double().numpy()).sum(-1).mean(-1) / 16  # trace / D
    regular = ridge * mean_eigenvalue[..., None] * np.square(errors.double().numpy()).sum(-1)
    assert np.allclose(mapped, np.square(products).mean(2) + regular, rtol=1e-4)


def test_few_queries_give_a_well_conditioned_map() -> None:
    """Three queries span only three of sixteen directions."""
    q, keys = anisotropic(3), anisotropic(50, seed=1)
    mapping = query_aware(moment_of(q), 2)
    assert mapping.forward is not None
    scales = np.linalg.svd(mapping.forward.double().numpy(), compute_uv=False)
    assert (scales.max(-1) ** 2 / scales.min(-1) ** 2 <= (16 / 1e-3 + 1) * 1.01).all()
    other = anisotropic(40, seed=5)  # any query, not only those learnt from
    mapped = mapping.queries(other) @ mapping.keys(keys).transpose(2, 3)
    exact = np.einsum("bhnd,bhsd->bhns", other.double().numpy(), keys.double().numpy())
    assert np.allclose(mapped.numpy(), exact, atol=1e-3)


def test_without_queries_only_the_order_changes() -> None:
    keys = anisotropic(20)
    mapped = query_aware(torch.zeros(2, 2, 16, 16), 4).keys(keys)
    assert np.allclose(mapped.abs().sort(-1).values.numpy(), keys.abs().sort(-1).values.numpy(), atol=1e-6)


@pytest.mark.parametrize(("width", "parts"), [(16, 1), (16, 2), (64, 2), (64, 4), (128, 8), (12, 4), (8, 8)])
def test_directions_are_dealt_evenly(width: int, parts: int) -> None:
    order = dealt(width, parts)
    assert sorted(order.tolist()) == list(range(width))
    ranks = order.view(parts, -1).sum(1)  # weights fall geometrically; this is the log of the product in each sub-space
    rounds = width // parts
    assert ranks.max() - ranks.min() <= (0 if rounds % 2 == 0 else parts - 1)


def test_heaviest_directions_go_to_different_subspaces() -> None:
    q = anisotropic(4000, decay=0.5)
    mapping = query_aware(moment_of(q), 4)
    assert mapping.forward is not None
    scales = mapping.forward.norm(dim=2).view(2, 2, 4, 4)  # of the mapped directions, by sub-space
    heaviest = scales.flatten(2).topk(4).indices // 4
    assert (heaviest.sort(-1).values == torch.arange(4)).all()


def test_rotations_are_rotations_and_fixed() -> None:
    turn = rotation(16, 3).double().numpy()
    assert np.allclose(turn @ turn.T, np.eye(16), atol=1e-6)
    assert np.array_equal(turn, rotation(16, 3).double().numpy())
    assert not np.allclose(turn, rotation(16, 4).double().numpy(), atol=0.1)


def test_centred_keys_have_no_mean_and_the_same_softmax() -> None:
    q, keys = anisotropic(10), anisotropic(50, seed=1) + 5
    mapping = key_map("centred", keys, torch.zeros(2, 2, 16, 16), 2, 0, CPU)
    centred = mapping.keys(keys)
    assert np.allclose(centred.mean(2).numpy(), 0, atol=1e-5)
    with_offset, without = (q @ k.transpose(2, 3) for k in (keys, centred))
    assert np.allclose(with_offset.softmax(-1).numpy(), without.softmax(-1).numpy(), atol=1e-4)


def test_query_aware_codes_estimate_products_better_than_plain_ones() -> None:
    """The keys vary most in directions that no query has."""
    q, keys = anisotropic(500, decay=0.6), anisotropic(600, seed=9, decay=0.98)
    exact = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), keys.double().numpy())
    errors = {}
    for kind in ("plain", "query_aware"):
        mapping = key_map(kind, keys, moment_of(q[:, :, :250]), 2, 0, CPU)
        codebook, codes = reference.train_codebook(mapping.keys(keys), 2, 64, 10, 0)
        estimate = reference.pq_scores(mapping.queries(q[:, :, 250:]), codebook, codes)  # queries it has not seen
        errors[kind] = float(np.square(estimate.double().numpy() - exact[:, :, 250:]).mean())
    assert errors["query_aware"] < 0.5 * errors["plain"]


@pytest.mark.parametrize("first", [0, 13, 39])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_seen_queries_do_not_depend_on_blocks(first: int, chunk: int) -> None:
    data = case(40, 0)
    seen = SeenQueries(data.geometry, first, kept=9)
    for start in range(0, 40, chunk):
        stop = min(40, start + chunk)
        seen.add(data.q[:, :, :, start:stop], stop - 1)
    x = data.q[:, :, :, first:].double().numpy()
    expected = np.einsum("bhgnd,bhgne->bhde", x, x) / (2 * (40 - first))
    assert np.allclose(seen.moment.mean().numpy(), expected, atol=1e-5)
    assert seen.recent is not None
    assert torch.equal(seen.recent, data.q[:, :, :, 31:])
    assert seen.last == 39


def test_nothing_seen_is_no_moment() -> None:
    assert not Moment(case(4, 0).geometry).mean().any()
    assert KeyMap().nbytes == 0
