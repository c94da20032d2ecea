"""Coordinates for product quantisation: a linear map of keys, and the matching map of queries that preserves q.k.

K-Means minimises the squared error in the coordinates that it is given. The error that matters is that of q.k, so the
coordinates can be chosen with the queries ("query-aware"). Every map here preserves q.k up to a constant per query. A
softmax over mapped tokens does not depend on this constant; :meth:`KeyMap.constant` adds it where mapped and exact
tokens are combined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("plain", "centred", "rotated", "query_aware")


@dataclass(frozen=True)
class KeyMap:
    """The maps k' = (k - offset) @ forward and q' = q @ backward, where forward @ backward.T = 1. Therefore q.k = q'.k'
    + q.offset.

    Attributes:
        forward, backward: ``[B, H, D, D']`` or ``[D, D']`` float32, None for the identity; D' is D, rounded up to a
            multiple of the sub-spaces.
        offset: ``[B, H, 1, D]`` float32, None for zero.
    """

    forward: Tensor | None = None
    backward: Tensor | None = None
    offset: Tensor | None = None

    def keys(self, keys: Tensor) -> Tensor:
        """Keys ``[B, H, S, D]`` in the coordinates of the codebook, on the keys' own device; float32 if mapped."""
        if self.offset is not None:
            keys = keys.float() - self.offset.to(keys.device)
        return keys if self.forward is None else keys.float() @ self.forward.to(keys.device)

    def queries(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, n, D]`` in the coordinates of the codebook, ``[B, H, n, D']``."""
        return q if self.backward is None else q.float() @ self.backward

    def moment(self, moment: Tensor) -> Tensor:
        """E[q' q'^T] of mapped queries, float32 ``[B, H, D', D']``, from ``moment`` = E[q q^T] ``[B, H, D, D]`` of the
        original ones."""
        moment = moment.float()
        return moment if self.backward is None else self.backward.transpose(-1, -2) @ moment @ self.backward

    def constant(self, q: Tensor) -> Tensor:
        """q.offset ``[B, H, n]`` of queries ``[B, H, n, D]``: the difference between q.k and q'.k'."""
        if self.offset is None:
            return torch.zeros(q.shape[:-1], device=q.device)
        return (q.float() * self.offset).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return sum(x.nbytes for x in (self.forward, self.backward, self.offset) if x is not None)


def key_map(kind: str, keys: Tensor, moment: Tensor, parts: int, seed: int, device: torch.device) -> KeyMap:
    """A map for a codebook of ``parts`` sub-spaces of equal width. If D is not a multiple of ``parts``, keys and
    queries are padded with zeros.

    ``plain`` is the paper's. ``centred`` subtracts the mean of the keys; Lloyd's algorithm commutes with translations,
    so this only reduces rounding errors. ``rotated`` spreads every direction over all sub-spaces by one fixed random
    rotation. ``query_aware`` is described in :func:`query_aware`.

    Args:
        kind: one of :data:`KINDS`.
        keys: ``[B, H, S, D]``, the keys that will be clustered.
        moment: ``[B, H, D, D]``, mean of q q^T.
        parts: sub-spaces of the codebook.
        seed: seed of the random rotation.
        device: where queries are.
    """
    if kind == "query_aware":
        return query_aware(moment, parts)
    offset = keys.float().mean(2, keepdim=True).to(device) if kind == "centred" else None
    width = keys.shape[-1]
    if kind != "rotated" and width % parts == 0:
        return KeyMap(offset=offset)
    turn = rotation(width, seed) if kind == "rotated" else torch.eye(width)
    turn = padded(turn, parts).to(device)
    return KeyMap(turn, turn, offset)


def query_aware(moment: Tensor, parts: int, ridge: float = 1e-3) -> KeyMap:
    """Coordinates in which squared error is the expected squared error of q.k over queries with E[q q^T] = ``moment``.

    With M = V L V^T, let forward = V L^(1/2) and backward = V L^(-1/2). Then |e forward|^2 = e M e^T = E[(q.e)^2] for
    an error e. The eigenvectors are distributed over the sub-spaces by :func:`dealt`. M is singular if queries span few
    directions; therefore ``ridge`` times the mean eigenvalue is added to all eigenvalues, which keeps the condition
    number below D / ridge + 1. Without any queries the map is the identity, up to the order of the dimensions.

    Args:
        moment: M, symmetric ``[B, H, D, D]``.
        parts: sub-spaces of the codebook.
        ridge: share of the mean eigenvalue that is added to every eigenvalue.
    """
    values, vectors = torch.linalg.eigh(moment.double())  # ascending
    values = values.clamp(min=0)
    level = values.mean(-1, keepdim=True)
    scale = torch.where(level > 0, values + ridge * level, torch.ones_like(values)).sqrt()
    scale = scale.unsqueeze(-2)
    both = [padded(x.flip(-1), parts) for x in (vectors * scale, vectors / scale)]
    order = dealt(both[0].shape[-1], parts, moment.device)
    return KeyMap(*(x[..., order].float() for x in both))


def padded(vectors: Tensor, parts: int) -> Tensor:
    """Vectors ``[..., D]`` padded with zeros to the next multiple of ``parts``."""
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[-1] % parts))


def dealt(dimension: int, parts: int, device: torch.device | None = None) -> Tensor:
    """An order ``[D]`` of directions that are sorted by weight. They are dealt like cards to the ``parts`` sub-spaces,
    back and forth, so that all sub-spaces get about the same weight."""
    ranks = torch.arange(dimension, device=device).view(-1, parts)  # each row is one round of dealing
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.reshape(-1)


def rotation(dimension: int, seed: int) -> Tensor:
    """A random rotation ``[D, D]`` float32, the same for the same seed (QR of a normal matrix)."""
    normal = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, upper = torch.linalg.qr(normal)
    return (basis * upper.diagonal().sign()).float()  # signs make the distribution uniform
