"""The Triton backend on a real GPU: the interpreter's checks on more tokens, pinned host memory, streams, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from pqbench.kernels import reference
from pqbench.kernels.buffers import gather_rows
from tests.kernels.closeness import close, close_each
from tests.kernels.gpu_checks import CHECKS
from tests.kernels.gpu_inputs import backend, draw_rows, normal, on_device

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install pqbench[gpu]"),
]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("scale", [1, 29])
@pytest.mark.parametrize("name", CHECKS)
@torch.inference_mode()
def test_triton_equals_the_reference(name: str, scale: int) -> None:
    CHECKS[name](CUDA, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_from_pinned_memory(dtype: torch.dtype) -> None:
    source = normal(torch.device("cpu"), 1, 8, 20_000, 2, 128, dtype=dtype).pin_memory()
    indices = draw_rows(CUDA, 1, 8, 20_000, 3_000)
    target = torch.zeros(1, 8, 3_000, 2, 128, dtype=dtype, device=CUDA)
    backend().gather(source, indices, target)
    assert torch.equal(target.cpu(), gather_rows(source, indices.cpu()))
    backend().gather(source[:, :, 100:, 1], indices[..., :7] % 500, target[:, :, :7, 0])  # a view of it
    assert torch.equal(target[:, :, :7, 0].cpu(), gather_rows(source[:, :, 100:, 1], indices[..., :7].cpu() % 500))


def test_rows_are_written_to_pinned_memory() -> None:
    source, indices = normal(CUDA, 2, 2, 500, 64), draw_rows(CUDA, 2, 2, 500, 90)
    target = torch.zeros(2, 2, 90, 64).pin_memory()
    backend().gather(source, indices, target)
    torch.cuda.synchronize()
    assert torch.equal(target, gather_rows(source, indices).cpu())


def test_pageable_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu tensor"):
        backend().gather(torch.zeros(1, 1, 4, 8), draw_rows(CUDA, 1, 1, 4, 2), torch.zeros(1, 1, 2, 8, device=CUDA))


def test_launches_are_on_the_current_stream() -> None:
    """The stream sleeps before it fills the inputs; a launch on another stream would read zeros."""
    keys, q = normal(CUDA, 1, 4, 5_000, 64), normal(CUDA, 1, 4, 4, 64)
    expected = reference.attention(q, keys, keys, 0.2)[0]
    late = torch.zeros_like(keys)
    stream = torch.cuda.Stream(CUDA)
    stream.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(keys)
        got = backend().attention(q, late, late, 0.2)[0]
        scores = backend().exact_probabilities(q, late, 0.2)
        top = backend().top_k(scores, 700)
    stream.synchronize()
    close(got, expected)
    assert torch.equal(top, reference.top_k(scores, 700))


def test_nothing_waits_for_the_gpu() -> None:
    """While the GPU sleeps, the host finishes its calls of training, scoring, ranking and attention."""
    q, keys = normal(CUDA, 1, 8, 4, 128), normal(CUDA, 1, 8, 6_000, 128)

    def step() -> None:
        codebook, codes = backend().train_codebook(keys, 4, 256, 2, 0)
        top = backend().top_k(backend().pq_probabilities(q, codebook, codes, 0.1), 500)
        backend().attention(q, keys, keys, 0.1, top)
        rows = backend().pq_select(q, codebook, codes[:, :, :5_900], 0.1, 50, 500, 6_000, 5_900, 600)
        backend().attention(q, keys, keys, 0.1, rows)
        backend().noise(8, 6_000, 1, CUDA)

    step()  # compiles, and allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    step()
    done = torch.cuda.current_stream(CUDA).query()
    torch.cuda.synchronize()
    assert not done


def test_threads_launch_side_by_side() -> None:
    keys = [normal(CUDA, 1, 4, 2_000, 64, seed=i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda x: backend().train_codebook(x, 2, 64, 4, 0), keys))
    for own, (codebook, codes) in zip(keys, built, strict=True):
        alone = backend().train_codebook(own, 2, 64, 4, 0)
        assert torch.equal(alone[0], codebook)
        assert torch.equal(alone[1], codes)


@torch.inference_mode()
def test_a_long_context() -> None:
    """128K tokens have logits and row numbers that small shapes do not reach."""
    q, keys = normal(CUDA, 1, 8, 4, 128, dtype=torch.bfloat16), normal(CUDA, 1, 8, 131_072, 128, dtype=torch.bfloat16)
    scores = backend().exact_probabilities(q, keys, 0.1)
    close_each(scores, reference.exact_probabilities(q, keys, 0.1))
    top = backend().top_k(scores, 13_107)
    assert torch.equal(top, reference.top_k(scores, 13_107))
    close(backend().attention(q, keys, keys, 0.1, top)[0], reference.attention(q, keys, keys, 0.1, top)[0])


@pytest.mark.parametrize(("parts", "bits"), [(2, 6), (4, 8)])
@torch.inference_mode()
def test_a_captured_selection_replays_with_new_numbers(parts: int, bits: int) -> None:
    """128K tokens; selection and attention are captured once, and replayed as the context grows."""
    q, keys = normal(CUDA, 1, 8, 4, 128), normal(CUDA, 1, 8, 131_072, 128, dtype=torch.bfloat16)
    codebook, codes = backend().train_codebook(keys, parts, 2**bits, 2, 0, 16_384)
    sink, top_k, length, middle, count = (on_device(n, CUDA) for n in (32, 512, 1_000, 900, 612))
    rows = torch.zeros(1, 8, 2_000, dtype=torch.int64, device=CUDA)

    def step() -> torch.Tensor:
        backend().pq_select(q, codebook, codes, 0.1, sink, top_k, length, middle, 2_000, out=rows)
        return backend().attention(q, keys, keys, 0.1, rows, count=count)[0]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for tokens, wanted in ((900, 512), (5_000, 700), (130_000, 1_024)):
        for number, value in ((top_k, wanted), (length, tokens + 100), (middle, tokens), (count, wanted + 100)):
            assert isinstance(number, torch.Tensor)
            number.fill_(value)
        graph.replay()
        top = reference.top_k(backend().pq_probabilities(q, codebook, codes[:, :, :tokens], 0.1), wanted)
        assert torch.equal(rows[:, :, 32 : 32 + wanted], 32 + top)
        chosen = rows[:, :, : wanted + 100]
        close(output, reference.attention(q, keys, keys, 0.1, chosen)[0])
