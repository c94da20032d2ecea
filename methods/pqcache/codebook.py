"""In which coordinates keys are product-quantised: a linear map of keys, and the map of queries that undoes it.

K-Means minimises squared error in the coordinates it is given. What counts is the error of q.k, so the coordinates may
be chosen by the queries ("query-aware"). Every map here preserves q.k up to a constant per query, which a softmax over
mapped tokens does not see and :meth:`KeyMap.constant` gives back where tokens of both kinds meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("plain", "centred", "rotated", "query_aware")


@dataclass(frozen=True)
class KeyMap:
    """k' = (k - offset) @ forward and q' = q @ backward with forward @ backward.T = 1: q.k = q'.k' + q.offset.

    Attributes:
        forward, backward: ``[B, H, D, D']`` or ``[D, D']`` float32, None for the identity; D' is D, rounded up to a
            multiple of the sub-spaces.
        offset: ``[B, H, 1, D]`` float32, None for zero.
    """

    forward: Tensor | None = None
    backward: Tensor | None = None
    offset: Tensor | None = None

    def keys(self, keys: Tensor) -> Tensor:
        """Keys ``[B, H, S, D]`` in the coordinates of the codebook, on the device where they lie; float32 if mapped."""
        if self.offset is not None:
            keys = keys.float() - self.offset.to(keys.device)
        return keys if self.forward is None else keys.float() @ self.forward.to(keys.device)

    def queries(self, q: Tensor) -> Tensor:
        """Queries ``[B, H, n, D]`` whose products with mapped keys are those of the originals."""
        return q if self.backward is None else q.float() @ self.backward

    def moment(self, moment: Tensor) -> Tensor:
        """E[q' q'^T] of mapped queries, float32 ``[B, H, D', D']``; that of the originals is ``moment``
        ``[B, H, D, D]``."""
        moment = moment.float()
        return moment if self.backward is None else self.backward.transpose(-1, -2) @ moment @ self.backward

    def constant(self, q: Tensor) -> Tensor:
        """q.offset ``[B, H, n]`` of queries ``[B, H, n, D]``: what their products with mapped keys lack."""
        if self.offset is None:
            return torch.zeros(q.shape[:-1], device=q.device)
        return (q.float() * self.offset).sum(-1)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return sum(x.nbytes for x in (self.forward, self.backward, self.offset) if x is not None)


def key_map(kind: str, keys: Tensor, moment: Tensor, parts: int, seed: int, device: torch.device) -> KeyMap:
    """The map of one kind for a codebook of ``parts`` sub-spaces, all of one width: where D is no multiple of their
    number, keys and queries get zeros.

    ``plain`` is the paper's. ``centred`` removes the mean of the keys; Lloyd's algorithm commutes with translations, so
    only rounding improves. ``rotated`` spreads every direction over all sub-spaces by one fixed random rotation.
    ``query_aware`` see :func:`query_aware`.

    Args:
        keys: ``[B, H, S, D]``, those that will be clustered.
        moment: ``[B, H, D, D]``, mean of q q^T.
        seed: of the random rotation.
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

    With M = V L V^T: forward = V L^(1/2) and backward = V L^(-1/2), so |e forward|^2 = e M e^T = E[(q.e)^2]. The
    eigen-directions are dealt to the sub-spaces, see :func:`dealt`. Where queries span few directions M is singular:
    ``ridge`` times its mean eigenvalue is added to all eigenvalues, so the condition number stays below D / ridge + 1;
    without any queries the map is the identity, up to the order of the dimensions.

    Args:
        moment: symmetric ``[B, H, D, D]``.
        parts: sub-spaces of the codebook.
        ridge: see above.
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
    """Vectors ``[..., D]`` with zeros behind, up to the next multiple of ``parts``."""
    return torch.nn.functional.pad(vectors, (0, -vectors.shape[-1] % parts))


def dealt(dimension: int, parts: int, device: torch.device | None = None) -> Tensor:
    """Which direction, ordered by weight, goes where: ``[D]``. They are dealt like cards to the ``parts`` sub-spaces,
    back and forth, so that each gets as much weight as the others."""
    ranks = torch.arange(dimension, device=device).view(-1, parts)  # a round per row
    ranks[1::2] = ranks[1::2].flip(1)
    return ranks.T.reshape(-1)


def rotation(dimension: int, seed: int) -> Tensor:
    """A random rotation ``[D, D]`` float32, the same for the same seed (QR of a normal matrix)."""
    normal = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, upper = torch.linalg.qr(normal)
    return (basis * upper.diagonal().sign()).float()  # signs make the distribution uniform
