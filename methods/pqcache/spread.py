"""How far a token's estimated logit is likely to be off, in four bits of its index.

A logit q.k is estimated as q.c, where c is what the codes of the key stand for. The weight of a token is the
exponential of its logit; for a normal error of variance s, E[exp(q.k)] = exp(q.c + s / 2). Over queries with second
moment M the variance is e M e with e = k - c. Without s / 2 the rare keys, which lie far from every centroid, are
judged too low and are missed in just the steps that need them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import NibbleBuffer

_LEVELS = 15  # of four bits
_TILE = 1 << 15  # tokens that are decoded at once


class Spread:
    """Half the variance of the logit of every token, quantised evenly in its square root: an error of zero stays zero.

    Attributes:
        moment: ``[B, H, D, D]`` of queries in the codebook's coordinates, times the squared scaling.
        most: ``[B, H, 1]``, the largest of the tokens it was made from; later tokens are cut there.
        numbers: the quantised number of each token, 0 to 15.
    """

    def __init__(self, keys: Tensor, codebook: Tensor, codes: Tensor, moment: Tensor, device: torch.device) -> None:
        """For mapped keys ``[B, H, S, D]`` with their codes ``[B, H, S, m]``; kept on ``device``."""
        half = half_variance(keys, codebook, codes, moment.to(keys.device))
        self.moment, self.most = moment.to(device), half.amax(2, keepdim=True).to(device)
        self.numbers = NibbleBuffer(self._quantised(half.to(device)))

    def of(self, keys: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        """Numbers uint8 ``[B, H, n]`` of further tokens: mapped keys ``[B, H, n, D]``, their codes ``[B, H, n, m]``."""
        return self._quantised(half_variance(keys, codebook, codes, self.moment))

    def added(self) -> Tensor:
        """What the logits of all tokens gain, float32 ``[B, H, S]``."""
        pairs = self.numbers.pairs()
        both = torch.stack([pairs & _LEVELS, pairs >> 4], dim=3).flatten(2)[:, :, : len(self.numbers)]
        return (both.float() / _LEVELS).square() * self.most

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.moment.nbytes + self.most.nbytes + self.numbers.bytes

    def _quantised(self, half: Tensor) -> Tensor:
        share = (half / self.most).nan_to_num(0.0).clamp(0.0, 1.0)  # 0 / 0 where every key is its centroid
        return (share.sqrt() * _LEVELS).round().to(torch.uint8)


def half_variance(keys: Tensor, codebook: Tensor, codes: Tensor, moment: Tensor) -> Tensor:
    """Half of e M e for e = key - what its codes stand for: float32 ``[B, H, S]``.

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
    """What codes ``[B, H, S, m]`` stand for: ``[B, H, S, D]``."""
    index = codes.permute(0, 1, 3, 2).long()[..., None].expand(-1, -1, -1, -1, codebook.shape[4])  # [B, H, m, S, D/m]
    return codebook.gather(3, index).transpose(2, 3).flatten(3)
