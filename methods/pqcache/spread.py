"""The spread: the likely error of a token's estimated logit, stored in four bits per token.

A logit q.k is estimated as q.c, where c is the vector that the codes of the key stand for. The weight of a token is the
exponential of its logit. If the error of the logit is normal with variance s, then E[exp(q.k)] = exp(q.c + s / 2). Over
queries with second moment M the variance is e M e, where e = k - c. Without the term s / 2, unusual keys, which are far
from every centroid, get too low a score and are missed when they are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import NibbleBuffer

_LEVELS = 15  # largest number of four bits
_TILE = 1 << 15  # tokens that are decoded at once


class Spread:
    """Half the variance of every token's logit. Its square root is quantised uniformly, so that zero stays zero.

    Attributes:
        moment: ``[B, H, D, D]``, second moment of queries in the codebook's coordinates, times the squared scaling.
        most: ``[B, H, 1]``, the largest half variance at the time of the codebook; larger ones are cut to it.
        numbers: the quantised number of each token, 0 to 15.
    """

    def __init__(self, keys: Tensor, codebook: Tensor, codes: Tensor, moment: Tensor, device: torch.device) -> None:
        """Compute the spread of mapped keys ``[B, H, S, D]`` with codes ``[B, H, S, m]``; the result is on
        ``device``."""
        half = half_variance(keys, codebook, codes, moment.to(keys.device))
        self.moment, self.most = moment.to(device), half.amax(2, keepdim=True).to(device)
        self.numbers = NibbleBuffer(self._quantised(half.to(device)))

    def of(self, keys: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        """Numbers uint8 ``[B, H, n]`` of later tokens with mapped keys ``[B, H, n, D]`` and codes ``[B, H, n, m]``."""
        return self._quantised(half_variance(keys, codebook, codes, self.moment))

    def added(self) -> Tensor:
        """The terms s / 2 that are added to the logits of all tokens, float32 ``[B, H, S]``."""
        pairs = self.numbers.pairs()
        both = torch.stack([pairs & _LEVELS, pairs >> 4], dim=3).flatten(2)[:, :, : len(self.numbers)]
        return (both.float() / _LEVELS).square() * self.most

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.moment.nbytes + self.most.nbytes + self.numbers.bytes

    def _quantised(self, half: Tensor) -> Tensor:
        share = (half / self.most).nan_to_num(0.0).clamp(0.0, 1.0)  # 0 / 0 if every key equals its centroid
        return (share.sqrt() * _LEVELS).round().to(torch.uint8)


def half_variance(keys: Tensor, codebook: Tensor, codes: Tensor, moment: Tensor) -> Tensor:
    """Half of e M e, float32 ``[B, H, S]``, where e is the key minus the vector that its codes stand for.

    Args:
        keys: ``[B, H, S, D]`` in the coordinates of the codebook.
        codebook, codes: ``[B, H, m, K, D/m]`` and ``[B, H, S, m]``.
        moment: M, ``[B, H, D, D]``.
    """
    parts = []
    for start in range(0, keys.shape[2], _TILE):
        block = slice(start, start + _TILE)
        error = keys[:, :, block].float() - decoded(codebook, codes[:, :, block])
        parts.append(((error @ moment) * error).sum(-1).clamp(min=0.0) / 2)
    return torch.cat(parts, dim=2)


def decoded(codebook: Tensor, codes: Tensor) -> Tensor:
    """The vectors ``[B, H, S, D]`` that codes ``[B, H, S, m]`` stand for."""
    index = codes.permute(0, 1, 3, 2).long()[..., None].expand(-1, -1, -1, -1, codebook.shape[4])  # [B, H, m, S, D/m]
    return codebook.gather(3, index).transpose(2, 3).flatten(3)
