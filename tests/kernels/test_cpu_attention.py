"""Compiled attention against the reference on strided views, and its own properties: threads, and errors for bad
rows."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels import cpu, reference

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["plain", "growing", "adjacent"]


@dataclass
class Shape:
    """A layer at one step."""

    batch: int
    heads: int
    group: int
    rows: int
    dims: int
    seed: int


shapes = st.builds(
    Shape,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([16, 48, 128]),
    st.integers(0, 999),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(shape: Shape, dtype: torch.dtype, layout: str = "growing") -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, G, D]``, and keys and values ``[B, H, S, D]`` in the layout of a store."""
    generator = torch.Generator().manual_seed(shape.seed)
    q = torch.randn(shape.batch, shape.heads, shape.group, shape.dims, generator=generator).to(dtype)
    slack = 0 if layout == "plain" else 3
    storage = torch.randn(shape.batch, shape.heads, shape.rows + slack, 2, shape.dims, generator=generator).to(dtype)[
        :, :, : shape.rows
    ]
    keys, values = storage[:, :, :, 0], storage[:, :, :, 1]
    if layout == "plain":
        return q, keys.contiguous(), values.contiguous()
    if layout == "growing":  # heads are a capacity apart
        return q, *(torch.cat([x, x[:, :, :1]], 2)[:, :, : shape.rows] for x in (keys, values))
    return q, keys, values


def assert_same(ours: tuple[Tensor, Tensor, Tensor | None], theirs: tuple[Tensor, Tensor, Tensor | None]) -> None:
    step = 8e-3 if ours[0].dtype == torch.bfloat16 else 1e-5  # of the output's own type
    assert ours[0].dtype == theirs[0].dtype
    assert torch.allclose(ours[0].float(), theirs[0].float(), atol=1e-5, rtol=step)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    if theirs[2] is None:
        assert ours[2] is None
    else:
        assert ours[2] is not None
        assert torch.allclose(ours[2], theirs[2], atol=1e-6, rtol=1e-4)


@given(shapes, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans())
def test_attention_over_all_rows(shape: Shape, dtype: torch.dtype, layout: str, need_weights: bool) -> None:
    q, keys, values = tensors(shape, dtype, layout)
    ours = cpu.attention(q, keys, values, 0.3, need_weights=need_weights)
    assert_same(ours, reference.attention(q, keys, values, 0.3, need_weights=need_weights))
    dense = cpu.dense_attention(q, keys, values, 0.3)
    assert torch.allclose(dense.float(), ours[0].float(), atol=1e-5, rtol=8e-3)


