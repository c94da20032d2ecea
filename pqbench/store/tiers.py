"""Tiers: where keys and values are stored while decoding. A tier is configuration; a tier that was opened for a device
(a placement) stores prompts."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import psutil
import torch

from pqbench.errors import ConfigError, RoomError
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import Split
from pqbench.store.base import Store
from pqbench.store.device import DeviceRows, DeviceStore
from pqbench.store.host.blocks import POLICIES, CacheOptions
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import Link
from pqbench.store.link.cuda import CudaLink
from pqbench.store.link.emulated import EmulatedLink, speed
from pqbench.store.link.local import LocalLink
from pqbench.typed import check_types

log = logging.getLogger(__name__)


class Prompt(ABC):
    """The prompt of one layer and cohort after the prefill. It makes the stores of all methods that decode from it."""

    @abstractmethod
    def store(self, split: Callable[[int], Split | None] | None) -> Store:
        """A new store. ``split`` returns the budget's split at a context length; it is None, or returns None, for a
        method that attends to everything."""

    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the prompt that are on the device now."""
        return []

    def let_go(self) -> None:  # noqa: B027 - where rows stay on the device anyway
        """Called when all indexes are built: free the rows that were held on the device to build them."""


class Placement(ABC):
    """A tier that was opened for one device and one prefill; it owns the link, if there is one."""

    @abstractmethod
    def prompt(self, keys: GrowingBuffer, values: GrowingBuffer, reserve: int = 0) -> Prompt:
        """Take over the rows ``[B, H, S, D]`` of one layer and cohort when its prefill is complete. A host tier starts
        to move them and returns at once. Memory for ``reserve`` more tokens is taken before decoding starts."""

    def close(self) -> None:  # noqa: B027 - nothing to end without a link
        """Close the link after every store has settled.

        Raises:
            OrderingError: a link with ``debug`` found transfers that were never waited for.
        """


LESS = "a shorter context, a smaller batch or dtype, or chunk=1024, which takes less for the prefill"


