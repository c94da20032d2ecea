"""The type of numbers that may be on the host or on the device."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Number: TypeAlias = int | Tensor
"""A number that changes from step to step: a Python int, or an int32 tensor with one element, which the kernels of a
GPU read on the device, so that a captured CUDA graph replays with new numbers."""