@given(
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(1, 90),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "heads", "group"]),
)
def test_attention_over_chosen_rows(
    shape: Shape, dtype: torch.dtype, layout: str, count: int, hidden: bool, need_weights: bool, weighted: str
) -> None:
    q, keys, values = tensors(shape, dtype, layout)
    generator = torch.Generator().manual_seed(shape.seed)
    indices = torch.randint(shape.rows, (shape.batch, shape.heads, count), generator=generator)
    visible = torch.rand(shape.batch, shape.heads, shape.group, count, generator=generator) > 0.5 if hidden else None
    if visible is not None:
        visible[..., count // 2] = True
    added = None
    if weighted != "none":
        heads = 1 if weighted == "heads" else shape.group  # one weight for the query heads of a KV head, or for each
        added = torch.randn(shape.batch, shape.heads, heads, count, generator=generator) * 3
    ours = cpu.attention(q, keys, values, 0.3, indices, visible, need_weights, added)
    assert_same(ours, reference.attention(q, keys, values, 0.3, indices, visible, need_weights, added))
    if ours[2] is not None and visible is not None:
        assert float(ours[2][~visible].abs().sum()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [255, 256, 257, 1000, 17000])
def test_blocks_of_every_size_are_merged(dtype: torch.dtype, count: int) -> None:
    q, keys, values = tensors(Shape(1, 2, 3, count, 64, 1), dtype, "adjacent")
    visible = torch.zeros(1, 2, 3, count, dtype=torch.bool)
    visible[..., count - 1] = True  # the whole of the first blocks is hidden
    visible[:, 1] = True
    ours = cpu.attention(q, keys, values, 2.0, None, visible, True)
    assert_same(ours, reference.attention(q, keys, values, 2.0, None, visible, True))
    assert torch.allclose(ours[0][:, 0].float(), values[:, 0, -1:].float(), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [0.0, 1e-3, 30.0])
def test_flat_and_sharp_logits(dtype: torch.dtype, scaling: float) -> None:
    q, keys, values = tensors(Shape(1, 2, 4, 300, 64, 2), dtype)
    output, lse, weights = cpu.attention(q, keys, values, scaling, need_weights=True)
    logits = q.double() @ keys.double().transpose(2, 3) * scaling  # up to about a thousand
    assert torch.allclose(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert weights is not None
    assert torch.allclose(weights.double(), logits.softmax(-1), atol=3e-4)
    expected = logits.softmax(-1) @ values.double()
    assert torch.allclose(output.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-3)


def test_equal_keys_average_the_values() -> None:
    values = normal(1, 1, 77, 32)
    output, lse, _ = cpu.attention(normal(1, 1, 2, 32), torch.zeros(1, 1, 77, 32), values, 1.0)
    assert torch.allclose(output, values.mean(2, keepdim=True).expand_as(output), atol=1e-6)
    assert torch.allclose(lse, torch.tensor(77.0).log())


def test_nan_in_a_key_is_not_hidden() -> None:
    q, keys, values = tensors(Shape(1, 1, 2, 40, 16, 0), torch.float32)
    keys[0, 0, 13, 5] = torch.nan
    assert bool(cpu.attention(q, keys, values, 1.0)[0].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_may_be_a_view(dtype: torch.dtype) -> None:
    q, keys, values = tensors(Shape(2, 3, 4, 30, 32, 3), dtype)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    indices = torch.randint(30, (2, 3, 9))
    spread = indices.transpose(0, 1).contiguous().transpose(0, 1)
    expected = cpu.attention(q, keys, values, 0.2, indices)[0]
    assert torch.equal(cpu.attention(turned, keys, values, 0.2, spread)[0], expected)


@pytest.mark.parametrize("bad", [-1, 30, 10**12])
def test_rows_that_do_not_exist_are_named(bad: int) -> None:
    q, keys, values = tensors(Shape(1, 2, 1, 30, 16, 0), torch.float32)
    indices = torch.randint(30, (1, 2, 20))
    indices[0, 1, 17] = bad
    with pytest.raises(IndexError, match="between 0 and 29"):
        cpu.attention(q, keys, values, 1.0, indices)


@pytest.mark.parametrize(("dtype", "dims"), [(torch.float16, 32), (torch.float64, 32), (torch.float32, 24)])
def test_other_types_and_dimensions_go_to_the_reference(dtype: torch.dtype, dims: int) -> None:
    q, keys, values = normal(1, 2, 2, dims).to(dtype), normal(1, 2, 9, dims).to(dtype), normal(1, 2, 9, dims).to(dtype)
    ours, theirs = cpu.attention(q, keys, values, 0.5), reference.attention(q, keys, values, 0.5)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@given(shapes, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.floats(0.01, 3))
def test_exact_probabilities(shape: Shape, dtype: torch.dtype, layout: str, scaling: float) -> None:
    q, keys, _ = tensors(shape, dtype, layout)
    ours = cpu.exact_probabilities(q, keys, scaling)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, reference.exact_probabilities(q, keys, scaling), atol=1e-5)
    assert torch.allclose(ours.sum(-1), torch.tensor(float(shape.group)), atol=1e-4)


@pytest.fixture
def threads() -> object:
    """Restore the number of threads after the test."""
    before = numba.get_num_threads()
    yield None
    numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, threads: object) -> None:
    q, keys, values = tensors(Shape(2, 3, 5, 3000, 64, 4), dtype)
    indices = torch.randint(3000, (2, 3, 1500))
    results = []
    for count in (1, 2):
        cpu.use_threads(count)
        results.append(cpu.attention(q, keys, values, 0.3, indices, None, True))
    for one, two in zip(*results, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


def test_two_python_threads_at_once() -> None:
    cases = [tensors(Shape(1, 3, 4, 4000, 64, seed), torch.float32) for seed in range(2)]

    def output(case: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, keys, values = case
        return cpu.attention(q, keys, values, 0.3)[0]

    alone = [output(case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            together = list(pool.map(output, cases))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_starting_numba_s_threads_leaves_torch_s_number_alone() -> None:
    """This runs in a process of its own, because the threads start only once."""
    code = (
        "import torch; from pqbench.kernels import cpu; torch.set_num_threads(1); cpu.use_threads(1); "
        "raise SystemExit(torch.get_num_threads())"
    )
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False).returncode == 1


def test_use_threads_stays_within_what_there_is(threads: object) -> None:
    cpu.use_threads(10**6)
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    cpu.use_threads(1)
    assert numba.get_num_threads() == 1
    assert numba.threading_layer() != "workqueue"  # which two Python threads may not enter at once


@given(shapes, st.sampled_from(DTYPES))
def test_bfloat16_queries_give_the_rounded_answer_of_float32_ones(shape: Shape, dtype: torch.dtype) -> None:
    q, keys, values = tensors(shape, torch.bfloat16)
    keys, values = keys.to(dtype), values.to(dtype)
    values[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    ours, lse, _ = cpu.attention(q, keys, values, 0.3)
    exact, exact_lse, _ = cpu.attention(q.float(), keys, values, 0.3)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.isnan(), exact.isnan())  # the bits of a NaN may differ
    assert torch.equal(ours.nan_to_num(), exact.to(torch.bfloat16).nan_to_num())
    assert torch.equal(lse, exact_lse)
