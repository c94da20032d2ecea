"""Attention, top-k, H2O's column sums and rotation against SDPA, full matrices and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pqbench.kernels import reference
from tests.support import softmax, turned

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 999))
FREQUENCIES = 10000.0 ** (-torch.arange(8) / 8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal_matrix(q: Tensor, keys: Tensor, scaling: float, band: int | None) -> np.ndarray:
    """Probabilities ``[B, H, G, n, S]`` of the last n queries, as one whole matrix."""
    count, total = q.shape[3], keys.shape[2]
    logits = np.einsum("bhgnd,bhsd->bhgns", q.double().numpy(), keys.double().numpy()) * scaling
    for i in range(count):
        for j in range(total):
            position = total - count + i
            if j > position or (band is not None and position - j >= band):
                logits[..., i, j] = -np.inf
    return softmax(logits)


@given(sizes)
def test_sparse_attention_equals_sdpa(size: tuple[int, int, int, int, int]) -> None:
    batch, heads, group, count, seed = size
    q = normal(batch, heads, group, 8, seed=seed)
    keys, values = normal(batch, heads, count, 8, seed=seed + 1), normal(batch, heads, count, 8, seed=seed + 2)
    output, lse, weights = reference.attention(q, keys, values, 0.3, need_weights=True)
    assert weights is not None
    expected = functional.scaled_dot_product_attention(q, keys, values, scale=0.3)
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), keys.double().numpy()) * 0.3
    assert torch.allclose(output, expected, atol=1e-5)
    assert np.allclose(lse.numpy(), logsumexp(logits, -1), atol=1e-5)
    assert np.allclose(weights.numpy(), softmax(logits), atol=1e-5)
    assert torch.allclose(reference.dense_attention(q, keys, values, 0.3), expected, atol=1e-5)


def test_visible_hides_rows_per_query_head() -> None:
    q, keys, values = normal(1, 2, 2, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 8, seed=2)
    visible = torch.rand(1, 2, 2, 6, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[..., 0] = True
    output, lse, weights = reference.attention(q, keys, values, 0.3, None, visible, True)
    assert weights is not None
    for h in range(2):
        for g in range(2):
            seen = visible[0, h, g]
            alone = reference.attention(
                q[:, h : h + 1, g : g + 1], keys[:, h : h + 1, seen], values[:, h : h + 1, seen], 0.3
            )
            assert torch.allclose(output[0, h, g], alone[0][0, 0, 0], atol=1e-6)
            assert torch.allclose(lse[0, h, g], alone[1][0, 0, 0], atol=1e-6)
            assert float(weights[0, h, g, ~seen].sum()) == 0


def test_a_row_with_a_weight_counts_as_so_many_rows() -> None:
    q, keys, values = normal(1, 1, 2, 8), normal(1, 1, 6, 8, seed=1), normal(1, 1, 6, 8, seed=2)
    counts = torch.tensor([[1, 3, 2, 1, 5, 1], [2, 1, 1, 4, 1, 1]])  # of each query head
    log_weights = counts.float().log()[None, None]
    output, lse, weights = reference.attention(q, keys, values, 0.3, None, None, True, log_weights)
    assert weights is not None
    for g in range(2):
        repeated = torch.arange(6).repeat_interleave(counts[g])
        alone = reference.attention(
            q[:, :, g : g + 1], keys[:, :, repeated], values[:, :, repeated], 0.3, None, None, True
        )
        assert torch.allclose(output[0, 0, g], alone[0][0, 0, 0], atol=1e-6)
        assert torch.allclose(lse[0, 0, g], alone[1][0, 0, 0], atol=1e-6)
        assert alone[2] is not None
        for row in range(6):
            assert torch.allclose(weights[0, 0, g, row], alone[2][0, 0, 0, repeated == row].sum(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_type_of_the_query(dtype: torch.dtype) -> None:
    q, keys = normal(1, 1, 1, 4).to(dtype), normal(1, 1, 3, 4).to(dtype)
    output, lse, weights = reference.attention(q, keys, keys, 0.5, need_weights=True)
    assert weights is not None
    assert (output.dtype, lse.dtype, weights.dtype) == (dtype, torch.float32, torch.float32)
    assert reference.merge(output, lse, keys[:, :, :1], lse).dtype == dtype


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 30), st.integers(0, 999))
def test_merge_is_one_softmax_over_the_union(first: int, second: int, sharpness: float, seed: int) -> None:
    q = normal(2, 2, 2, 8, seed=seed) * sharpness
    keys, values = normal(2, 2, first + second, 8, seed=seed + 1), normal(2, 2, first + second, 8, seed=seed + 2)
    output, lse, _ = reference.attention(q, keys[:, :, :first], values[:, :, :first], 0.3)
    rest, rest_lse, _ = reference.attention(q, keys[:, :, first:], values[:, :, first:], 0.3)
    whole = functional.scaled_dot_product_attention(q, keys, values, scale=0.3)
    assert torch.allclose(reference.merge(output, lse, rest, rest_lse), whole, atol=1e-4)


def test_merge_with_nothing_and_with_everything() -> None:
    output, value, lse = normal(1, 1, 2, 4), normal(1, 1, 2, 4, seed=1), torch.tensor([[[0.0, 50.0]]])
    assert torch.equal(reference.merge(output, lse, value, torch.full_like(lse, -torch.inf)), output)
    assert torch.equal(reference.merge(output, lse, value, torch.full_like(lse, torch.inf)), value)


@given(sizes)
def test_group_probabilities(size: tuple[int, int, int, int, int]) -> None:
    batch, heads, group, count, seed = size
    scores = normal(batch, heads, group, count, seed=seed) * 5
    result = reference.group_probabilities(scores)
    assert np.allclose(result.numpy(), softmax(scores.double().numpy()).sum(2), atol=1e-5)
    assert torch.allclose(result.sum(-1), torch.tensor(float(group)))


@given(st.integers(1, 30), st.integers(0, 35), st.integers(0, 999))
def test_top_k_against_sorting(count: int, wanted: int, seed: int) -> None:
    scores = normal(2, 3, count, seed=seed)
    chosen = reference.top_k(scores, wanted)
    expected = np.argsort(-scores.numpy(), -1)[..., :wanted]
    assert np.array_equal(np.sort(chosen.numpy(), -1), np.sort(expected, -1))


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([None, 1, 2, 7, 100]),
    st.integers(1, 17),
    st.integers(0, 999),
)
def test_column_sums_equal_the_full_matrix(total: int, rows: int, band: int | None, block: int, seed: int) -> None:
    q, keys = normal(2, 2, 2, total, 8, seed=seed) * 2, normal(2, 2, total, 8, seed=seed + 1)
    expected = causal_matrix(q, keys, 0.4, band).sum((2, 3))  # [B, H, S]
    assert np.allclose(reference.column_sums(q, keys, 0.4, band, rows).numpy(), expected, atol=1e-4)
    assert np.allclose(expected.sum(-1), 2 * total)  # the probabilities of every query of every head add up to one
    sums = torch.zeros(2, 2, total)  # the sums of a chunked prefill are added
    for first in range(0, total, block):
        stop = min(total, first + block)
        sums[:, :, :stop] += reference.column_sums(q[:, :, :, first:stop], keys[:, :, :stop], 0.4, band, rows)
    assert np.allclose(sums.numpy(), expected, atol=1e-4)


def test_column_sums_do_not_saturate_in_half_precision() -> None:
    keys = torch.zeros(1, 1, 4096, 8, dtype=torch.float16)
    keys[:, :, 0] = 8
    q = torch.ones(1, 1, 1, 4096, 8, dtype=torch.float16)
    sums = reference.column_sums(q, keys, 1.0)
    assert sums.dtype == torch.float32
    assert float(sums[0, 0, 0]) == pytest.approx(4096, rel=1e-4)


@given(st.integers(-500, 500), st.integers(-500, 500), st.integers(0, 999))
def test_rotations_add_up(first: int, second: int, seed: int) -> None:
    x = normal(2, 3, 16, seed=seed)
    one, two = torch.full((2, 3), first), torch.full((2, 3), second)
    back = reference.rotate(reference.rotate(x, one, FREQUENCIES), -one, FREQUENCIES)
    both = reference.rotate(reference.rotate(x, one, FREQUENCIES), two, FREQUENCIES)
    assert torch.allclose(back, x, atol=1e-4)
    assert torch.allclose(both, reference.rotate(x, one + two, FREQUENCIES), atol=2e-4)
    expected = turned(x.double().numpy(), first, FREQUENCIES.double().numpy())
    assert np.allclose(reference.rotate(x, one, FREQUENCIES).numpy(), expected, atol=2e-4)


def test_rotation_is_that_of_transformers() -> None:
    x, positions = normal(1, 2, 9, 16), torch.arange(9) * 37
    angles = (positions[:, None] * FREQUENCIES).repeat(1, 2)[None]
    theirs, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    assert torch.allclose(reference.rotate(x, positions, FREQUENCIES), theirs, atol=1e-5)


def test_partial_rotation_leaves_the_rest_alone() -> None:
    x, positions = normal(1, 1, 4, 24), torch.arange(4)
    result = reference.rotate(x, positions, FREQUENCIES)
    assert torch.equal(result[..., 16:], x[..., 16:])
    assert torch.allclose(result[..., :16], reference.rotate(x[..., :16], positions, FREQUENCIES))


def test_rotation_depends_on_distance_alone() -> None:
    q, key = normal(16), normal(16, seed=1)

    def product(at: int, distance: int) -> Tensor:
        left = reference.rotate(q, torch.tensor(at), FREQUENCIES)
        return left @ reference.rotate(key, torch.tensor(at - distance), FREQUENCIES)

    assert torch.allclose(product(100, 7), product(30, 7), atol=1e-4)
