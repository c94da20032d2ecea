"""Replaces Triton's launcher: checks the arguments of a kernel, and whether it would have to be compiled again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.fake_cuda.memory import Pinned
from tests.fake_cuda.mode import Counting
from tests.fake_cuda.tally import TRITON, Tally

LIMITS = (2**31 - 1, 65535, 65535)  # programs along each axis of a grid


class Launcher:
    """Replaces ``triton.runtime.jit.JITFunction.run``."""

    def __init__(self, tally: Tally, pinned: Pinned, counting: Counting) -> None:
        self.tally, self.pinned, self.counting = tally, pinned, counting

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Check one launch and count it."""
        del warmup
        name = kernel.fn.__name__
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in kernel.arg_names}
        bound = kernel.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._check_grid(name, grid(bound.arguments) if callable(grid) else grid)
        for key, value in bound.arguments.items():
            for part in _flat(value):
                self._check_pointer(name, key, part)
        key = (
            tuple(specialisation(param, bound.arguments[param.name]) for param in kernel.params),
            tuple(sorted(options.items())),
        )
        self.tally.keys.setdefault(name, set()).add(key)
        self.counting.launched(TRITON, name)

    def _check_grid(self, name: str, grid: Sequence[int]) -> None:
        for axis, (size, most) in enumerate(zip(grid, LIMITS, strict=False)):
            if not 1 <= size <= most:
                self.tally.fault(f"{name} is launched with {size} programs along axis {axis}, at most {most} fit")

    def _check_pointer(self, name: str, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() and not value.is_cuda and value not in self.pinned:
            self.tally.fault(f"{name} is given pageable host memory as {key}, shape {list(value.shape)}")


def specialisation(param: Any, value: Any) -> object:
    """The properties of the arguments for which Triton compiles a kernel again: the value of a constant; whether an
    integer needs 64 bits and, if it is specialised, whether it is 1 or a multiple of 16; type and alignment of a
    pointer."""
    if param.is_constexpr:
        return param.name, "constant", value
    return param.name, _kind(param, value)


def _kind(param: Any, value: Any) -> object:
    if isinstance(value, tuple | list):
        return tuple(_kind(param, part) for part in value)
    if isinstance(value, Tensor):
        aligned = None if param.do_not_specialize else value.storage_offset() * value.element_size() % 16 == 0
        return value.dtype, aligned
    if isinstance(value, bool) or value is None or not isinstance(value, int):
        return type(value).__name__
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    if param.do_not_specialize:
        return width
    return width, value == 1, value % 16 == 0 and not param.do_not_specialize_on_alignment


def _flat(value: Any) -> list[Any]:
    return [part for each in value for part in _flat(each)] if isinstance(value, tuple | list) else [value]
