"""Triton: the hash of :mod:`pqbench.kernels.reference.noise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch

_BLOCK = 1024


@triton.jit
def mixed(word: tl.tensor) -> tl.tensor:
    """A permutation of all 32-bit words."""
    word = word ^ (word >> 16)
    word = word * tl.full([], 0x7FEB352D, tl.uint32)
    word = word ^ (word >> 15)
    word = word * tl.full([], 0x846CA68B, tl.uint32)
    return word ^ (word >> 16)


@triton.jit(do_not_specialize=["tokens", "low", "high"])
def fill_noise(noise: tl.tensor, tokens: tl.tensor, low: tl.tensor, high: tl.tensor, block: tl.constexpr) -> None:
    """Write a block of the random numbers int32 ``[H, S]`` of one head, from the two words of a seed."""
    head, n = tl.program_id(1), tl.program_id(0) * block + tl.arange(0, block)
    start = mixed(head.to(tl.uint32, bitcast=True) + tl.full([], 0x9E3779B9, tl.uint32))
    first = mixed(start ^ low.to(tl.uint32, bitcast=True))
    second = mixed(first + high.to(tl.uint32, bitcast=True))
    word = mixed(mixed(n.to(tl.uint32, bitcast=True) ^ first) + second).to(tl.int32, bitcast=True)
    tl.store(noise + head.to(tl.int64) * tokens + n, tl.maximum(word, -2147483647), mask=n < tokens)


def noise(heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """See :func:`pqbench.kernels.reference.noise.noise`."""
    numbers = torch.empty(heads, tokens, dtype=torch.int32, device=device)
    low = seed & 0xFFFFFFFF
    with launch.on(numbers):
        fill_noise[(launch.blocks(tokens, _BLOCK), heads)](
            numbers, tokens, low - (low >> 31 << 32), seed >> 32, block=_BLOCK, **launch.options()
        )
    return numbers
