"""Selection in one call, and attention over the first of the given rows: reference and compiled backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels import cpu, reference
from pqbench.kernels.backend import Kernels
from pqbench.kernels.number import Number
from tests.support import softmax

BACKENDS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]


@dataclass(frozen=True)
class Case:
    """A selection whose codes are a view of a larger buffer, which holds further codes."""

    batch: int
    heads: int
    sink: int
    top_k: int
    middle: int
    window: int
    spare: int
    seed: int

    @property
    def length(self) -> int:
        return self.sink + self.middle + self.window

    @property
    def used(self) -> int:
        return self.sink + min(self.top_k, self.middle) + self.window

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, float]:
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.batch, self.heads, 3, 32, generator=generator)
        codebook = torch.randn(self.batch, self.heads, 2, 4, 16, generator=generator)
        codes = torch.randint(4, (self.batch, self.heads, self.middle + self.spare + 5, 2), generator=generator)
        return q, codebook, codes.to(torch.uint8)[:, :, 2 : self.middle + self.spare + 2], 0.2


small = st.integers(0, 9)
cases = st.builds(
    Case,
    st.integers(1, 2),
    st.integers(1, 3),
    small,
    st.integers(0, 60),
    st.integers(0, 50),
    st.integers(1, 9),
    small,
    st.integers(0, 999),
)


def brute_force(case: Case) -> np.ndarray:
    """Rows ``[B, H, used]`` by sorting (probability, index) in Python. The probabilities are those of the reference, so
    that ties are the same."""
    q, codebook, codes, scaling = case.inputs
    rows = []
    for scores in reference.pq_probabilities(q, codebook, codes[:, :, : case.middle], scaling).flatten(0, 1).tolist():
        best = sorted(range(case.middle), key=lambda i: (-scores[i], i))[: case.top_k]
        middle = sorted(case.sink + i for i in best)
        rows.append([*range(case.sink), *middle, *range(case.sink + case.middle, case.length)])
    return np.array(rows, dtype=np.int64).reshape(case.batch, case.heads, case.used)


def numbers(case: Case, tensors: bool) -> tuple[Number, Number, Number, Number]:
    def number(value: int) -> Number:
        return torch.tensor([value], dtype=torch.int32) if tensors else value

    return number(case.sink), number(case.top_k), number(case.length), number(case.middle)


@given(cases, small, st.booleans())
def test_a_selection_is_sinks_the_best_of_the_middle_and_the_window(case: Case, more: int, tensors: bool) -> None:
    room = case.used + more
    found = reference.pq_select(*case.inputs, *numbers(case, tensors), room)
    assert found.dtype == torch.int64
    assert found.shape == (case.batch, case.heads, room)
    assert np.array_equal(found[:, :, : case.used].numpy(), brute_force(case))


@given(cases, small, st.booleans())
def test_the_compiled_body_selects_by_its_own_probabilities(case: Case, more: int, tensors: bool) -> None:
    """Tokens with equal codes are ties in every backend. Other tokens may change places if probabilities are nearly
    equal."""
    q, codebook, codes, scaling = case.inputs
    room = case.used + more
    found = cpu.pq_select(q, codebook, codes, scaling, *numbers(case, tensors), room)[:, :, : case.used]
    top = cpu.top_k(cpu.pq_probabilities(q, codebook, codes[:, :, : case.middle], scaling), case.top_k)
    assert torch.equal(found[:, :, case.sink : case.sink + top.shape[2]], top + case.sink)
    expected = torch.from_numpy(brute_force(case))
    outside = [*range(case.sink), *range(case.sink + top.shape[2], case.used)]
    assert torch.equal(found[:, :, outside], expected[:, :, outside])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
def test_heads_that_are_not_set_keep_their_middle(backend: Kernels, kind: torch.dtype) -> None:
    case = Case(batch=2, heads=3, sink=2, top_k=6, middle=40, window=4, spare=3, seed=1)
    whole = backend.pq_select(*case.inputs, *numbers(case, False), case.used + 2)
    only = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(kind)
    out = torch.full((2, 3, case.used + 2), -7)
    found = backend.pq_select(*case.inputs, *numbers(case, False), case.used + 2, only, out)
    assert found.data_ptr() == out.data_ptr()
    middle = slice(case.sink, case.sink + case.top_k)
    for i in range(2):
        for j in range(3):
            assert out[i, j, middle].tolist() == (whole[i, j, middle].tolist() if only[i, j] else [-7] * case.top_k)
    assert torch.equal(out[:, :, : case.sink], whole[:, :, : case.sink])
    ends = slice(case.sink + case.top_k, case.used)
    assert torch.equal(out[:, :, ends], whole[:, :, ends])


@pytest.mark.parametrize("backend", BACKENDS)
def test_selections_that_cannot_be_are_refused(backend: Kernels) -> None:
    case = Case(batch=1, heads=2, sink=2, top_k=6, middle=40, window=4, spare=3, seed=1)
    inputs, right = case.inputs, (2, 6, 46, 40)
    with pytest.raises(ValueError, match="room for 11 tokens does not hold the 12 selected"):
        backend.pq_select(*inputs, *right, 11)
    with pytest.raises(ValueError, match="a middle of 44 tokens after 2 sinks does not fit 50 tokens and 43 codes"):
        backend.pq_select(*inputs, 2, 6, 50, 44, 20)
    with pytest.raises(ValueError, match="does not fit 41 tokens"):
        backend.pq_select(*inputs, 2, 6, 41, 40, 20)
    with pytest.raises(ValueError, match="pass out as well"):
        backend.pq_select(*inputs, *right, 12, only=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"out must be int64 \(1, 2, 12\)"):
        backend.pq_select(*inputs, *right, 12, out=torch.empty(1, 2, 13, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", [int, lambda n: torch.tensor([n], dtype=torch.int32)], ids=["int", "tensor"])
@pytest.mark.parametrize("given_rows", [True, False])
def test_rows_behind_the_count_may_hold_anything(backend: Kernels, by: type, given_rows: bool) -> None:
    """Compared with float64 over the counted rows; the others are NaN or have invalid indices."""
    generator = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(2, 2, n, 32, generator=generator) for n in (3, 50, 50))
    count, total = 13, 21 if given_rows else 50
    indices = torch.rand(2, 2, 50, generator=generator).argsort(-1)[..., :total] if given_rows else None
    visible = torch.rand(2, 2, 3, total, generator=generator) > 0.4
    visible[..., 0] = True
    added = torch.randn(2, 2, 3, total, generator=generator)
    rows = torch.arange(50).expand(2, 2, -1) if indices is None else indices
    rows = rows[..., :count, None].expand(-1, -1, -1, 32)
    logits = (q.double() @ keys.gather(2, rows).double().transpose(2, 3) * 0.3).numpy() + added[..., :count].numpy()
    logits[~visible[..., :count].numpy()] = -np.inf
    expected = softmax(logits)
    mean = expected @ values.gather(2, rows).double().numpy()
    if indices is None:
        keys[:, :, count:], values[:, :, count:] = torch.nan, torch.nan
    else:
        indices[..., count:] = 1 << 40
    added[..., count:] = torch.nan
    output, lse, weights = backend.attention(q, keys, values, 0.3, indices, visible, True, added, by(count))
    assert np.allclose(output.numpy(), mean, atol=1e-5)
    assert np.allclose(lse.numpy(), np.log(np.exp(logits).sum(-1)), atol=1e-5)
    assert weights is not None
    assert np.allclose(weights[..., :count].numpy(), expected, atol=1e-6)
    assert bool((weights[..., count:] == 0).all())
    if indices is None:
        plain = softmax((q.double() @ keys[:, :, :count].double().transpose(2, 3) * 0.3).numpy())
        dense = backend.dense_attention(q, keys, values, 0.3, by(count))
        assert np.allclose(dense.numpy(), plain @ values[:, :, :count].double().numpy(), atol=1e-5)
