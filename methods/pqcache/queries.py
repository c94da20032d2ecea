"""What an index learns from the prompt's queries: their second moment, and the last queries as examples."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.method import Geometry


class Moment:
    """Running second moment ``[B, H, D, D]`` of the queries of a query group. It is float64, so that the result does
    not depend on the blocks in which a prompt arrives."""

    def __init__(self, geometry: Geometry) -> None:
        shape = (geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.head_dim)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=geometry.device)
        self._count = 0

    def add(self, q: Tensor) -> None:
        """Add queries ``[B, H, G, n, D]``."""
        flat = q.float().flatten(2, 3)  # [B, H, G * n, D]
        self._sum = self._sum + (flat.transpose(2, 3) @ flat).double()
        self._count += flat.shape[2]

    def mean(self) -> Tensor:
        """Mean of q q^T ``[B, H, D, D]``; zero before the first query."""
        return self._sum / max(self._count, 1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._sum.nbytes


class SeenQueries:
    """The moment of all queries from position ``first`` on, and the last ``kept`` queries themselves.

    Attributes:
        moment: second moment of these queries.
        recent: the last queries ``[B, H, G, n, D]``, where n is at most ``kept``; None before the first query.
        last: position of the last query; -1 before the first query.
    """

    def __init__(self, geometry: Geometry, first: int, kept: int) -> None:
        self.moment = Moment(geometry)
        self.recent: Tensor | None = None
        self.last = -1
        self._first, self._kept = first, kept

    def add(self, q: Tensor, last: int) -> None:
        """Add the next queries ``[B, H, G, n, D]`` of the context, of which the last has position ``last``."""
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
