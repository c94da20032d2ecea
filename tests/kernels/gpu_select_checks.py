"""Comparisons for :mod:`tests.kernels.gpu_checks` of kernels that take lengths as numbers: selection and attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.kernels.number import Number
from tests.kernels.closeness import close, close_each, close_logs
from tests.kernels.gpu_inputs import Check, backend, draw_rows, normal, on_device


@dataclass(frozen=True)
class Selecting:
    """Sizes of a selection. ``spoilt`` is written into a centroid of the first head."""

    middle: int
    top_k: int
    batch: int = 2
    heads: int = 2
    group: int = 4
    parts: int = 2
    clusters: int = 64
    sink: int = 4
    window: int = 7
    scaling: float = 0.3
    spoilt: float | None = None
    equal: bool = False

    def inputs(self, device: torch.device, room: int = 0) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries, codebook, codes with ``room`` more than count, and the scaling."""
        q = normal(device, self.batch, self.heads, self.group, self.parts * 4)
        book = normal(device, self.batch, self.heads, self.parts, self.clusters, 4, seed=1)
        if self.spoilt is not None:
            book[0, 0, 0, 0, 0] = self.spoilt
        shape = (self.batch, self.heads, self.middle + room, self.parts)
        drawn = torch.randint(1 if self.equal else self.clusters, shape, generator=torch.Generator().manual_seed(2))
        return q, book, GrowingBuffer(drawn.to(device, reference.CODE)).view(), self.scaling

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.sink, self.top_k, self.sink + self.middle + self.window, self.middle

    @property
    def used(self) -> int:
        return self.sink + min(self.top_k, self.middle) + self.window

    def row(self, top: Tensor) -> Tensor:
        """The selection whose middle tokens are ``top`` ``[B, H, k]``."""
        ends = torch.arange(self.numbers[2], device=top.device).expand(self.batch, self.heads, -1)
        return torch.cat([ends[..., : self.sink], self.sink + top, ends[..., self.sink + self.middle :]], dim=2)


def select(sizes: Selecting, device: torch.device, scale: int) -> None:
    """The selected tokens, ties included, are exactly those of the backend's own probabilities, with numbers that are
    passed or read on the device. Memory after the selection is not changed."""
    sizes = replace(sizes, middle=sizes.middle * scale, top_k=sizes.top_k * scale)
    q, book, codes, scaling = sizes.inputs(device, room=300)
    probabilities = backend().pq_probabilities(q, book, codes[:, :, : sizes.middle], scaling)
    if sizes.spoilt is None:
        close_each(probabilities, reference.pq_probabilities(q, book, codes[:, :, : sizes.middle], scaling), 1e-3)
    expected = sizes.row(reference.top_k(probabilities, sizes.top_k))
    for tensors in (False, True):
        numbers: list[Number] = [on_device(n, device) if tensors else n for n in sizes.numbers]
        out = torch.full((*codes.shape[:2], sizes.used + 5), -7, device=device)
        sink, top_k, length, middle = numbers
        got = backend().pq_select(q, book, codes, scaling, sink, top_k, length, middle, sizes.used + 5, out=out)
        assert got.data_ptr() == out.data_ptr()
        assert torch.equal(got[:, :, : sizes.used], expected)
        assert bool((got[:, :, sizes.used :] == -7).all())


def select_some(kind: torch.dtype, device: torch.device, scale: int) -> None:
    """Heads that are not to be selected keep their middle part."""
    sizes = Selecting(5000 * scale, 90 * scale, heads=3)
    inputs, (sink, top_k, length, middle) = sizes.inputs(device), sizes.numbers
    whole = backend().pq_select(*inputs, sink, top_k, length, middle, sizes.used)
    only = torch.tensor([[1, 0, 1], [0, 0, 1]], device=device).to(kind)
    out = torch.full((2, 3, sizes.used), -7, device=device)
    backend().pq_select(*inputs, sink, top_k, length, middle, sizes.used, only, out)
    kept = torch.zeros_like(out, dtype=torch.bool)
    kept[:, :, sink : sink + top_k] = ~only.bool()[:, :, None]
    assert torch.equal(out, whole.masked_fill(kept, -7))


def select_again(device: torch.device, scale: int) -> None:
    """The same buffers with other numbers, as in the replay of a captured graph; the last numbers use most of the
    room."""
    sizes = Selecting(9000 * scale, 60)
    q, book, codes, scaling = sizes.inputs(device)
    sink, top_k, length, middle = (on_device(0, device) for _ in range(4))
    out = torch.empty(2, 2, 200, dtype=torch.int64, device=device)
    for tokens, wanted in ((50, 60), (4096, 1), (4097 * scale, 100), (9000 * scale, 180)):
        now = replace(sizes, middle=tokens, top_k=wanted)
        for number, value in zip((sink, top_k, length, middle), now.numbers, strict=True):
            assert isinstance(number, Tensor)
            number.fill_(value)
        backend().pq_select(q, book, codes, scaling, sink, top_k, length, middle, 200, out=out)
        top = reference.top_k(backend().pq_probabilities(q, book, codes[:, :, :tokens], scaling), wanted)
        assert torch.equal(out[:, :, : now.used], now.row(top))


