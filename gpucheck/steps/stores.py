"""Step 2: host stores against the device store, row for row, over the link of this machine.

Keys, values and selections are random, and every step adds a token. The rows from a host store must be those of the
device store, bit for bit. Nothing waits for the GPU between the steps, so that a missing wait is not hidden by another
one; the differences are counted on the device and read at the end. With ``late`` every use of a side stream begins with
a pause, so that rows are not there yet if nothing waited for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpucheck.options import Options
from gpucheck.result import Result
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.method import Budget, Split
from pqbench.store.base import Store
from pqbench.store.tiers import DeviceTier, HostTier, Placement

PAUSE = 2_000_000  # clock cycles, about a millisecond
STEPS = 80
CACHE: dict[str, Any] = {"cache_tokens": 256, "cache_block": 32, "cache_admit": 4}
TIERS: dict[str, dict[str, Any]] = {
    "host": {},
    "host, small ring": {"margin": 4},
    "host, poisoned": {"debug": True, "margin": 8},
    "host, nothing beside": {"background": False},
    "host, lfu": CACHE,
    "host, lru": {**CACHE, "cache_policy": "lru"},
    "host, cache per head": {**CACHE, "cache_per_head": True},
    "host, cache, poisoned": {**CACHE, "debug": True},
}


def run(result: Result, options: Options) -> None:
    """Compare every host tier, without and with late side streams."""
    device = torch.device(options.device)
    length, width = (600, 32) if options.tiny else (5_000, 128)
    kinds = (torch.float32,) if options.tiny else (torch.bfloat16, torch.float32)
    for name, fields in TIERS.items():
        for kind in kinds[: 1 + (name == "host")]:
            for late in (False, True) if options.on_gpu else (False,):
                label = f"{name}, {str(kind)[6:]}{', late' if late else ''}"
                with result.guarded(label), paused(device) if late else nullcontext():
                    result.row(label, **compared(HostTier(**fields), device, kind, length, width))
    with result.guarded("a transfer that is not waited for is noticed"):
        _control(result, device)


@contextmanager
def paused(device: torch.device) -> Iterator[None]:
    """Inside this block, every use of a side stream begins with a pause on that stream."""
    enter = torch.cuda.stream

    @contextmanager
    def late(stream: torch.cuda.Stream) -> Iterator[None]:
        with enter(stream):
            torch.cuda._sleep(PAUSE)
            yield

    with mock.patch.object(torch.cuda, "stream", late):
        yield
    torch.cuda.synchronize(device)


@torch.inference_mode()
def compared(tier: HostTier, device: torch.device, kind: torch.dtype, length: int, width: int) -> dict[str, Any]:
    """Decode with both stores; ``ok`` if no row differs, with the number of steps in which rows differed."""
    case = Case(device, kind, length, width)
    here, there = DeviceTier().open(device), tier.open(device)
    near, far = case.store(here), case.store(there)
    wrong = torch.zeros(4, dtype=torch.int64, device=device)
    wrong[3] += int(not torch.equal(far.stored_keys().cpu(), near.keys().cpu()))
    far.usage.open()
    arriving = far.bring(case.codes.view())
    selections = [case.selection(near.length + step + 1) for step in range(STEPS)]  # uploading waits
    for step, indices in enumerate(selections):
        keys, values = case.token(step)
        near.append(keys, values)
        far.append(keys, values)
        wrong[0] += differ(rows(near, indices), rows(far, indices))
        wrong[1] += (arriving.wait() != case.codes_there[:, :, : case.length + step]).any()
        case.codes.append(case.code(step))
        arriving = far.bring(case.codes.view())
        if step % 40 == 39:
            wrong[2] += differ(rows(near, None), rows(far, None))
    arriving.wait()
    far.settle()
    wrong[3] += int(not torch.equal(far.stored_keys().cpu(), near.keys().cpu()))
    there.close()
    found = dict(zip(("selections", "codes", "contexts", "host_rows"), wrong.tolist(), strict=True))
    return {"ok": not any(found.values()), "steps": STEPS, **{f"wrong_{name}": n for name, n in found.items()}}


class Case:
    """A prompt of one layer ``[1, H, S, D]``, the decoded tokens, and codes that grow in host memory."""

    heads, middle = 4, 64

    def __init__(self, device: torch.device, kind: torch.dtype, length: int, width: int) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self.length, self.device = length, device
        drawn = torch.randn(2, 1, self.heads, length + STEPS, width, generator=self._generator)
        self._keys, self._values = drawn.to(device, kind)
        codes = torch.randint(256, (1, self.heads, length + STEPS, 4), generator=self._generator).to(torch.uint8)
        self.codes_there, self._all = codes.to(device), codes
        self.codes = GrowingBuffer(codes[:, :, :length].clone())
        self.budget = Budget(sink=16, window=48, tokens=16 + 48 + self.middle, ratio=None)

    def split(self, length: int) -> Split:
        """Sinks, window and number of selected tokens at a context length."""
        return self.budget.resolve(length, self.length)

    def store(self, placement: Placement) -> Store:
        """A store of the prompt, with memory of its own."""
        keys, values = (GrowingBuffer(x[:, :, : self.length].clone()) for x in (self._keys, self._values))
        prompt = placement.prompt(keys, values, STEPS)
        store = prompt.store(self.split)
        prompt.let_go()
        return store

    def token(self, step: int) -> tuple[Tensor, Tensor]:
        """Key and value ``[1, H, 1, D]`` of a decoded token."""
        at = self.length + step
        return self._keys[:, :, at : at + 1], self._values[:, :, at : at + 1]

    def code(self, step: int) -> Tensor:
        """The code ``[1, H, 1, 4]`` that a step adds."""
        return self._all[:, :, self.length + step : self.length + step + 1]

    def selection(self, length: int) -> Tensor:
        """Sinks, random tokens of the middle, and window, ``[1, H, n]``. Most middle tokens come from one part of it,
        so that a block cache has hits."""
        split = self.split(length)
        first, stop = split.middle(length)
        often = torch.randperm((stop - first) // 3, generator=self._generator)[: self.middle * 3 // 4]
        rarely = (stop - first) // 3 + torch.randperm((stop - first) * 2 // 3 - 1, generator=self._generator)
        chosen = torch.cat([often, rarely[: self.middle - len(often)]]).sort().values + first
        shifted = torch.stack([(chosen - first + h) % (stop - first) + first for h in range(self.heads)])
        return split.around(shifted.sort(-1).values[None].to(self.device), length)


def rows(store: Store, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The keys and values from a store, in the requested order."""
    keys, values, places = store.fetch(indices)
    return (keys, values) if places is None else (gather_rows(keys, places), gather_rows(values, places))


def differ(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Whether any bit differs, without waiting for the result. NaN is never equal, so poisoned rows are found."""
    return (one[0] != other[0]).any() | (one[1] != other[1]).any()


def _control(result: Result, device: torch.device) -> None:
    """The control experiment: rows that are read without a wait must be wrong; otherwise the comparisons above prove
    nothing."""
    tier = HostTier(debug=device.type == "cpu")
    with paused(device) if device.type == "cuda" else nullcontext():
        placement = tier.open(device)
        link: Any = placement.link
        source = torch.arange(1 << 20, dtype=torch.float32)
        source = source.pin_memory() if link.pinned else source
        target = torch.zeros_like(source, device=device)
        transfer = link.to_device(source, target)
        early = (target != source.to(device) if device.type == "cpu" else target != _copied(source, device)).any()
        transfer.wait()
        late = (target != source.to(device)).any()
        placement.close()
    result.row(
        "a transfer that is not waited for is noticed", bool(early) and not bool(late), early_differs=bool(early)
    )


def _copied(source: Tensor, device: torch.device) -> Tensor:
    """The right values, made on the device without touching the side streams."""
    return torch.arange(len(source), dtype=source.dtype, device=device)
