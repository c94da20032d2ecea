"""The three backends. They have the same functions (:class:`Kernels`); the reference backend defines the results."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.kernels.reference.blocks import Residency
from pqbench.kernels.reference.rows import Blocks, Found, HostTokens

BACKENDS = ("auto", "reference", "cpu", "gpu")


class Kernels(Protocol):
    """The operations of decode steps and indexes. A backend is a module with these functions; their arguments and
    shapes are documented in :mod:`pqbench.kernels.reference`."""

    __name__: str

    def attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        indices: Tensor | None = None,
        visible: Tensor | None = None,
        need_weights: bool = False,
        log_weights: Tensor | None = None,
        count: Number | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Exact attention over the rows given by ``indices``, or over all rows."""

    def dense_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None
    ) -> Tensor:
        """Exact attention over all rows, or the first ``count``, by the fastest kernel."""

    def pq_probabilities(self, q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
        """Approximate attention that each token would receive."""

    def pq_select(
        self,
        q: Tensor,
        codebook: Tensor,
        codes: Tensor,
        scaling: float,
        sink: Number,
        top_k: Number,
        length: Number,
        middle: Number,
        room: int,
        only: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The selection of a step: sinks, the middle tokens with the largest approximate attention, and the window."""

    def best_of_cells(
        self, q: Tensor, codebook: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, wanted: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """The tokens with the largest approximate attention, found in lists by cell, and the log-weight of the others;
        see :mod:`pqbench.kernels.reference.cells`."""

    def merge_lists(self, starts: Tensor, tokens: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Lists by cell after the pending tokens were added at their ends."""

    def exact_probabilities(self, q: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """Exact attention that each token would receive."""

    def top_k(self, scores: Tensor, count: int) -> Tensor:
        """Indices of the largest scores, in ascending order; of equal scores, the lower index is taken."""

    def train_codebook(
        self,
        keys: Tensor,
        parts: int,
        clusters: int,
        iterations: int,
        seed: int,
        sample: int | None = None,
        tolerance: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Codebook of keys, and their codes."""

    def encode(self, keys: Tensor, codebook: Tensor) -> Tensor:
        """Codes of keys in a given codebook."""

    def column_sums(self, q: Tensor, keys: Tensor, scaling: float, band: int | None = None, rows: int = 128) -> Tensor:
        """Attention that each key received from a block of prompt queries."""

    def noise(self, heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
        """Random numbers int32 ``[H, S]``, the same in every backend; see :mod:`pqbench.kernels.reference.noise`."""

    def gather(self, source: Tensor, indices: Tensor, target: Tensor) -> None:
        """Copy rows into a buffer."""

    def append_rows(
        self,
        keys: Tensor,
        values: Tensor,
        key_rows: Tensor,
        value_rows: Tensor,
        at: Number,
        local: Tensor | None = None,
        sinks: int = 0,
    ) -> None:
        """Write new rows into buffers; see :mod:`pqbench.kernels.reference.rows`."""

    def find_rows(
        self, indices: Tensor, local: Tensor, resident: int, where: Tensor | None = None, block: int = 1, first: int = 0
    ) -> Found:
        """Find tokens on the device, and those that are missing; see :mod:`pqbench.kernels.reference.rows`."""

    def fetch_rows(
        self,
        indices: Tensor,
        local: Tensor,
        table: Tensor,
        resident: int,
        staging: int,
        tokens: HostTokens,
        tally: Tensor,
        blocks: Blocks | None = None,
        count: Number | None = None,
    ) -> Tensor:
        """Find tokens on the device, after copying the missing ones from the host."""

    def vacate_rows(
        self, indices: Tensor, slots: Tensor, table: Tensor, resident: int, staging: int, blocks: Blocks
    ) -> None:
        """Save the rows of blocks that will be overwritten; see :mod:`pqbench.kernels.reference.rows`."""

    def copy_blocks(self, moves: Tensor, tokens: HostTokens, table: Tensor, resident: int, blocks: Blocks) -> None:
        """Copy blocks from the host to their slots in the cache."""

    def admit_blocks(
        self, counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
    ) -> Tensor:
        """Choose the blocks that enter a cache, and their slots; see :mod:`pqbench.kernels.reference.blocks`."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy between strided tensors, which may be in host memory."""

    def use_threads(self, count: int) -> None:
        """Set the number of threads that this backend uses when called from the current thread."""

    def warm_up(self) -> float:
        """Compile kernels before anything is timed. Returns the seconds that this took."""


@cache
def kernels(device: torch.device, backend: str = "auto") -> Kernels:
    """The backend for tensors on ``device``: with ``auto`` the compiled one, otherwise the one called ``backend``.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"kernels={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "gpu"}.get(device.type, "reference")
    return cast(Kernels, import_module(f"pqbench.kernels.{backend}"))
