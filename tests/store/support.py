"""Shared by the tests of host stores: data that contain their own position, budgets, selections, and whole decodes.

Component 0 of a key is its position, so a wrong row is always noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pqbench.kernels.buffers import gather_rows
from pqbench.method import Budget, Split
from pqbench.store.base import Store
from pqbench.store.device import DeviceStore
from pqbench.store.host.blocks import CacheOptions
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import Link
from pqbench.store.link.local import LocalLink
from tests.support import store_of

PROMPT, STEPS, BATCH, HEADS, WIDTH = 150, 260, 2, 2, 4
BUDGET = Budget(sink=8, ratio=0.3, minimum=16)  # the window grows with the context
ROW = 2 * WIDTH * 4  # bytes of one row of one head
CACHES = {
    "none": None,
    "lfu": CacheOptions(64, 16, "lfu", 3),
    "lru": CacheOptions(64, 16, "lru", 3),
    "per_head": CacheOptions(32, 8, "lfu", 4, per_head=True),
}


class DirectLink(LocalLink):
    """A link over which kernels read rows directly, like the kernels of a GPU."""

    direct = True


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, count, D]``; component 0 is the position, the others are random."""
    keys, values = torch.randn(2, BATCH, HEADS, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    keys[..., 0] = values[..., 0] = torch.arange(count)
    return keys, values


def split_of(context: int) -> Split | None:
    """The budget of :data:`BUDGET`."""
    return BUDGET.resolve(context, PROMPT)


def open_store(
    keys: Tensor,
    values: Tensor,
    link: Link,
    cache: str = "none",
    overlap: bool = True,
    split: Callable[[int], Split | None] = split_of,
    scratch: Scratch | None = None,
    prompt: int = PROMPT,
    reserve: int = 0,
) -> HostStore:
    """A store over the first ``prompt`` tokens."""
    rows = HostPrompt.offload(link, keys[:, :, :prompt], values[:, :, :prompt])
    options = CACHES[cache]
    return HostStore(rows, split, 12, overlap, scratch, options, reserve=reserve)


def selections(count: int = STEPS, seed: int = 1) -> Iterator[Tensor | None]:
    """Rows of every step ``[B, H, n]``: sinks, window, and middle rows of which some are requested more often. Some
    steps request arbitrary rows in any order and more than once, or all rows."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        length = PROMPT + step + 1
        split = BUDGET.resolve(length, PROMPT)
        first, stop = split.middle(length)
        if step % 23 == 22:
            yield None
        elif step % 7 == 6:
            yield torch.randint(0, length, (BATCH, HEADS, 40), generator=generator)
        else:
            noise = torch.rand(BATCH, HEADS, stop - first, generator=generator)
            noise[..., (torch.arange(first, stop) // 9) % 5 == step // 40] += 0.5
            yield split.around(first + noise.topk(split.top_k).indices.sort().values, length)


def fetched(store: Store, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The fetched rows, ``[B, H, n, D]``."""
    keys, values, rows = store.fetch(indices)
    if rows is None:
        return keys.clone(), values.clone()
    return gather_rows(keys, rows), gather_rows(values, rows)


def wanted(twin: DeviceStore, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same rows from a device store."""
    if indices is None:
        return twin.keys(), twin.values()
    return gather_rows(twin.keys(), indices), gather_rows(twin.values(), indices)


def run(store: HostStore, keys: Tensor, values: Tensor, seed: int = 1) -> list[tuple[int, int, int, int]]:
    """Decode, and compare every step with a device store. Returns for each step the bytes to device and to host, hits
    and lookups so far."""
    twin, meters = store_of(keys[:, :, :PROMPT], values[:, :, :PROMPT]), []
    for step, indices in enumerate(selections(seed=seed)):
        at = PROMPT + step
        for each in (store, twin):
            each.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        for got, want in zip(fetched(store, indices), wanted(twin, indices), strict=True):
            assert torch.equal(got, want), step
        assert torch.equal(store.positions, twin.positions)
        assert (store.length, store.seen) == (twin.length, twin.seen)
        meters.append(
            (store.usage.bytes_to_device, store.usage.bytes_to_host, store.usage.cache_hits, store.usage.cache_lookups)
        )
    store.settle()
    assert torch.equal(store.stored_keys(), keys[:, :, : PROMPT + STEPS])
    assert torch.equal(store.values(), values[:, :, : PROMPT + STEPS])
    return meters
