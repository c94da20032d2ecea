"""What every KV tier offers to a layer: append, fetch, drop, and meters."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Store(ABC):
    """Keys and values of one layer for sequences of equal length; satisfies :class:`pqbench.method.KV`."""

    link_bytes: int = 0  # bytes moved between host and device so far

    @property
    @abstractmethod
    def length(self) -> int:
        """Rows held."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens appended so far, dropped ones included."""

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """Position of every row, int64 ``[B, H, length]``."""

    @abstractmethod
    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @abstractmethod
    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, H, n, D]``."""

    @abstractmethod
    def fetch(self, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of rows ``[B, H, n]`` on the device; of all rows when None."""

    @abstractmethod
    def keep(self, indices: Tensor) -> None:
        """Hold only rows ``[B, H, n]``, in that order, and free the rest."""

    @abstractmethod
    def drop(self, indices: Tensor) -> None:
        """Remove rows ``[B, H, e]``; see :func:`pqbench.kernels.buffers.swap_remove` for the order of what remains."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """KV bytes on the accelerator."""

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """KV bytes in host memory."""
