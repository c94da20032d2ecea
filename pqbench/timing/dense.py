"""Every way to compute full attention of one decode step here, each to be timed beside the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.nn import functional

from pqbench.kernels.backend import Kernels, Number
from pqbench.method import Geometry
from pqbench.timing.machine import available_bytes

Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class DenseKernel:
    """Full attention of one query per head, under the name that tables use. ``copies``: how often it copies K and V."""

    name: str
    run: Dense
    copies: int = 0


@dataclass(frozen=True)
class DenseGeometry(Geometry):
    """A geometry whose full attention is computed by a kernel of choice; without one, by the body's own."""

    dense: DenseKernel | None = None

    @property
    def kernels(self) -> Kernels:
        """The body's kernels, the dense one replaced."""
        body = super().kernels
        return body if self.dense is None else cast(Kernels, WithDense(body, self.dense))


class WithDense:
    """A kernels body whose dense attention is another kernel; satisfies :class:`pqbench.kernels.backend.Kernels`."""

    def __init__(self, body: Kernels, kernel: DenseKernel) -> None:
        self.__name__ = kernel.name
        self._body, self._kernel = body, kernel

    def __getattr__(self, name: str) -> object:
        return getattr(self._body, name)

    def dense_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None
    ) -> Tensor:
        """Attention over all rows; raises MemoryError before it would have to copy K and V into memory that is not
        there."""
        needed = self._kernel.copies * (keys.nbytes + values.nbytes)
        if needed > available_bytes(keys.device):
            raise MemoryError(f"{self._kernel.name} copies {needed / 1e9:.1f} GB of keys and values")
        return self._kernel.run(q, keys, values, scaling)


def dense_kernels(body: Kernels, group: int) -> list[DenseKernel]:
    """Every way to compute full attention here: torch's two, and the body's own where it has one."""
    found = [
        DenseKernel("torch sdpa grouped", _grouped),
        DenseKernel("torch sdpa enable_gqa", _enable_gqa, copies=group),
    ]
    name = body_name(body)
    if name != "reference":
        found.append(DenseKernel(f"{name} dense", body.dense_attention))
    return found


def body_name(body: Kernels) -> str:
    """``pqbench.kernels.cpu`` as ``cpu``."""
    return body.__name__.rpartition(".")[2]


def _grouped(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The query group as rows of one KV head: nothing is repeated."""
    return functional.scaled_dot_product_attention(q, keys, values, scale=scaling)


def _enable_gqa(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """One query row per query head; torch spreads the KV heads."""
    flat = q.flatten(1, 2)[:, :, None]  # [B, H * G, 1, D]
    return functional.scaled_dot_product_attention(flat, keys, values, scale=scaling, enable_gqa=True).view_as(q)
