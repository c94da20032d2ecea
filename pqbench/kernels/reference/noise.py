"""Random numbers computed as a hash of seed, head and token, so that every backend computes the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
LEAST = -(2**31)  # smaller than all random numbers


def noise(heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """Uniform random numbers int32 ``[H, S]`` above :data:`LEAST`. The numbers of one head are all different, except
    that the lowest one may occur twice.

    They are two rounds of a 32-bit integer hash (xor-shift and multiplication, constants of "lowbias32" by C. Wellons),
    each a permutation of all 32-bit words. Two words that depend on the head are mixed in between, so that the numbers
    of one head are not a shifted copy of another's.

    Args:
        heads: H.
        tokens: S.
        seed: from 0 to 2**63 - 1.
        device: where the numbers are computed.
    """
    head = torch.arange(heads, dtype=torch.int64, device=device)[:, None]
    first = _mixed(_mixed(head + 0x9E3779B9) ^ (seed & _WORD))
    second = _mixed((first + (seed >> 32)) & _WORD)
    token = torch.arange(tokens, dtype=torch.int64, device=device)
    word = _mixed((_mixed(token ^ first) + second) & _WORD)
    return torch.where(word >= 2**31, word - 2**32, word).clamp(min=LEAST + 1).int()


def _mixed(word: Tensor) -> Tensor:
    """A permutation of the words 0 to 2**32 - 1."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)
