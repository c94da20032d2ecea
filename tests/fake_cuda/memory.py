"""Which fake host tensors represent page-locked memory, and the memory layout of fake tensors."""

from __future__ import annotations

from torch import Tensor


class Pinned:
    """The storages of page-locked tensors; they are kept, so that no other storage gets the same address."""

    def __init__(self) -> None:
        self._storages: dict[int, object] = {}

    def add(self, *tensors: Tensor) -> None:
        """Mark these tensors, and all views of their memory, as page-locked."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages


def dense(one: Tensor, other: Tensor) -> bool:
    """Whether both tensors are dense with the same order of dimensions, so that one memcpy copies them."""
    kept = [i for i, size in enumerate(one.shape) if size > 1]
    strides = [[tensor.stride()[i] for i in kept] for tensor in (one, other)]
    if strides[0] != strides[1]:
        return False
    expected = 1
    for i in sorted(kept, key=lambda i: one.stride()[i]):
        if one.stride()[i] != expected:
            return False
        expected *= one.shape[i]
    return True
