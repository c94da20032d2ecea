"""Handles every torch operation on fake tensors: checks devices, and counts launches, copies and waits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from pqbench.kernels import reference
from tests.fake_cuda.memory import Pinned, dense
from tests.fake_cuda.tally import COPY, TORCH, Tally

LARGE = 1 << 16  # host operations with at least this many elements are noted
aten = torch.ops.aten
# Operations that read the size of their result from the device, and therefore wait.
SIZED = {
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "allclose",
    "repeat_interleave",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_qr",
}
ALLOCATES = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "resize_",
    "empty_permuted",
    "_unsafe_view",
    "detach_",
    "lift",
    "set_",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
TRUE, FALSE = {"ones", "ones_like", "new_ones", "isfinite"}, {"zeros", "zeros_like", "isnan", "isinf", "isin"}
KEEPS = {
    "_to_copy",
    "view",
    "expand",
    "all",
    "any",
    "clone",
    "ne",
    "slice",
    "select",
    "unsqueeze",
    "constant_pad_nd",
    "stack",
    "cat",
}


class FakeCuda(FakeTensorMode):
    """Fake tensors that never ask for a real device, whatever ``torch.cuda.is_available`` returns in a test."""

    @property
    def avoid_device_init(self) -> bool:
        return True


class Counting(TorchDispatchMode):
    """Passes operations on to the mode of fake tensors. Results that depend on data get plausible values."""

    def __init__(self, tally: Tally, pinned: Pinned) -> None:
        super().__init__()
        self.tally, self.pinned = tally, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if func.namespace == "prim":  # asks for a tensor's device
            return func(*args, **kwargs)
        handler: Callable[..., Any] | None = getattr(self, f"_do_{name}", None)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if name in INDEXING:
            args = self._indexed(func, args)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(func, name, args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        pin = kwargs.pop("pin_memory", None)
        args, kwargs = self._on_one_device(name, args, kwargs)
        given = _tensors((args, kwargs))
        result = self._sized(func, name, args, kwargs) if name in SIZED else func(*args, **kwargs)
        made = _tensors(result)
        for generator in (part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch._C.Generator)):
            if made and made[0].is_cuda != on_device(generator):
                self.tally.fault(f"{name} on {made[0].device} draws from a generator that is elsewhere")
        if pin:
            self.pinned.add(*made)
        self._count(func, name, given, made)
        self._mark(name, given, made)
        return result

    def _count(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        if name in ALLOCATES or _is_view(func):
            return
        size = max((tensor.numel() for tensor in (made or given)), default=0)
        if any(tensor.is_cuda for tensor in (*given, *made)):
            if size or name in SIZED:
                self.launched(TORCH, name)
        elif size >= LARGE:
            self.tally.on_host(name, size)

    def launched(self, kind: str, name: str) -> None:
        """Count work given to the current stream."""
        self.tally.add(kind, name)
        self.tally.streams[self.tally.stream, name] += 1

    def _on_one_device(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments on one device. Beside tensors of the device, a host tensor is a fault, unless it is a single
        number."""
        tensors = _tensors((args, kwargs))
        if not any(tensor.is_cuda for tensor in tensors):
            return args, kwargs
        strays = [tensor for tensor in tensors if not tensor.is_cuda and tensor.dim() > 0]
        if not strays:
            return args, kwargs
        self.tally.fault(f"{name} mixes tensors on cuda:0 with a host tensor of shape {list(strays[0].shape)}")
        return tree_map_only(Tensor, lambda x: x if x.is_cuda or x.dim() == 0 else x.to("cuda:0"), (args, kwargs))

    def _indexed(self, func: Any, args: Any) -> Any:
        """Indexing accepts host indices, but copies them and waits. A mask is turned into indices, which also waits."""
        source, indices, *rest = args
        if not source.is_cuda:
            return args
        changed = []
        for index in indices:
            if index is not None and not index.is_cuda and index.dim():
                self.tally.add(COPY, "index from the host")
                self.tally.wait("index from the host")
                index = index.to("cuda:0")  # noqa: PLW2901
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                if rest and rest[0].numel() == 1 and len([i for i in indices if i is not None]) == 1:
                    changed.append(index)  # torch fills by the mask
                    continue
                self.tally.wait("index by a mask")
                self.launched(TORCH, "nonzero")
                count = max(1, index.numel() // 2)
                changed += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
            else:
                changed.append(index)
        return (source, changed, *rest)

    def _sized(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result, with a plausible size, of an operation that waits for the size of its result."""
        first: Tensor = args[0]
        if first.is_cuda:
            self.tally.wait(name)
        count = _found_by_top_k() or max(1, first.numel() // 2)
        if name == "nonzero":
            return first.new_empty(count, first.dim(), dtype=torch.int64)
        if name == "masked_select":
            return first.new_empty(count)
        if name == "bincount":
            return first.new_empty(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 1)), dtype=torch.int64)
        if name == "repeat_interleave":
            return first.new_empty(kwargs.get("output_size") or count, dtype=torch.int64)
        if "unique" in name:
            return first.new_empty(count), first.new_empty(first.shape).long(), first.new_empty(count).long()
        if name in ("equal", "allclose"):
            return True
        return func(*args, **kwargs)

    def _mark(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        """Remember the likely values of booleans: keys are finite, and no sequence has ended."""
        truth = None
        if name in TRUE | FALSE:
            truth = name in TRUE
        elif given and (name in KEEPS):
            truth = getattr(given[0], "truth", None)
        elif name in ("bitwise_or", "logical_or") and all(hasattr(tensor, "truth") for tensor in given):
            truth = any(tensor.truth for tensor in given)  # type: ignore[attr-defined]
        if truth is not None:
            for tensor in made:
                tensor.truth = truth  # type: ignore[attr-defined]

    def _do__local_scalar_dense(self, func: Any, x: Tensor) -> Any:
        if x.is_cuda:
            self.tally.wait("item")
        else:
            try:
                return func(x)
            except DataDependentOutputException:
                pass
        if x.dtype is torch.bool:
            return getattr(x, "truth", True)
        return 1.0 if x.dtype.is_floating_point else int(getattr(x, "truth", True))

    def _do_copy_(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
        if target.is_cuda == source.is_cuda:
            return self._run(func, "copy_", (target, source), {})
        self._crossed(source, target, non_blocking)
        return func(target, source)

    def _do__to_copy(self, func: Any, x: Tensor, *, non_blocking: bool = False, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        pin = kwargs.pop("pin_memory", None)
        result = func(x, **kwargs)
        if device is None or torch.device(device).type == x.device.type:
            self._count(func, "_to_copy", [x], [result])
        else:
            if pin or (non_blocking and x.is_cuda):  # torch allocates pinned memory for it
                self.pinned.add(result)
            self._crossed(x, result, non_blocking)
        self._mark("_to_copy", [x], [result])
        return result

    def _crossed(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """A copy between host and device. It does not wait if it is non-blocking, the host side is pinned and both
        sides are dense in the same order. Otherwise torch copies through a temporary buffer in pageable memory."""
        if not target.numel():
            return
        device, host = (target, source) if target.is_cuda else (source, target)
        way = "to the device" if target.is_cuda else "to the host"
        self.tally.add(COPY, way)
        same = dense(source, target)
        through_host = not same and not host.is_contiguous()
        if not device.is_contiguous() and not same:
            self.launched(TORCH, "copy_")
        if not non_blocking or host not in self.pinned or through_host or source.dtype != target.dtype:
            why = "blocking" if not non_blocking else "not pinned" if host not in self.pinned else "strided"
            self.tally.wait(f"{why} copy {way}")

    def _do_scaled_dot_product_attention(
        self, func: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        (q, k, v, args), kwargs = self._on_one_device("scaled_dot_product_attention", (q, k, v, args), kwargs)
        heads = q.shape[1] if kwargs.get("enable_gqa") else k.shape[1]
        if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or (q.dim() == 4 and heads != q.shape[1]):
            self.tally.fault(f"attention of {list(q.shape)} over {list(k.shape)} and {list(v.shape)}")
        if q.is_cuda:
            self.launched(TORCH, "scaled_dot_product_attention")
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    def _do_pin_memory(self, func: Any, x: Tensor, *args: Any) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        self.pinned.add(result)
        return result

    def _do_is_pinned(self, func: Any, x: Tensor, *args: Any) -> bool:
        return x in self.pinned


def on_device(generator: torch._C.Generator) -> bool:
    """Whether a generator represents one on the device."""
    return generator.initial_seed() % 2 == 1


def _found_by_top_k() -> int:
    """How many numbers the reference's top_k is about to find; 0 if it is not running."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is reference.top_k.__code__:
            scores = frame.f_locals["scores"]
            return int(scores.numel() // scores.shape[-1] * frame.f_locals["count"])
        frame = frame.f_back
    return 0


def _tensors(parts: Any) -> list[Tensor]:
    return [part for part in tree_flatten(parts)[0] if isinstance(part, Tensor)]


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@contextmanager
def fake_cuda_mode(tally: Tally, pinned: Pinned) -> Iterator[Counting]:
    """Tensors made inside this block are fake, and operations on them are counted."""
    with FakeCuda(allow_non_fake_inputs=True), Counting(tally, pinned) as counting, torch.inference_mode():
        yield counting
