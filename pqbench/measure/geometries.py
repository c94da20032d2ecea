"""The shape of one attention layer in known models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pqbench.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """One attention layer: its heads, the width of a head, the number of such layers in the model, and the base of the
    rotary embedding."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    layers: int
    theta: float

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def frequencies(self, device: torch.device) -> Tensor:
        """Rotary frequencies ``[D / 2]`` in radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim
        return 1.0 / self.theta**exponents


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("llama31_8b", 32, 8, 128, 32, 500000.0),
            Shape("mistral_7b", 32, 8, 128, 32, 1000000.0),
            Shape("qwen25_7b", 28, 4, 128, 28, 1000000.0),
            Shape("smollm2", 9, 3, 64, 30, 100000.0),
            Shape("tiny", 4, 2, 16, 2, 10000.0),
        )
    }
)


def shape_of(name: str) -> Shape:
    """The shape with this name. Raises ConfigError when there is none."""
    if name not in SHAPES:
        raise ConfigError(f"benchmark.geometry is {name!r}: use one of {', '.join(SHAPES)}")
    return SHAPES[name]
