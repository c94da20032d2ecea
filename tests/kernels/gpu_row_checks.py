"""Row and block kernels of the Triton backend compared with the reference; run by :mod:`tests.kernels.gpu_checks`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.backend import Kernels
from pqbench.kernels.reference.blocks import Residency
from pqbench.kernels.reference.rows import Blocks, HostTokens
from tests.kernels.gpu_inputs import Check, backend

F32, BF16 = torch.float32, torch.bfloat16
BATCH, HEADS, SIZE = 2, 3, 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_host(rows: Tensor, device: torch.device) -> Tensor:
    """Rows in page-locked memory, where a GPU can read them."""
    return rows.pin_memory() if device.type == "cuda" else rows


def append(known: bool, ring: bool, dtype: torch.dtype, device: torch.device, scale: int) -> None:
    """Append several rows at once, after others or around a ring, into part of a buffer."""
    width, room = 24, 10
    buffers = [numbers(BATCH, HEADS, room + 2, 2, width).to(device, dtype) for _ in range(2)]
    locals_ = [torch.full((40,), -1, device=device) for _ in range(2)]
    keys, values = numbers(2, BATCH, 3, HEADS, width, seed=1).to(device, dtype).transpose(2, 3)
    at = 17 if ring else 4
    for each, buffer, local in zip((reference, backend()), buffers, locals_, strict=True):
        place = buffer[:, :, 2:]
        number = at if known else torch.tensor([at], dtype=torch.int32, device=device)
        more = (local, 2) if ring else ()
        each.append_rows(keys, values, place[..., 0, :], place[..., 1, :], number, *more)
    assert torch.equal(buffers[0], buffers[1])
    assert torch.equal(locals_[0], locals_[1])
    assert not torch.equal(buffers[0], numbers(BATCH, HEADS, room + 2, 2, width).to(device, dtype))


def copy(dtype: torch.dtype, device: torch.device, scale: int) -> None:
    """Copy keys alone, rows of a ring, codes of two numbers, and tensors that are not rows."""
    rows = (numbers(BATCH, HEADS, 30 * scale, 2, 24) * 50).to(dtype)
    source = on_host(rows, device)
    for part in (source[:, :, 3:20, :1], source[..., 1, :], source[:, :, 5:9], source[:, :, :, 0, :2], source[0, 0]):
        target = torch.zeros(*part.shape, dtype=dtype, device=device)
        backend().copy(part, target)
        assert torch.equal(target.cpu(), part.contiguous())
        back = on_host(torch.zeros(*part.shape[:-1], 2 * part.shape[-1], dtype=dtype), device)
        backend().copy(target, back[..., : part.shape[-1]])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert torch.equal(back[..., : part.shape[-1]], part)
        assert int(back[..., part.shape[-1] :].count_nonzero()) == 0


class Scene:
    """A table with sinks, a ring and blocks, some tokens of a context in it, and all of them on the host."""

    def __init__(self, device: torch.device, scale: int, cached: bool, per_head: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.length, self.number, width = 60 * scale, 21 * scale, 24
        owners = BATCH * HEADS if per_head else BATCH
        slots, self.first = 5, 12  # 4 sinks, a ring of 8
        self.resident = self.first + (slots * SIZE if cached else 0)
        self.staging = BATCH * HEADS * self.resident
        rows = numbers(BATCH, HEADS, self.length, 2, width, seed=seed)
        middle = self.length * 2 // 3
        room = torch.zeros(BATCH, HEADS, 7, 2, width)
        self.tokens = HostTokens(
            0,
            self.length,
            on_host(rows[:, :, :middle].contiguous(), device),
            middle,
            on_host(torch.cat([rows[:, :, middle:], room], 2), device),
        )
        self.table = numbers(self.staging + BATCH * HEADS * self.number, 2, width, seed=seed + 1).to(device)
        local = torch.full((self.length + 5,), -1)
        local[:4], local[self.length - 8 : self.length] = torch.arange(4), 4 + torch.randperm(8, generator=generator)
        self.local = local.to(device)
        every = -(-self.length // SIZE) + 2
        where = torch.full((owners, every), -1)
        for owner in range(owners):
            held = torch.randperm(self.length // SIZE, generator=generator)[:slots]
            where[owner, held] = torch.randperm(slots, generator=generator)
        counts = torch.zeros(owners, every, dtype=torch.int32)
        self.blocks = Blocks(where.to(device), SIZE, self.first, counts.to(device)) if cached else None
        self.indices = torch.randint(0, self.length, (BATCH, HEADS, self.number), generator=generator).to(device)
        self.tally = torch.zeros(3, dtype=torch.int64, device=device)

    def fetch(self, kernels_: Kernels, tokens: HostTokens, count: int | Tensor | None = None) -> Tensor:
        """See :func:`pqbench.kernels.reference.rows.fetch_rows`."""
        return kernels_.fetch_rows(
            self.indices, self.local, self.table, self.resident, self.staging, tokens, self.tally, self.blocks, count
        )

    def equal(self, other: Scene) -> None:
        """Whether both have the same content."""
        assert torch.equal(self.table, other.table)
        assert torch.equal(self.tally, other.tally)
        if self.blocks is not None and other.blocks is not None:
            assert torch.equal(self.blocks.counts, other.blocks.counts)
            assert torch.equal(self.blocks.where, other.blocks.where)


def scenes(device: torch.device, scale: int, cached: bool, per_head: bool) -> tuple[Scene, Scene]:
    """Two scenes: one for the reference, one for the backend under test."""
    return Scene(device, scale, cached, per_head), Scene(device, scale, cached, per_head)


def fetch(cached: bool, per_head: bool, count: str, device: torch.device, scale: int) -> None:
    """Fetch all tokens, then tokens from part of the host's rows, as if there were more than two buffers."""
    one, other = scenes(device, scale, cached, per_head)
    number = {"all": None, "int": one.number - 5, "tensor": torch.tensor([one.number - 5], device=device).int()}[count]
    for start, stop in ((0, one.length), (one.length // 3, one.length // 2)):
        part = [
            s.tokens._replace(start=start, stop=stop, rows=s.tokens.rows[:, :, start:].contiguous())
            for s in (one, other)
        ]
        one_slots, other_slots = one.fetch(reference, part[0], number), other.fetch(backend(), part[1], number)
        assert torch.equal(one_slots, other_slots)
        one.equal(other)
    assert int(one.tally[0]) > 0


def vacate(per_head: bool, device: torch.device, scale: int) -> None:
    """A third of the blocks leave the cache or change places after tokens were found."""
    one, other = scenes(device, scale, True, per_head)
    for kernels_, scene in ((reference, one), (backend(), other)):
        slots = scene.fetch(kernels_, scene.tokens)
        assert scene.blocks is not None
        where = scene.blocks.where
        where.copy_(torch.where((where >= 0) & (torch.arange(where.shape[1], device=device) % 3 == 0), -1, where))
        kernels_.vacate_rows(scene.indices, slots, scene.table, scene.resident, scene.staging, scene.blocks)
        scene.indices = slots
    assert torch.equal(one.indices, other.indices)
    one.equal(other)


def admit(frequent: bool, device: torch.device, scale: int) -> None:
    """Many steps of requests: which blocks enter, which are held, and their content."""
    owners, every, slots = BATCH, 19, 5
    states, tallies = [], []
    for _ in range(2):
        residency = Residency.empty(owners, slots, device)
        states.append(residency._replace(where=torch.full((owners, every), -1, device=device)))
        tallies.append(torch.zeros(1, dtype=torch.int64, device=device))
    generator = torch.Generator().manual_seed(3)
    for step in range(25):
        wishes = ((torch.rand(owners, every, generator=generator) * 7).int() - 3).clamp(min=0)
        complete: int | Tensor = min(every, 8 + step)
        if step % 2:
            complete = torch.tensor([complete], dtype=torch.int32, device=device)
        counts = [wishes.clone().to(device) for _ in range(2)]
        most = 3 if step % 5 else 9
        moves = [
            each.admit_blocks(counts[i], complete, most, frequent, states[i], tallies[i])
            for i, each in enumerate((reference, backend()))
        ]
        assert torch.equal(moves[0], moves[1]), step
        for one, other in zip(states[0], states[1], strict=True):
            assert torch.equal(one, other), step
        assert int(counts[0].sum() + counts[1].sum()) == 0
        assert torch.equal(tallies[0], tallies[1])
    assert int(tallies[0]) > 10


def blocks(per_head: bool, device: torch.device, scale: int) -> None:
    """Move blocks that lie in one buffer, across two buffers, and at the end; and move none."""
    one, other = scenes(device, scale, True, per_head)
    assert one.blocks is not None
    owners, last = len(one.blocks.where), one.length // SIZE
    moves = torch.tensor([[[0, 3], [-1, -1], [one.tokens.middle // SIZE, 0], [last - 1, 2]]]).repeat(owners, 1, 1)
    moves[-1, 0, 0] = 2
    for kernels_, scene in ((reference, one), (backend(), other)):
        assert scene.blocks is not None
        kernels_.copy_blocks(moves.to(device), scene.tokens, scene.table, scene.resident, scene.blocks)
    one.equal(other)
    assert not torch.equal(one.table, Scene(device, scale, True, per_head).table)


ROW_CHECKS: dict[str, Check] = {
    "append": partial(append, True, False, F32),
    "append where the device says": partial(append, False, False, BF16),
    "append to a ring": partial(append, True, True, BF16),
    "append to a ring where the device says": partial(append, False, True, F32),
    **{f"copy {str(dtype)[6:]}": partial(copy, dtype) for dtype in (F32, BF16, torch.uint8)},
    "fetch": partial(fetch, False, False, "all"),
    "fetch as many as the device says": partial(fetch, False, False, "tensor"),
    "fetch beside blocks": partial(fetch, True, False, "int"),
    "fetch beside blocks of each head": partial(fetch, True, True, "tensor"),
    "vacate": partial(vacate, False),
    "vacate blocks of each head": partial(vacate, True),
    "admit lfu": partial(admit, True),
    "admit lru": partial(admit, False),
    "blocks": partial(blocks, False),
    "blocks of each head": partial(blocks, True),
}
