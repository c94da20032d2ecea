"""Every way to compute full attention of one decode step here, each to be timed beside the methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pqbench.kernels.backend import Kernels
from pqbench.method import Geometry
from pqbench.models.devices import available_bytes

Dense = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """An SDPA back-end that torch offers on a GPU. ``widened``: copies of K and V in float32, in units of their own
    bytes; ``repeats``: whether KV heads are repeated for the query heads that share them."""

    name: str
    backend: SDPBackend
    widened: int = 0
    repeats: bool = False

    def copies(self, repeated: int) -> int:
        """How often K and V are copied where a form repeats the KV heads ``repeated`` times."""
        own = repeated if self.repeats else 0
        return own + self.widened * max(1, own)


BACKENDS = (
    Backend("flash", SDPBackend.FLASH_ATTENTION),
    Backend("cudnn", SDPBackend.CUDNN_ATTENTION),
    Backend("efficient", SDPBackend.EFFICIENT_ATTENTION, repeats=True),
    Backend("math", SDPBackend.MATH, widened=2, repeats=True),
)


class RefusedError(Exception):
    """A kernel does not serve this shape, dtype or machine. That is an answer, not a failure of the run."""


@dataclass(frozen=True)
class DenseKernel:
    """Full attention of one query per head.

    Attributes:
        name: what tables call it.
        copies: how often it copies K and V.
        backend: the SDPA back-end that must compute it; None leaves the choice to torch.
        captured: its step is replayed from a graph where the setting asks for graphs.
    """

    name: str
    run: Dense
    copies: int = 0
    backend: SDPBackend | None = None
    captured: bool = False

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Its back-end and no other serves SDPA meanwhile. Entered before a step is timed."""
        if self.backend is None:
            yield
            return
        with sdpa_kernel(self.backend):
            yield

    def check(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        """Try it once, so that no timed step has anything to find out.

        q ``[B, H, G, D]``, keys and values ``[B, H, S, D]``.

        Raises:
            MemoryError: it would have to copy keys and values into memory that is not there.
            RefusedError: its back-end does not serve such tensors; the message holds torch's reasons.
        """
        needed = self.copies * (keys.nbytes + values.nbytes)
        if needed > available_bytes(keys.device):
            raise MemoryError(f"{self.name} copies {needed / 1e9:.1f} GB of keys and values")
        if self.backend is None:
            return
        with warnings.catch_warnings(record=True) as caught, self.chosen():
            warnings.simplefilter("always")
            try:
                self.run(q, keys, values, scaling)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reasons = [" ".join(str(warning.message).split()) for warning in caught]
                raise RefusedError(f"{self.name}: {'; '.join([*reasons, str(error)])}") from error


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

    def dense_attention(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, *count: Any) -> Tensor:
        """Attention over all rows. This runs inside a timed step: what has to be known beforehand is asked in
        :meth:`DenseKernel.check`. Where ``count`` says how many rows count, the body's own kernel computes."""
        if count and count[0] is not None:
            return self._body.dense_attention(q, keys, values, scaling, *count)
        return self._kernel.run(q, keys, values, scaling)


def dense_kernels(body: Kernels, group: int, device: torch.device) -> list[DenseKernel]:
    """Every way to compute full attention on a device: torch's two forms by the back-end that torch chooses, on a GPU
    also by each back-end there is, and the body's own where it has one. ``group`` query heads share a KV head."""
    forms = (("grouped", _grouped, 0), ("enable_gqa", _enable_gqa, group))
    found = [DenseKernel(f"torch sdpa {form}", run, copies) for form, run, copies in forms]
    if device.type == "cuda":
        found += [
            DenseKernel(f"torch sdpa {known.name} {form}", run, known.copies(copies), known.backend)
            for known, (form, run, copies) in product(BACKENDS, forms)
        ]
    name = body_name(body)
    if name != "reference":
        found.append(DenseKernel(f"{name} dense", body.dense_attention))
    return found


def captured_kernel(body: Kernels) -> DenseKernel:
    """The body's own kernel in a captured step; it alone reads on the device how many rows there are."""
    return DenseKernel(f"{body_name(body)} dense captured", body.dense_attention, captured=True)


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
