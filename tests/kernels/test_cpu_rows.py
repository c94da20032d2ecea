"""Compiled copying of rows and column sums, against the reference and the full matrix."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqbench.kernels import cpu, reference
from tests.kernels.test_reference_attention import causal_matrix, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
trailing = st.sampled_from([(), (1,), (3,), (2, 5), (64,), (2, 128)])


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 30), st.integers(0, 40)),
    trailing,
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_gather_copies_rows_of_any_shape_and_type(
    size: tuple[int, int, int, int], shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    batch, heads, rows, count = size
    generator = torch.Generator().manual_seed(seed)
    source = (torch.randn(batch, heads, rows + 2, *shape, generator=generator) * 50).to(dtype)[:, :, 1 : rows + 1]
    indices = torch.randint(rows, (batch, heads, count), generator=generator)
    storage = torch.zeros(batch, heads, count + 4, *shape, dtype=dtype)
    cpu.gather(source, indices, storage[:, :, 3 : count + 3])
    expected = torch.zeros_like(storage)
    for b, h, n in np.ndindex(batch, heads, count):
        expected[b, h, n + 3] = source[b, h, indices[b, h, n]]
    assert torch.equal(storage, expected)  # memory outside the target is not changed


def test_gather_from_and_into_every_second_row() -> None:
    source, target = normal(2, 3, 40, 2, 16), torch.zeros(2, 3, 9, 2, 16)
    indices = torch.randint(40, (2, 3, 9))
    cpu.gather(source[:, :, :, 1], indices, target[:, :, :, 0])
    expected = torch.zeros_like(target)
    reference.gather(source[:, :, :, 1], indices, expected[:, :, :, 0])
    assert torch.equal(target, expected)


def test_gather_of_rows_that_are_not_whole_or_change_type() -> None:
    source, indices = normal(2, 3, 40, 16), torch.randint(40, (2, 3, 9))
    for target in (torch.zeros(2, 3, 9, 32)[..., ::2], torch.zeros(2, 3, 9, 16, dtype=torch.bfloat16)):
        expected = torch.zeros_like(target)
        cpu.gather(source, indices, target)
        reference.gather(source, indices, expected)
        assert torch.equal(target, expected)


def test_gather_in_many_parts_on_any_number_of_threads() -> None:
    source, indices = normal(1, 3, 5000, 64), torch.randint(5000, (1, 3, 3000))
    expected = torch.empty(1, 3, 3000, 64)
    reference.gather(source, indices, expected)
    before = numba.get_num_threads()
    for count in (1, 2):
        cpu.use_threads(count)
        target = torch.zeros(1, 3, 3000, 64)
        cpu.gather(source, indices, target)
        assert torch.equal(target, expected)
    cpu.use_threads(before)


@pytest.mark.parametrize("bad", [-1, 40])
def test_gather_of_rows_that_do_not_exist(bad: int) -> None:
    indices = torch.zeros(1, 1, 5, dtype=torch.int64)
    indices[0, 0, 3] = bad
    with pytest.raises(IndexError, match="between 0 and 39"):
        cpu.gather(normal(1, 1, 40, 16), indices, torch.empty(1, 1, 5, 16))


@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([None, 1, 2, 7, 100]),
    st.integers(1, 17),
    st.integers(0, 999),
)
def test_column_sums_equal_the_full_matrix(total: int, dims: int, band: int | None, block: int, seed: int) -> None:
    q, keys = normal(2, 2, 3, total, dims, seed=seed) * 2, normal(2, 2, total, dims, seed=seed + 1)
    expected = causal_matrix(q, keys, 0.4, band).sum((2, 3))  # [B, H, S]
    assert np.allclose(cpu.column_sums(q, keys, 0.4, band).numpy(), expected, atol=1e-4)
    sums = torch.zeros(2, 2, total)  # chunked prefill adds up
    for first in range(0, total, block):
        stop = min(total, first + block)
        sums[:, :, :stop] += cpu.column_sums(q[:, :, :, first:stop], keys[:, :, :stop], 0.4, band)
    assert np.allclose(sums.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", [None, 33])
def test_column_sums_of_strided_keys(dtype: torch.dtype, band: int | None) -> None:
    q, storage = normal(1, 2, 3, 70, 64).to(dtype), normal(1, 2, 210, 2, 64, seed=1).to(dtype)
    keys = storage[:, :, :200, 0]
    ours = cpu.column_sums(q, keys, 0.125, band)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, reference.column_sums(q, keys, 0.125, band), atol=1e-4)
    assert torch.allclose(ours.sum(-1), torch.tensor(210.0), rtol=1e-4)


def test_sharp_columns() -> None:
    q, keys = normal(1, 1, 2, 50, 16) * 30, normal(1, 1, 50, 16, seed=1) * 30
    ours = cpu.column_sums(q, keys, 1.0)
    expected = causal_matrix(q, keys, 1.0, None).sum((2, 3))
    assert np.allclose(ours.numpy(), expected, atol=0.02)  # logits of thousands, whose rounding shows


def test_column_sums_do_not_depend_on_the_number_of_threads() -> None:
    q, keys = normal(1, 3, 2, 400, 32), normal(1, 3, 900, 32, seed=1)
    before, results = numba.get_num_threads(), []
    for count in (1, 2):
        cpu.use_threads(count)
        results.append(cpu.column_sums(q, keys, 0.3))
    cpu.use_threads(before)
    assert torch.equal(*results)


WARM = """
import importlib, pkgutil
from numba.core.registry import CPUDispatcher
from pqbench import generate
from pqbench.kernels import cpu
from pqbench.engine.setting import Setting
from tests.support import prompt_of, tiny_model
from tests.engine.test_generation import SMALL, methods

modules = [importlib.import_module(f"{cpu.__name__}.{found.name}") for found in pkgutil.iter_modules(cpu.__path__)]
compiled = lambda: {id(f): len(f.signatures) for m in modules for f in vars(m).values() if isinstance(f, CPUDispatcher)}
cpu.warm_up()
before = compiled()
assert sum(before.values()) > 5
for method in methods(SMALL).values():
    generate(tiny_model("llama"), prompt_of(130), method, max_new_tokens=6, setting=Setting(backend="cpu"))
assert compiled() == before
"""


def test_warm_up_compiles_all_that_any_method_needs() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WARM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
