"""What a prompt's queries tell an index: their second moment, and the last of them as a sample of what comes."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.method import Geometry


class Moment:
    """Running second moment of queries, ``[B, H, D, D]``, the query group together; float64, so that it does not matter
    in which blocks a prompt arrives."""

    def __init__(self, geometry: Geometry) -> None:
        shape = (geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.head_dim)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=geometry.device)
        self._count = 0

    def add(self, q: Tensor) -> None:
        """Count queries ``[B, H, G, n, D]``."""
        flat = q.float().flatten(2, 3)  # [B, H, G * n, D]
        self._sum = self._sum + (flat.transpose(2, 3) @ flat).double()
        self._count += flat.shape[2]

    def mean(self) -> Tensor:
        """Mean of q q^T ``[B, H, D, D]``; zero before any query."""
        return self._sum / max(self._count, 1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._sum.nbytes


class SeenQueries:
    """The moment of all queries from position ``first`` on, and the last ``kept`` queries themselves.

    Attributes:
        moment: see there.
        recent: ``[B, H, G, n, D]`` with n up to ``kept``, None before any.
        last: position of the last query.
    """

    def __init__(self, geometry: Geometry, first: int, kept: int) -> None:
        self.moment = Moment(geometry)
        self.recent: Tensor | None = None
        self.last = -1
        self._first, self._kept = first, kept

    def add(self, q: Tensor, last: int) -> None:
        """The next queries ``[B, H, G, n, D]`` of the context; ``last`` is the position of the last of them."""
        self.last = last
        begins = last - q.shape[3] + 1
        self.moment.add(q[:, :, :, max(0, self._first - begins) :])
        if self._kept:
            joined = q if self.recent is None else torch.cat([self.recent, q], dim=3)
            self.recent = joined[:, :, :, -self._kept :].clone()  # a view would hold the whole block

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.moment.nbytes + (0 if self.recent is None else self.recent.nbytes)
