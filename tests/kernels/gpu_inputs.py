"""Shared by the checks of the Triton backend: the backend and its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.number import Number

Check = Callable[[torch.device, int], None]


def backend() -> Kernels:
    """The backend under test."""
    return kernels(torch.device("cpu"), "gpu")


def normal(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_rows(device: torch.device, batch: int, heads: int, total: int, count: int) -> Tensor:
    """Distinct rows ``[B, H, n]`` in random order."""
    noise = torch.rand(batch, heads, total, generator=torch.Generator().manual_seed(5))
    return noise.argsort(-1)[..., :count].to(device)


def on_device(number: int, device: torch.device) -> Number:
    """A number that a kernel reads from memory."""
    return torch.tensor([number], dtype=torch.int32, device=device)
