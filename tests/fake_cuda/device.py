"""A fake CUDA device: during one test, functions of torch.cuda are replaced by fakes that count."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pqbench.kernels import pages, reference
from tests.fake_cuda.launches import Launcher
from tests.fake_cuda.memory import Pinned
from tests.fake_cuda.mode import Counting, fake_cuda_mode
from tests.fake_cuda.tally import Tally

CUDA = torch.device("cuda", 0)
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry, by type of device
_CUDA, _META = 1, 14  # indices of two types of device in it


class FakeStream:
    """A stream that orders nothing; waits of the host for it are counted."""

    cuda_stream = 0

    def __init__(self, tally: Tally, name: str = "") -> None:
        self.device, self.tally, self.name = CUDA, tally, name or f"side {id(self)}"

    def wait_stream(self, other: FakeStream) -> None:
        """Work of this stream comes after that of another."""

    def wait_event(self, event: FakeEvent) -> None:
        """Work of this stream comes after an event."""

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        """An event after all work that the stream was given."""
        event = event or FakeEvent(self.tally)
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all work is done."""
        self.tally.known(self.name, self.tally.record())
        return True

    def synchronize(self) -> None:
        """Wait on the host."""
        self.tally.wait("stream.synchronize", self.name)


class FakeEvent:
    """An event; waits of the host for it are counted, unless the host knows that it has passed."""

    def __init__(self, tally: Tally) -> None:
        self.tally, self.stream, self.number = tally, "", 0

    def record(self, stream: FakeStream | None = None) -> None:
        """The event comes after all work that the stream was given."""
        self.stream, self.number = self.tally.stream if stream is None else stream.name, self.tally.record()

    def wait(self, stream: object = None) -> None:
        """Orders streams; the host does not wait."""

    def query(self) -> bool:
        """Whether it has passed."""
        self.tally.known(self.stream, self.number)
        return True

    def synchronize(self) -> None:
        """Wait on the host."""
        self.tally.wait("event.synchronize", self.stream, self.number)

    def elapsed_time(self, other: FakeEvent) -> float:
        """Milliseconds."""
        return 1.0


class FakeGenerator(torch.Generator):
    """A generator that says that it is on a device. Operations see another object with the same state, so the last bit
    of the seed marks the device; see :func:`tests.fake_cuda.mode.on_device`."""

    place: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> FakeGenerator:
        made: FakeGenerator = super().__new__(cls)
        made.place = torch.device(device)
        return made.manual_seed(0)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def manual_seed(self, seed: int) -> FakeGenerator:
        """Start from a seed."""
        super().manual_seed(seed % 2**60 * 2 + (self.place.type == "cuda"))
        return self


def _cuda(tally: Tally) -> dict[str, Any]:
    """Replacements of functions of torch.cuda."""
    default = FakeStream(tally, "default")
    streams = [default]

    def synchronize(*args: object) -> None:
        tally.wait_for_all("torch.cuda.synchronize")

    @contextmanager
    def stream(chosen: FakeStream | None) -> Iterator[None]:
        streams.append(chosen or streams[-1])
        tally.stream = streams[-1].name
        try:
            yield
        finally:
            streams.pop()
            tally.stream = streams[-1].name

    def make_stream(*args: Any, **options: Any) -> FakeStream:
        return FakeStream(tally)

    def make_event(*args: Any, **options: Any) -> FakeEvent:
        return FakeEvent(tally)

    facts = SimpleNamespace(
        name="fake",
        multi_processor_count=132,
        total_memory=80 << 30,
        major=9,
        minor=0,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        L2_cache_size=50 << 20,
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: facts.name,
        "is_initialized": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: facts,
        "mem_get_info": lambda *_: (facts.total_memory, facts.total_memory),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "synchronize": synchronize,
        "Stream": make_stream,
        "Event": make_event,
        "stream": stream,
        "current_stream": lambda *_: streams[-1],
        "default_stream": lambda *_: default,
        "device": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }


def _tolist(tally: Tally) -> Any:
    def tolist(self: Tensor) -> Any:
        if self.is_cuda:
            tally.wait("tolist")
        numbers = range(self.numel())
        truth = getattr(self, "truth", True)
        return _nested(list(self.shape), iter([truth] * len(numbers) if self.dtype is torch.bool else numbers))

    return tolist


def _nested(shape: list[int], numbers: Iterator[int]) -> Any:
    return [_nested(shape[1:], numbers) for _ in range(shape[0])] if shape else next(numbers)


def _host_kernel(tally: Tally, name: str) -> Any:
    """A kernel of the CPU backend: its call is noted, and its result has the shapes of the reference."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(part, Tensor) and part.is_cuda for part in args):
            tally.fault(f"the CPU's kernel {name} is given device memory")
        tally.on_host(f"the CPU's kernel {name}", max(x.numel() for x in args if isinstance(x, Tensor)))
        return getattr(reference, name)(*args, **kwargs)

    return run


class NoGuardsError(Exception):
    """This build of torch does not show where it keeps its device guards."""


@contextmanager
def _device_guard() -> Iterator[None]:
    """A build of torch without CUDA has no guard that switches to a CUDA device, but indexing needs one. Inside this
    block it finds the guard of another type of device, which has nothing to switch."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    try:
        guards = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(libraries[0])), _GUARDS)
    except (IndexError, OSError, ValueError) as error:
        raise NoGuardsError from error
    before = guards[_CUDA]
    if not before:
        guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


def _nothing(*args: object) -> None:
    """Replaces a call that only orders work or keeps something alive."""


class Device:
    """The fake device of one test: its tally, and its page-locked memory."""

    def __init__(self, tally: Tally, pinned: Pinned, counting: Counting) -> None:
        self.tally, self.pinned, self.counting = tally, pinned, counting


@contextmanager
def fake_device(patch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside this block ``cuda:0`` exists and nothing is computed. The owner of ``patch`` undoes it.

    Raises:
        NoGuardsError: this build of torch does not show its device guards.
    """
    from triton.runtime.jit import JITFunction

    from pqbench.kernels import cpu, gpu

    tally, pinned = Tally(), Pinned()
    with _device_guard(), fake_cuda_mode(tally, pinned) as counting, patch.context() as own:
        launcher = Launcher(tally, pinned, counting)
        for name, replacement in _cuda(tally).items():
            own.setattr(torch.cuda, name, replacement)
        own.setattr(JITFunction, "run", lambda kernel, *args, **options: launcher.launch(kernel, *args, **options))
        own.setattr(torch, "Generator", FakeGenerator)
        own.setattr(Tensor, "record_stream", _nothing)
        own.setattr(FakeTensor, "tolist", _tolist(tally))
        own.setattr(pages, "_LEAST", 1 << 62)  # memory maps hold real bytes
        for name in gpu.__all__:
            if hasattr(cpu, name) and hasattr(reference, name):
                own.setattr(cpu, name, _host_kernel(tally, name))
        yield Device(tally, pinned, counting)
