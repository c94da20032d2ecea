"""The hash of :mod:`pqbench.kernels.reference.noise`, compiled; it is faster than a sequential generator."""

from __future__ import annotations

import numpy as np
from numba import njit

from pqbench.kernels.cpu.vector import INLINE, OPTIONS


@njit(**INLINE)
def _mixed(word: np.uint32) -> np.uint32:
    word = np.uint32(word ^ (word >> np.uint32(16)))  # numba widens results; they are cut to 32 bits again
    word = np.uint32(word * np.uint32(0x7FEB352D))
    word = np.uint32(word ^ (word >> np.uint32(15)))
    word = np.uint32(word * np.uint32(0x846CA68B))
    return np.uint32(word ^ (word >> np.uint32(16)))


@njit(**OPTIONS)
def fill_noise(target: np.ndarray, low: int, high: int) -> None:
    """Random numbers int32 ``[H, S]`` from the two words of a seed. One thread is enough: it is done before another
    one would wake."""
    heads, tokens = target.shape
    for head in range(heads):
        first = _mixed(np.uint32(_mixed(np.uint32(head + 0x9E3779B9)) ^ np.uint32(low)))
        second = _mixed(np.uint32(first + np.uint32(high)))
        row = target[head]
        for token in range(tokens):
            word = _mixed(np.uint32(_mixed(np.uint32(np.uint32(token) ^ first)) + second))
            row[token] = np.int32(max(np.int32(word), np.int32(-(2**31) + 1)))
