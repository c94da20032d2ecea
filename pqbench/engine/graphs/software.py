"""A recording that takes the place of a CUDA graph on the CPU: every operation of a step is recorded and repeated.

A CUDA graph freezes everything that the host decided while it was captured: shapes, Python numbers and addresses. Only
the contents of memory may change from one replay to the next. The recording freezes the same things. A step that would
go wrong in a CUDA graph therefore goes wrong here, where tests can find it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pqbench.engine.graphs.base import Work
from pqbench.errors import ModelError
from pqbench.kernels.backend import Kernels

# Operations that make the host wait for a result of the device. Indexing with a bool tensor does so too, because its
# result has as many rows as there are hits.
_READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")


@dataclass(frozen=True)
class Launch:
    """One operation with its arguments and the tensors that it returned."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    given: list[Tensor]
    name: str

    def again(self) -> None:
        """Repeat the operation, and copy its results into the tensors of the first time, which later operations read.

        Raises:
            ModelError: the result has another shape now, which no graph can follow.
        """
        fresh = _tensors(self.run(*self.arguments, **self.options))
        for before, now in zip(self.given, fresh, strict=True):
            if before.shape != now.shape:
                raise ModelError(
                    f"{self.name} gave {tuple(before.shape)} when it was captured and now gives "
                    f"{tuple(now.shape)}: its shape depends on the step"
                )
            if before.data_ptr() != now.data_ptr():  # otherwise the result is a view or was written in place
                before.copy_(now)


class SoftwareGraph:
    """See :class:`pqbench.engine.graphs.base.Graph`.

    Torch operations are recorded one by one. A kernel is recorded as the GPU would receive it: every launch with
    Triton's interpreter, and the whole call with other backends. The kernel reads its numbers when it runs.
    """

    def __init__(self, backend: Kernels) -> None:
        self._backend = backend
        self._launches: list[Launch] = []
        self._inside = False  # a kernel, whose operations are not recorded one by one
        self._done = False

    def rehearse(self, work: Work) -> Tensor:
        """See :meth:`pqbench.engine.graphs.base.Graph.rehearse`."""
        return work()

    def capture(self, work: Work) -> Tensor:
        """See :meth:`pqbench.engine.graphs.base.Graph.capture`. Recording does the work, so that the first replay
        has nothing left to do.

        Raises:
            ModelError: the host reads what the device computes, which cannot be captured.
        """
        self._launches.clear()
        with self._kernels(), _Operations(self._operation):
            result = work()
        self._done = True
        return result

    def replay(self) -> None:
        """See :meth:`pqbench.engine.graphs.base.Graph.replay`."""
        if not self._done:
            for launch in self._launches:
                launch.again()
        self._done = False

    def _operation(self, run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run a torch operation, and record it unless it is part of a kernel."""
        result = run(*arguments, **options)
        if not self._inside:
            name = str(run.name())  # type: ignore[attr-defined]
            if _waits(name.partition(".")[0], arguments):
                raise ModelError(f"a captured step reads on the host what the device computes ({name})")
            self._launches.append(Launch(run, arguments, options, _tensors(result), name))
        return result

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Record kernels while this lasts."""
        interpreter = sys.modules.get("triton.runtime.interpreter")
        with ExitStack() as stack:
            if self._backend.__name__.endswith(".gpu") and interpreter is not None:
                stack.enter_context(self._kernel(interpreter.GridExecutor, "__call__"))
            else:
                for name in (name for name in vars(Kernels) if not name.startswith("_")):
                    stack.enter_context(self._kernel(self._backend, name))
            yield

    @contextmanager
    def _kernel(self, owner: Any, name: str) -> Iterator[None]:
        """Record calls of ``owner.name`` while this lasts."""
        kernel = getattr(owner, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return kernel(*arguments, **options)
            self._inside = True
            try:
                result = kernel(*arguments, **options)
            finally:
                self._inside = False
            self._launches.append(Launch(kernel, arguments, options, _tensors(result), name))
            return result

        setattr(owner, name, recorded)
        try:
            yield
        finally:
            setattr(owner, name, kernel)


class _Operations(TorchDispatchMode):
    """Passes every torch operation to ``record``."""

    def __init__(self, record: Callable[..., Any]) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._record(func, args, kwargs or {})


def _waits(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an operation makes the host wait for the device."""
    hits = name in _INDEXING and any(part is not None and part.dtype == torch.bool for part in arguments[1])
    return hits or name in _READS


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