@dataclass(frozen=True)
class Need:
    """What a check of memory needs besides numbers of rows and bytes.

    Attributes:
        device: where the model runs.
        layers: number of layers that hold the rows.
        free: bytes that can still be allocated on the device.
        reserve: how many of the tokens are added by decoding.
        working: bytes that the prefill needs on the device, for its duration, in addition to keys and values.
    """

    device: torch.device
    layers: int
    free: int
    reserve: int = 0
    working: int = 0

    def page_locked(self, tokens: int, row_bytes: int) -> int:
        """Bytes of page-locked memory for ``tokens`` rows of ``row_bytes`` over all layers. There is a buffer for the
        prompt and one for the reserve in each layer, and torch rounds the size of each to a power of two."""
        parts = (part * row_bytes // self.layers for part in (tokens - self.reserve, self.reserve))
        return self.layers * sum(1 << max(size - 1, 0).bit_length() for size in parts if size > 0)

    def check_device(self, tokens: int, needed: int, advice: str) -> None:
        """Raises RoomError when the device has fewer free bytes than ``needed`` for ``tokens`` tokens plus those that
        the prefill works with. The message ends with ``advice``."""
        if needed + self.working > self.free:
            raise RoomError(
                f"{tokens} tokens of KV need {needed / 2**30:.1f} GiB of memory on {self.device}, their prefill "
                f"{self.working / 2**30:.1f} GiB, and {self.free / 2**30:.1f} GiB are free: {advice}"
            )


@dataclass(frozen=True)
class Tier(ABC):
    """Base of the tiers that conf/store/*.yaml configures."""

    offloads: ClassVar[bool] = False  # whether the prompt lies in host memory

    @abstractmethod
    def open(self, device: torch.device, backend: str = "auto") -> Placement:
        """A placement for one prefill on ``device``; ``backend`` names the kernels that find and move rows."""

    def why_not_captured(self) -> str | None:
        """Why a decode step over this tier cannot be captured in a CUDA graph, and what to set instead; None if it
        can."""
        return None

    def check(self, tokens: int, row_bytes: int, need: Need | None = None) -> None:  # noqa: B027 - see the subclasses
        """Raises RoomError when this machine cannot hold ``tokens`` rows of ``row_bytes`` over all layers."""


class DevicePrompt(Prompt):
    """A prompt whose rows stay where the prefill wrote them; stores share them without a copy."""

    def __init__(self, keys: GrowingBuffer, values: GrowingBuffer, backend: str = "auto") -> None:
        self._keys, self._values, self._backend = keys, values, backend
        self._lease: list[DeviceRows] = []

    def tensors(self) -> list[torch.Tensor]:
        return [self._keys.view(), self._values.view()]

    def store(self, split: Callable[[int], Split | None] | None) -> DeviceStore:
        return DeviceStore(self._keys.fork(), self._values.fork(), self._lease, self._backend)


class DevicePlacement(Placement):
    """The placement of the device tier; nothing is moved."""

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend

    def prompt(self, keys: GrowingBuffer, values: GrowingBuffer, reserve: int = 0) -> DevicePrompt:
        for buffer in (keys, values):
            buffer.reserve(len(buffer) + reserve)
        return DevicePrompt(keys, values, self._backend)


@dataclass(frozen=True)
class DeviceTier(Tier):
    """All keys and values are on the accelerator."""

    def check(self, tokens: int, row_bytes: int, need: Need | None = None) -> None:
        if need is not None:
            way_out = "store=host, " if need.device.type == "cuda" else ""
            need.check_device(tokens, tokens * row_bytes, f"use {way_out}{LESS}")

    def open(self, device: torch.device, backend: str = "auto") -> DevicePlacement:
        return DevicePlacement(backend)


class OffloadedPrompt(Prompt):
    """A prompt whose rows are on the host, or on their way there; stores share them."""

    def __init__(self, rows: HostPrompt, tier: HostTier, scratch: Scratch, backend: str, reserve: int) -> None:
        self._rows, self._tier, self._scratch, self._backend, self._reserve = rows, tier, scratch, backend, reserve

    def tensors(self) -> list[torch.Tensor]:
        return [] if self._rows.near is None else list(self._rows.near)

    def let_go(self) -> None:
        self._rows.near = None

    def store(self, split: Callable[[int], Split | None] | None) -> HostStore:
        tier, split = self._tier, _everything if split is None else split
        cache = tier.cache_for(self._rows.length + self._reserve)
        return HostStore(
            self._rows, split, tier.margin, tier.background, self._scratch, cache, self._backend, self._reserve
        )


class HostPlacement(Placement):
    """The placement of the host tier. All prompts use one link, and all stores fetch whole contexts into one buffer."""

    def __init__(self, tier: HostTier, link: Link, backend: str) -> None:
        self.tier, self.link, self.backend = tier, link, backend
        self._scratch = Scratch()

    def prompt(self, keys: GrowingBuffer, values: GrowingBuffer, reserve: int = 0) -> OffloadedPrompt:
        rows = HostPrompt.offload(self.link, keys.view(), values.view())
        if not self.tier.background:
            rows.wait()
        return OffloadedPrompt(rows, self.tier, self._scratch, self.backend, reserve)

    def close(self) -> None:
        self.link.close()


@dataclass(frozen=True)
class HostTier(Tier):
    """All keys and values are on the host; sinks, window and cached blocks are on the device as well.

    Attributes:
        link: auto (cuda on a GPU, otherwise local), local, cuda, a preset of :mod:`pqbench.store.link.emulated`, or
            numbers such as ``20GB/s+5us``.
        cache_tokens: tokens per layer and KV head that the block cache holds; 0 for no cache.
        cache_block: tokens of a block.
        cache_policy: which block leaves the cache first, lfu (least frequently used) or lru (least recently used).
        cache_admit: largest number of blocks that enter the cache in one step.
        cache_per_head: every KV head has its own blocks; otherwise the KV heads of a sequence share them.
        background: run transfers beside the computation; False waits for each at once, with the same results.
        debug: fill targets of transfers with NaN until they are waited for, and report buffers that are used too early.
        margin: tokens that the device holds beyond the window; half as many are copied to the host at a time.
    """

    offloads: ClassVar[bool] = True

    link: str = "auto"
    cache_tokens: int = 0
    cache_block: int = 128
    cache_policy: str = "lfu"
    cache_admit: int = 32
    cache_per_head: bool = False
    background: bool = True
    debug: bool = False
    margin: int = 64
    _told: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # a note is logged only once

    def __post_init__(self) -> None:
        check_types(self, "store")
        if self.link not in ("auto", "local", "cuda"):
            speed(self.link)
        if self.cache_block < 1:
            raise ConfigError(f"store.cache_block is {self.cache_block}: a block has at least 1 token")
        if self.cache_tokens < 0:
            raise ConfigError(f"store.cache_tokens is {self.cache_tokens}: use 0 for no cache")
        if 0 < self.cache_tokens < self.cache_block:
            raise ConfigError(f"store.cache_tokens is {self.cache_tokens}, less than one block of {self.cache_block}")
        if self.cache_policy not in POLICIES:
            raise ConfigError(f"store.cache_policy is {self.cache_policy!r}: use {' or '.join(POLICIES)}")
        if self.cache_admit < 1:
            raise ConfigError(f"store.cache_admit is {self.cache_admit}: a step lets in at least 1 block")
        if self.margin < 2:
            raise ConfigError(f"store.margin is {self.margin}: it must be at least 2 tokens")

    def cache_for(self, context: int) -> CacheOptions | None:
        """Options of the block cache for a context of ``context`` tokens; None without a cache. The cache is at most as
        large as the context, but holds at least one block."""
        if not self.cache_tokens:
            return None
        most = max(self.cache_block, context)
        return CacheOptions(
            min(self.cache_tokens, most), self.cache_block, self.cache_policy, self.cache_admit, self.cache_per_head
        )

    def why_not_captured(self) -> str | None:
        if self.link not in ("auto", "local", "cuda"):
            return f"store.link={self.link} is emulated, and nothing in a captured step takes its time: use auto"
        return None

    def check(self, tokens: int, row_bytes: int, need: Need | None = None) -> None:
        if self.cache_tokens > tokens and not self._told:
            self._told.append(tokens)
            log.info(
                "store.cache_tokens is %d, more than a context of %d tokens: the cache holds that context as a whole",
                self.cache_tokens,
                tokens,
            )
        needed, kind = tokens * row_bytes, "host memory"
        if need is not None and need.device.type != "cuda":
            need.check_device(tokens, needed, f"use {LESS}")  # its memory is that of the host
            return
        if need is not None:
            needed, kind = need.page_locked(tokens, row_bytes), "page-locked host memory (taken in powers of two)"
            layer = tokens * row_bytes // need.layers
            need.check_device(tokens, 2 * layer, f"use {LESS}")  # the copy to the host stacks keys and values
        free = psutil.virtual_memory().available
        if needed > free:
            raise RoomError(
                f"{tokens} tokens of KV need {needed / 2**30:.1f} GiB of {kind} and {free / 2**30:.1f} GiB are "
                f"available: use {LESS}"
            )

    def open(self, device: torch.device, backend: str = "auto") -> HostPlacement:
        return HostPlacement(self, self._link(device, backend), backend)

    def _link(self, device: torch.device, backend: str) -> Link:
        name = self.link if self.link != "auto" else "cuda" if device.type == "cuda" else "local"
        if name == "cuda":
            return CudaLink(device, backend, self.debug)
        if device.type != "cpu":
            raise ConfigError(f"store.link={name} serves models on the CPU, not on {device.type}: use auto or cuda")
        return LocalLink(self.debug) if name == "local" else EmulatedLink(speed(name), self.debug)


def _everything(_: int) -> Split | None:
    """The split of a method that attends to everything: None."""
    return None
