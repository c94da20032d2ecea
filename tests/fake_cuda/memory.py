"""Which fake host tensors stand for page-locked memory, and how fake tensors lie."""

from __future__ import annotations

from torch import Tensor


class Pinned:
    """The storages of page-locked tensors; they are kept, so that no other storage takes their place."""

    def __init__(self) -> None:
        self._storages: dict[int, object] = {}

    def add(self, *tensors: Tensor) -> None:
        """These tensors, and all views of their memory, are page-locked."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages


def dense(one: Tensor, other: Tensor) -> bool:
    """Whether both lie densely and in the same order of dimensions, so that one memcpy moves them."""
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
