"""Comparisons of the Triton backend with the reference, for any device: Triton's interpreter on CPU tensors, or a GPU.

``python -m tests.kernels.gpu_checks FILE`` runs all comparisons on the CPU and writes the failures as JSON. It must be
a process of its own, because Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from methods.pqcache.cells import cell_numbers
from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.kernels.reference import cells as reference_cells
from tests.kernels import gpu_select_checks
from tests.kernels.closeness import close, close_each, close_logs
from tests.kernels.gpu_inputs import Check, backend, draw_rows, normal
from tests.kernels.gpu_row_checks import ROW_CHECKS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def attention(group: int, width: int, dtype: torch.dtype, rows: str, device: torch.device, scale: int) -> None:
    """Attention to all rows, to given rows, and to given rows of which some are hidden from some query heads; keys and
    values lie side by side in storage."""
    total, count = 150 * scale, 70 * scale
    q = normal(device, 2, 2, group, width, dtype=dtype)
    pairs = normal(device, 2, 2, total, 2, width, seed=1, dtype=dtype)
    keys, values = pairs[:, :, :, 0], pairs[:, :, :, 1]
    indices = None if rows == "all" else draw_rows(device, 2, 2, total, count)
    visible = added = None
    if rows == "weighted":
        added = normal(device, 2, 2, 1, count, seed=4) * 3
    if rows == "hidden":
        visible = normal(device, 2, 2, group, count, seed=3) > 0.3
        visible[:, :, 0, : count - 3], visible[..., -1] = False, True  # whole tiles hidden from one query head
    got = backend().attention(q, keys, values, 0.3, indices, visible, True, added)
    expected = reference.attention(q, keys, values, 0.3, indices, visible, True, added)
    close(got[0], expected[0])
    close_logs(got[1], expected[1])
    assert got[2] is not None
    assert expected[2] is not None
    close_each(got[2], expected[2])
    assert backend().attention(q, keys, values, 0.3, indices, visible)[2] is None


def attention_over_few_rows(device: torch.device, scale: int) -> None:
    for total in (1, 2, 33, 64):
        q, keys = normal(device, 1, 3, 1, 16), normal(device, 1, 3, total, 16, seed=1)
        close(backend().attention(q, keys, keys, 0.5)[0], reference.attention(q, keys, keys, 0.5)[0])


def dense(dtype: torch.dtype, device: torch.device, scale: int) -> None:
    q, keys = normal(device, 2, 2, 4, 32, dtype=dtype), normal(device, 2, 2, 90 * scale, 32, seed=1, dtype=dtype)
    values = normal(device, 2, 2, 90 * scale, 32, seed=2, dtype=dtype)
    close(backend().dense_attention(q, keys, values, 0.2), reference.attention(q, keys, values, 0.2)[0])


def exact(group: int, width: int, dtype: torch.dtype, device: torch.device, scale: int) -> None:
    q, keys = normal(device, 2, 2, group, width, dtype=dtype) * 4, normal(device, 2, 2, 200 * scale, width, dtype=dtype)
    for some in (keys, keys[:, :, :1]):
        close_each(backend().exact_probabilities(q, some, 0.3), reference.exact_probabilities(q, some, 0.3))


def pq(parts: int, clusters: int, group: int, device: torch.device, scale: int) -> None:
    """Codes are a view of a growing buffer; logits are so large that exponentials overflow unless a maximum is
    subtracted."""
    width = 4 * parts
    q, codebook = normal(device, 2, 2, group, width), normal(device, 2, 2, parts, clusters, 4, seed=1)
    drawn = torch.randint(clusters, (2, 2, 300 * scale, parts), generator=torch.Generator().manual_seed(2))
    codes = GrowingBuffer(drawn.to(device, reference.CODE)).view()
    for scaling in (0.3, 40.0):
        got = backend().pq_probabilities(q, codebook, codes, scaling)
        close_each(got, reference.pq_probabilities(q, codebook, codes, scaling), 1e-3 if scaling > 1 else 2e-4)
    one = codes[:, :, :1]
    close_each(backend().pq_probabilities(q, codebook, one, 0.3), reference.pq_probabilities(q, codebook, one, 0.3))


def cells(parts: int, bits: int, group: int, device: torch.device, scale: int) -> None:
    """The best tokens by the scores of the reference, up to ties by rounding, and the weight of the other tokens. A
    third of the tokens is not in the lists yet, and some cells are empty."""
    q, codebook = normal(device, 2, 2, group, 4 * parts) * 2, normal(device, 2, 2, parts, 2**bits, 4, seed=1)
    total = 60 * scale
    drawn = torch.randint(2**bits - 1, (2, 2, total, parts), generator=torch.Generator().manual_seed(2))
    numbers = cell_numbers(drawn.to(device, reference.CODE), bits)
    listed, pending = numbers[:, :, : total * 2 // 3], numbers[:, :, total * 2 // 3 :]
    none = numbers.new_zeros(2, 2, 2 ** (parts * bits) + 1)
    starts, tokens = backend().merge_lists(none, listed[:, :, :0], listed)
    scores = reference_cells.cell_scores(q, codebook) * 0.3
    counts = torch.zeros_like(none[:, :, 1:], dtype=torch.int64).scatter_add(2, numbers.long(), numbers.long() * 0 + 1)
    shares = reference_cells.cell_probabilities(scores, counts).gather(2, numbers.long())
    for wanted in (0, 1, total // 2, total, total + 3):
        found, weight = backend().best_of_cells(q, codebook, starts, tokens, pending, wanted, 0.3)
        assert found.shape[2] == min(wanted, total)
        assert bool((found.diff(dim=2) > 0).all())
        ranked = shares.sort(dim=2, descending=True).values[:, :, : found.shape[2]]
        close_each(shares.gather(2, found).sort(dim=2, descending=True).values, ranked)
        expected = reference_cells.best_of_cells(q, codebook, starts, tokens, pending, wanted, 0.3)[1]
        assert torch.equal(weight.isinf(), expected.isinf())
        close_logs(weight.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0))


def top_k(total: int, device: torch.device, scale: int) -> None:
    """Top-k with ties, zeros of both signs, infinities and NaN, on rows of a buffer."""
    total *= scale
    scores = (normal(device, 2, 3, total) * 3).round(decimals=1)
    scores[0, 0, ::7], scores[0, 1, 3], scores[0, 2, 5:9] = float("nan"), float("inf"), float("-inf")
    scores[1, 0], scores[1, 1, 1::2], scores[1, 1, ::2] = 1.0, 0.0, -0.0
    scores[1, 2] = normal(device, total, seed=4).exp() * 1e-30
    buffer = GrowingBuffer(scores)
    for count in sorted({0, 1, 2, total // 3, total - 1, total, total + 5}):
        got = backend().top_k(buffer.view(), count)
        assert got.dtype == torch.int64
        assert torch.equal(got, reference.top_k(scores, count)), count
    assert torch.equal(backend().top_k(scores[0, 0].to(BF16), 3), reference.top_k(scores[0, 0].to(BF16), 3))


def encode(parts: int, width: int, clusters: int, dtype: torch.dtype, device: torch.device, scale: int) -> None:
    """Codes name the nearest centroid, or one that is equally near up to rounding."""
    keys = normal(device, 2, 2, 90 * scale, parts * width, dtype=dtype)
    codebook = normal(device, 2, 2, parts, clusters, width, seed=1)
    got, expected = backend().encode(keys, codebook), reference.encode(keys, codebook)
    assert got.dtype == reference.CODE
    assert got.shape == expected.shape
    points = reference.subspaces(keys.float(), parts)  # [P, N, w]
    distances = torch.cdist(points.double(), codebook.view(-1, clusters, width).double())
    flat = got.transpose(2, 3).reshape(len(points), -1, 1).long()
    assert float((distances.gather(2, flat)[..., 0] - distances.min(-1).values).max()) < 1e-3
    assert float((got != expected).float().mean()) < 1e-3


def encode_ties(device: torch.device, scale: int) -> None:
    """With integers distances are exact, so ties go to the lowest index, also across blocks of centroids."""
    keys = torch.arange(-8.0, 9.0, device=device)[None, None, :, None]
    codebook = torch.cat([torch.arange(-8.0, 9.0, 2.0)] * 12)[:100].to(device)[None, None, None, :, None]
    assert torch.equal(backend().encode(keys, codebook), reference.encode(keys, codebook))
    assert backend().encode(keys[:, :, :0], codebook).shape == (1, 1, 0, 1)


def blobs(device: torch.device, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Keys ``[2, 2, N, D]`` around few points that are far apart. A third of them are equal, so that clusters stay
    empty. All are integers, so that a point has exactly the same distance to equal centroids, in whatever order sums
    are taken."""
    centres, which = normal(device, 6, width, seed=7) * 20, torch.arange(count, device=device) % 6
    keys = centres[which] + 2 * normal(device, 2, 2, count, width, seed=8)
    keys[:, :, : count // 3] = keys[:, :, :1]
    return keys.round().to(dtype)


def error(keys: Tensor, codebook: Tensor, codes: Tensor) -> float:
    """Mean squared distance of points from their centroids."""
    points = reference.subspaces(keys.float(), codebook.shape[2])  # [P, N, w]
    index = codes.transpose(2, 3).reshape(*points.shape[:2], 1).long().expand_as(points)
    return float((points - codebook.reshape(len(points), -1, points.shape[2]).gather(1, index)).square().mean())


def train(parts: int, width: int, sample: int | None, dtype: torch.dtype, device: torch.device, scale: int) -> None:
    keys = blobs(device, 130 * scale, parts * width, dtype)
    for iterations in (0, 1, 3, 12):
        codebook, codes = backend().train_codebook(keys, parts, 20, iterations, 3, sample)
        expected, theirs = reference.train_codebook(keys, parts, 20, iterations, 3, sample)
        assert codes.is_contiguous()
        assert torch.equal(codes, backend().encode(keys, codebook))
        if device.type == "cpu" or iterations == 0:
            close(codebook, expected)
            assert torch.equal(codes, theirs)
        else:  # tensor cores round differently, and a single point in another cluster changes later steps
            assert error(keys, codebook, codes) < 1.02 * error(keys, expected, theirs)


def train_again(device: torch.device, scale: int) -> None:
    """A second training gives the same bits, since sums have a fixed order."""
    keys = normal(device, 1, 2, 200 * scale, 16)
    first, again = backend().train_codebook(keys, 2, 16, 4, 1), backend().train_codebook(keys, 2, 16, 4, 1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def columns(band: int | None, group: int, width: int, dtype: torch.dtype, device: torch.device, scale: int) -> None:
    """Column sums over all queries at once, and over blocks whose sums are added."""
    total = 100 * scale
    q = normal(device, 1, 2, total, group, width, dtype=dtype).transpose(2, 3)
    keys = normal(device, 1, 2, total, width, seed=1, dtype=dtype)
    band = None if band is None else band * scale
    expected = reference.column_sums(q, keys, 0.4, band)
    close_each(backend().column_sums(q, keys, 0.4, band), expected)
    sums, half = torch.zeros_like(expected), 37 * scale
    sums[:, :, :half] += backend().column_sums(q[:, :, :, :half], keys[:, :, :half], 0.4, band)
    sums += backend().column_sums(q[:, :, :, half:], keys, 0.4, band)
    close_each(sums, expected)


def gather(dtype: torch.dtype, device: torch.device, scale: int) -> None:
    """Gather numbers, rows, and pairs of rows that are contiguous or not."""
    total, count = 60 * scale, 21 * scale
    indices = draw_rows(device, 2, 3, total, count)
    source = (normal(device, 2, 3, total, 2, 24) * 50).to(dtype)
    for part in (source, source[:, :, :, 1], source[:, :, :, 0, 5], source[..., 3:20], source[..., ::2][:, :, :, 0]):
        target = part.new_empty(2, 3, count, *part.shape[3:])
        backend().gather(part, indices, target)
        assert torch.equal(target, gather_rows(part, indices))
    pairs = source.new_zeros(2, 3, count + 4, 2, 24)
    backend().gather(source[:, :, :, 1], indices, pairs[:, :, 2:-2, 0])  # into part of a buffer
    assert torch.equal(pairs[:, :, 2:-2, 0], gather_rows(source, indices)[:, :, :, 1])
    assert int((pairs[:, :, :, 1] != 0).sum() + (pairs[:, :, :2] != 0).sum() + (pairs[:, :, -2:] != 0).sum()) == 0


def noise(device: torch.device, scale: int) -> None:
    """Exactly the numbers of the reference."""
    for seed in (0, 2**31, 2**40 + 12345, 2**63 - 1):
        expected = reference.noise(3, 1100 * scale, seed, torch.device("cpu"))
        assert torch.equal(backend().noise(3, 1100 * scale, seed, device).cpu(), expected)


CHECKS: dict[str, Check] = {
    **gpu_select_checks.CHECKS,
    **{
        f"attention G={group} D={width} {str(dtype)[6:]} {rows}": partial(attention, group, width, dtype, rows)
        for group, width, dtype, rows in [
            (3, 24, F32, "all"),
            (3, 24, F32, "given"),
            (3, 24, F32, "hidden"),
            (3, 24, F32, "weighted"),
            (1, 64, F16, "given"),
            (4, 128, BF16, "hidden"),
            (20, 16, F32, "hidden"),
            (2, 160, F32, "given"),
            (8, 256, BF16, "all"),
        ]
    },
    "attention over few rows": attention_over_few_rows,
    "dense float32": partial(dense, F32),
    "dense bfloat16": partial(dense, BF16),
    "exact float32": partial(exact, 3, 24, F32),
    "exact float16": partial(exact, 1, 64, F16),
    "exact bfloat16": partial(exact, 8, 128, BF16),
    "exact wide": partial(exact, 20, 200, F32),
    "pq m=1 K=5": partial(pq, 1, 5, 1),
    "pq m=2 K=64": partial(pq, 2, 64, 4),
    "pq m=4 K=256": partial(pq, 4, 256, 3),
    "pq m=8 G=17": partial(pq, 8, 5, 17),
    "cells 2x3": partial(cells, 2, 3, 4),
    "cells 3x2 G=17": partial(cells, 3, 2, 17),
    "cells 1x8 G=1": partial(cells, 1, 8, 1),
    "top_k short": partial(top_k, 90),
    "top_k of one": partial(top_k, 9),
    "top_k long": partial(top_k, 4500),
    "noise": noise,
    "encode": partial(encode, 2, 12, 40, F32),
    "encode 256": partial(encode, 1, 40, 256, BF16),
    "encode wide": partial(encode, 1, 200, 70, F32),
    "encode ties": encode_ties,
    "train": partial(train, 2, 12, None, F32),
    "train sample": partial(train, 1, 20, 60, F32),
    "train bfloat16": partial(train, 2, 64, None, BF16),
    "train again": train_again,
    "columns": partial(columns, None, 2, 24, F32),
    "columns band": partial(columns, 7, 2, 24, F32),
    "columns band of one": partial(columns, 1, 1, 128, BF16),
    "columns wide": partial(columns, 80, 1, 200, F32),
    **{f"gather {str(dtype)[6:]}": partial(gather, dtype) for dtype in (F32, BF16, torch.uint8, torch.int64)},
    **ROW_CHECKS,
}


def main(path: Path) -> None:
    """Run every check, and update the file after each in case the process dies."""
    results: dict[str, str] = {}
    for name, check in CHECKS.items():
        try:
            with torch.inference_mode():
                check(torch.device("cpu"), 1)
            results[name] = ""
        except Exception:  # noqa: BLE001 - reported by the test of that name
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
