"""All ways to compute full attention of one decode step on this machine. Each is timed together with the methods."""

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
class SdpaBackend:
    """An SDPA back-end that torch offers on a GPU. ``widened`` is the size of its float32 copies of K and V, in units
    of the bytes of K and V. ``repeats`` says whether it repeats KV heads for the query heads that share them."""

    name: str
    backend: SDPBackend
    widened: int = 0
    repeats: bool = False

    def copies(self, repeated: int) -> int:
        """How often K and V are copied if the form repeats the KV heads ``repeated`` times."""
        own = repeated if self.repeats else 0
        return own + self.widened * max(1, own)


BACKENDS = (
    SdpaBackend("flash", SDPBackend.FLASH_ATTENTION),
    SdpaBackend("cudnn", SDPBackend.CUDNN_ATTENTION),
    SdpaBackend("efficient", SDPBackend.EFFICIENT_ATTENTION, repeats=True),
    SdpaBackend("math", SDPBackend.MATH, widened=2, repeats=True),
)


class RefusedError(Exception):
    """A kernel does not support this shape, dtype or machine. This is a result, not a failure of the run."""


@dataclass(frozen=True)
class DenseKernel:
    """Full attention of one query per head.

    Attributes:
        name: its name in tables.
        copies: how often it copies K and V.
        backend: the SDPA back-end that must compute; None leaves the choice to torch.
        captured: whether its step is replayed from a graph if the setting asks for graphs.
    """

    name: str
    run: Dense
    copies: int = 0
    backend: SDPBackend | None = None
    captured: bool = False

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside this context only its back-end computes SDPA. It is entered before a step is timed."""
        if self.backend is None:
            yield
            return
        with sdpa_kernel(self.backend):
            yield

    def check(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
        """Run the kernel once, so that problems are found before a step is timed.

        q ``[B, H, G, D]``, keys and values ``[B, H, S, D]``.

        Raises:
            MemoryError: the memory does not suffice for its copies of keys and values.
            RefusedError: its back-end does not support such tensors. The message contains torch's reasons.
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
    """A geometry whose full attention is computed by a given kernel, or by the backend's own kernel if none is
    given."""

    dense: DenseKernel | None = None

    @property
    def kernels(self) -> Kernels:
        """The backend's kernels, with the dense one replaced if a kernel was given."""
        backend = super().kernels
        return backend if self.dense is None else cast(Kernels, WithDense(backend, self.dense))


class WithDense:
    """A backend whose dense attention is another kernel. It has the interface of
    :class:`pqbench.kernels.backend.Kernels`."""

    def __init__(self, backend: Kernels, kernel: DenseKernel) -> None:
        self.__name__ = kernel.name
        self._backend, self._kernel = backend, kernel

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def dense_attention(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, *count: Any) -> Tensor:
        """Attention over all rows. It runs inside a timed step, so everything that can be checked before is checked in
        :meth:`DenseKernel.check`. If a ``count`` of rows is given, the backend's own kernel computes."""
        if count and count[0] is not None:
            return self._backend.dense_attention(q, keys, values, scaling, *count)
        return self._kernel.run(q, keys, values, scaling)


def dense_kernels(backend: Kernels, group: int, device: torch.device) -> list[DenseKernel]:
    """All ways to compute full attention on a device: torch's two forms with the back-end that torch chooses, on a GPU
    also with each back-end that torch has, and the backend's own kernel if it has one. ``group`` query heads share a KV
    head."""
    forms = (("grouped", _grouped, 0), ("enable_gqa", _enable_gqa, group))
    found = [DenseKernel(f"torch sdpa {form}", run, copies) for form, run, copies in forms]
    if device.type == "cuda":
        found += [
            DenseKernel(f"torch sdpa {known.name} {form}", run, known.copies(copies), known.backend)
            for known, (form, run, copies) in product(BACKENDS, forms)
        ]
    name = backend_name(backend)
    if name != "reference":
        found.append(DenseKernel(f"{name} dense", backend.dense_attention))
    return found


def captured_kernel(backend: Kernels) -> DenseKernel:
    """The backend's own kernel in a captured step. No other kernel can read the number of rows on the device."""
    return DenseKernel(f"{backend_name(backend)} dense captured", backend.dense_attention, captured=True)


def backend_name(backend: Kernels) -> str:
    """The short name of a backend, such as ``cpu`` for ``pqbench.kernels.cpu``."""
    return backend.__name__.rpartition(".")[2]


def _grouped(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention with the query group as query rows of one KV head, so that no KV head is repeated."""
    return functional.scaled_dot_product_attention(q, keys, values, scale=scaling)


def _enable_gqa(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention with one query row per query head, where torch assigns KV heads to query heads."""
    flat = q.flatten(1, 2)[:, :, None]  # [B, H * G, 1, D]
    return functional.scaled_dot_product_attention(flat, keys, values, scale=scaling, enable_gqa=True).view_as(q)