def first_rows(dtype: torch.dtype, indexed: bool, device: torch.device, scale: int) -> None:
    """Attention over the first of the given rows; the others are NaN or invalid."""
    total, count = 300 * scale, 170 * scale
    q, keys, values = (normal(device, 2, 2, n, 32, seed=n, dtype=dtype) for n in (4, total, total + 1))
    values = values[:, :, 1:]
    indices = draw_rows(device, 2, 2, total, count) if indexed else None
    visible = normal(device, 2, 2, 4, count, seed=3) > 0.3
    visible[..., 0] = True
    added = normal(device, 2, 2, 4, count, seed=5)
    behind = total - count
    rest = torch.nn.functional.pad(added, (0, behind), value=torch.nan)
    seen = torch.nn.functional.pad(visible, (0, behind), value=True)
    some = (keys, values) if indexed else (keys[:, :, :count], values[:, :, :count])
    expected = reference.attention(q, *some, 0.3, indices, visible, True, added)
    if indices is None:
        keys[:, :, count:], values[:, :, count:] = torch.nan, torch.nan
    else:
        indices = torch.nn.functional.pad(indices, (0, behind), value=1 << 40)
    for number in (count, on_device(count, device)):
        output, lse, weights = backend().attention(q, keys, values, 0.3, indices, seen, True, rest, number)
        assert weights is not None
        assert expected[2] is not None
        close(output, expected[0])
        close_logs(lse, expected[1])
        close_each(weights, torch.nn.functional.pad(expected[2], (0, behind)))
        if indices is None:
            dense = backend().dense_attention(q, keys, values, 0.3, number)
            close(dense, reference.attention(q, *some, 0.3)[0])


def long_rows(device: torch.device, scale: int) -> None:
    """As many tokens as in the longest context, so that every probability is small."""
    sizes = Selecting(131_072, 1024, batch=1, heads=1)
    q, book, codes, scaling = sizes.inputs(device)
    expected = reference.pq_probabilities(q, book, codes, scaling)
    assert float(expected.median()) < 1e-4
    close_each(backend().pq_probabilities(q, book, codes, scaling), expected)
    keys = normal(device, 1, 1, 8192 * scale, 16, seed=3)
    close_each(
        backend().exact_probabilities(q[..., :8].repeat(1, 1, 1, 2), keys, 0.1),
        reference.exact_probabilities(q[..., :8].repeat(1, 1, 1, 2), keys, 0.1),
    )


def far_rows(device: torch.device, scale: int) -> None:
    """Heads that lie more than 2**31 elements apart; the memory between them is never used."""
    sizes = Selecting(1000 * scale, 90, batch=1)
    q, book, near, scaling = sizes.inputs(device)
    space = torch.empty(2**31 + 2 * near.numel(), dtype=near.dtype, device=device)
    far = space.as_strided(near.shape, (2**31, 2**31 + 16, *near.stride()[2:]))
    far.copy_(near)
    sink, top_k, length, middle = sizes.numbers
    got, expected = (
        backend().pq_select(q, book, codes, scaling, sink, top_k, length, middle, sizes.used) for codes in (far, near)
    )
    assert torch.equal(got, expected)


CHECKS: dict[str, Check] = {
    "select few": partial(select, Selecting(300, 50, group=3, parts=4, clusters=256)),
    "select one of one": partial(select, Selecting(1, 1, batch=1, heads=1, group=1, sink=0, window=1)),
    "select from nothing": partial(select, Selecting(0, 3, group=1)),
    "select nothing": partial(select, Selecting(500, 0)),
    "select all": partial(select, Selecting(5000, 5000)),
    "select many": partial(select, Selecting(9000, 900, scaling=2.0)),
    "select G=17 m=1": partial(select, Selecting(4200, 20, group=17, parts=1, clusters=5)),
    "select G=1 m=8": partial(select, Selecting(9000, 70, group=1, parts=8, clusters=16)),
    "select equal": partial(select, Selecting(9000, 1000, equal=True)),
    "select peaked": partial(select, Selecting(9000, 2000, scaling=20.0)),
    "select batch 3": partial(select, Selecting(4500, 40, batch=3, heads=5)),
    **{
        f"select {number}": partial(select, Selecting(5000, 30, spoilt=number))
        for number in (float("nan"), float("inf"), float("-inf"))
    },
    "select some, bool": partial(select_some, torch.bool),
    "select some, uint8": partial(select_some, torch.uint8),
    "select again": select_again,
    **{
        f"first rows {str(dtype)[6:]} {'given' if indexed else 'all'}": partial(first_rows, dtype, indexed)
        for dtype in (torch.float32, torch.bfloat16)
        for indexed in (False, True)
    },
    "long rows": long_rows,
    "far rows": far_rows,
}
