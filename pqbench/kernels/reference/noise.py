"""Random numbers that are a hash of a seed, a head and a token: every backend computes the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
LEAST = -(2**31)  # below all noise


def noise(heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """Int32 ``[H, S]`` above :data:`LEAST`, uniform, and all different in a head (up to that bound).

    Two rounds of a 32-bit integer hash (xor-shift and multiplication, constants by C. Wellons, "lowbias32"), each a
    permutation of all words, with two words of a head's own between them: no head's numbers are another's, shifted.

    Args:
        seed: from 0 to 2**63 - 1.
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
