"""Where KV lives while decoding: a tier is configuration; opened for a device it places prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import Split
from pqbench.store.base import Store
from pqbench.store.device import DeviceStore


class Prompt(ABC):
    """The finished prompt of one layer and group; every method's store over it is made here."""

    @abstractmethod
    def store(self, split: Callable[[int], Split | None] | None) -> Store:
        """A new store. ``split`` gives sinks and window at a context length, None (or a None result) for a method that
        attends to everything."""


class Placement(ABC):
    """A tier opened for one device and one prefill; it owns the link, if there is one."""

    @abstractmethod
    def prompt(self, keys: GrowingBuffer, values: GrowingBuffer) -> Prompt:
        """Take over the rows ``[B, H, S, D]`` of one layer and group when its prefill is complete; a host tier starts
        moving them and returns at once."""


@dataclass(frozen=True)
class Tier(ABC):
    """Base of the tiers that conf/store/*.yaml names."""

    @abstractmethod
    def open(self, device: torch.device, body: str = "auto") -> Placement:
        """Ready for one prefill on ``device``; ``body`` names the kernels that gather rows."""

    def check(self, tokens: int, row_bytes: int) -> None:  # noqa: B027 - a tier without limits of its own
        """Raise ConfigError when this machine cannot hold ``tokens`` rows of ``row_bytes`` over all layers."""


class DevicePrompt(Prompt):
    """Rows stay where the prefill left them; stores share them without a copy."""

    def __init__(self, keys: GrowingBuffer, values: GrowingBuffer) -> None:
        self._keys, self._values = keys, values
        self._lease: list[DeviceStore] = []

    def store(self, split: Callable[[int], Split | None] | None) -> DeviceStore:
        return DeviceStore(self._keys.fork(), self._values.fork(), self._lease)


class DevicePlacement(Placement):
    """Nothing moves."""

    def prompt(self, keys: GrowingBuffer, values: GrowingBuffer) -> DevicePrompt:
        return DevicePrompt(keys, values)


@dataclass(frozen=True)
class DeviceTier(Tier):
    """All KV on the accelerator."""

    def open(self, device: torch.device, body: str = "auto") -> DevicePlacement:
        return DevicePlacement()
