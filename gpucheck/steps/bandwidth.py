"""Step 4: the time of every kernel at 128K tokens against the bytes that it must move, full attention by every back-end
of torch, and rows read directly from host memory against a plain copy over the same link.

Only bytes that no implementation can avoid are counted: every input is read once and every output is written once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpucheck.options import Options
from gpucheck.result import Result
from pqbench.kernels import reference
from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.measure.machine import bandwidth
from pqbench.method import Split
from pqbench.store.tiers import HostTier

HBM = {"H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.04e12, "H200": 4.8e12, "A100-SXM4-80GB": 2.04e12, "B200": 8.0e12}
GATHERED = (4_096, 32_768, 102_400)  # rows of 512 bytes
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
AHEAD = 800_000  # clock cycles (half a millisecond) of pause, in which the host launches the timed work
SHORT = 10e-6  # seconds; work that could move its bytes faster is limited by its launch
NEAR = 0.02  # largest difference of a back-end from the definition, as a share of the largest value


@dataclass(frozen=True)
class Timed:
    """Work to be timed. ``computes`` says that it is limited by arithmetic and not by bytes; ``selects`` says that it
    is the whole selection of a step."""

    name: str
    run: Callable[[], Any]
    nbytes: float
    computes: bool = False
    selects: bool = False

    def bound(self, most: float) -> str:
        """The best possible limit of this work, if memory moves ``most`` bytes per second."""
        return "compute" if self.computes else "memory" if self.nbytes / most > SHORT else "launch"


class Stopwatch:
    """Times work on a device. Caches are overwritten before every run, as other layers do in a model. The GPU pauses
    until all launches are queued, so that the time of the host is not measured."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats = device, repeats
        self._sweep = torch.zeros((1 << 26) if device.type == "cuda" else 1024, device=device)

    def seconds(self, run: Callable[[], Any], sweep: bool = True) -> float:
        """Median seconds of a run, after three uncounted ones; on a GPU only the time of the GPU."""
        if self.device.type != "cuda":
            return median(self._wall(run) for _ in range(self._repeats))
        spans = []
        for _ in range(3 + self._repeats):
            if sweep:
                self._sweep.add_(1.0)
            torch.cuda._sleep(AHEAD)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            spans.append((start, stop))
        torch.cuda.synchronize(self.device)
        return median(start.elapsed_time(stop) for start, stop in spans[3:]) / 1e3

    @staticmethod
    def _wall(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


@dataclass(frozen=True)
class Shape:
    """The shape of one layer of Llama-3.1-8B, or of a small layer."""

    tokens: int
    heads: int = 8
    group: int = 4
    width: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def row(self) -> int:
        """Bytes of one key or value."""
        return self.width * self.dtype.itemsize


@torch.inference_mode()
def run(result: Result, options: Options) -> None:
    """Time the kernels first, then back-ends of full attention, then the link."""
    device = torch.device(options.device)
    shape = Shape(600, 2, 2, 32, torch.float32) if options.tiny else Shape(131_072)
    watch = Stopwatch(device, 1 if options.tiny else 30)
    with result.guarded("memory bandwidth"):
        roof = bandwidth(device, size=1 << 20 if options.tiny else None)
        named = next((value for name, value in HBM.items() if name in str(result.machine.get("device"))), None)
        most = named or roof.copy
        result.row("memory bandwidth", copy_gbps=roof.copy / 1e9, data_sheet_gbps=named and named / 1e9)
    case = Case(shape, device)
    for timed in case.kernels(kernels(torch.device("cpu"), "gpu")):
        with result.guarded(timed.name):
            seconds = watch.seconds(timed.run)
            rate = timed.nbytes / seconds
            result.row(
                timed.name,
                microseconds=seconds * 1e6,
                gbps=rate / 1e9,
                hbm_share=rate / most,
                copy_share=rate / roof.copy,
                bound=timed.bound(most),
                selects=timed.selects,
                tokens=shape.tokens,
                shown=["microseconds", "gbps", "hbm_share", "bound"],
            )
    _backends(result, case, watch, most)
    rate = _link(result, device, watch, options)
    for count in case.counts():
        with result.guarded(f"fetch {count} rows a head by the host store"):
            _fetched(result, case, watch, count, rate)


class Case:
    """Tensors of one layer: q ``[1, H, G, D]``, keys and values ``[1, H, S, D]``, codes ``[1, H, S, 4]``."""

    parts = 4

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).to(shape.dtype)

        self.shape, self.device, self.scaling = shape, device, shape.width**-0.5
        self.clusters = min(256, shape.tokens // 32)
        heads, tokens, width = shape.heads, shape.tokens, shape.width
        self.q, self.keys, self.values = (
            normal(1, heads, shape.group, width),
            normal(1, heads, tokens, width),
            normal(1, heads, tokens, width),
        )
        self.codebook = torch.randn(1, heads, self.parts, self.clusters, width // self.parts, device=device)
        drawn = torch.randint(self.clusters, (1, heads, tokens, self.parts), device=device, generator=generator)
        self.codes = drawn.to(torch.uint8)
        self.order = torch.rand(1, heads, tokens, generator=generator, device=device).argsort(-1)

    def kernels(self, body: Kernels) -> Iterator[Timed]:
        """Every kernel of a decode step and of the index, with the bytes that it must move."""
        shape, scaling = self.shape, self.scaling
        q, keys, values, codebook, codes = self.q, self.keys, self.values, self.codebook, self.codes
        pair, table, scores = 2 * keys.nbytes, codes.nbytes + codebook.nbytes, shape.heads * shape.tokens * 4
        found = body.pq_probabilities(q, codebook, codes, scaling)
        for count in self.counts():
            rows = self.order[:, :, :count].sort(-1).values
            attended = 2 * shape.heads * count * shape.row + rows.nbytes
            yield Timed(
                f"attention over {count} rows", partial(body.attention, q, keys, values, scaling, rows), attended
            )
            yield Timed(f"top_k {count}", partial(body.top_k, found, count), scores + 8 * shape.heads * count)
            yield from self._select(body, count)
            target = keys.new_empty(1, shape.heads, count, shape.width)
            copied = 2 * target.nbytes + rows.nbytes
            yield Timed(f"gather {count} rows on the device", partial(body.gather, keys, rows, target), copied)
        yield Timed("dense attention", partial(body.dense_attention, q, keys, values, scaling), pair)
        yield Timed("pq_probabilities", partial(body.pq_probabilities, q, codebook, codes, scaling), table + scores)
        exact = partial(body.exact_probabilities, q, keys, scaling)
        yield Timed("exact_probabilities", exact, keys.nbytes + scores)
        yield Timed("encode 16 keys", partial(body.encode, keys[:, :, :16], codebook), codebook.nbytes)
        rounds = 5 if self.clusters == 256 else 1
        train = partial(body.train_codebook, keys, self.parts, self.clusters, rounds, 0, 128 * self.clusters)
        yield Timed("train_codebook", train, keys.nbytes + codes.nbytes, computes=True)

    def _select(self, body: Kernels, count: int) -> Iterator[Timed]:
        """Scores and top-k in one call, if the backend has it, and the same with 32 sinks and a window of 32."""
        select: Any = getattr(body, "pq_select", None)
        if select is None:
            return
        sink, middle = 32, self.shape.tokens - 64
        call = partial(
            select,
            self.q,
            self.codebook,
            self.codes,
            self.scaling,
            sink,
            count,
            self.shape.tokens,
            middle,
            sink + count + 32,
        )
        moved = self.codes.nbytes + self.codebook.nbytes + 8 * self.shape.heads * (count + 64)
        yield Timed(f"pq_select {count}", call, moved, selects=count <= 1024)

    def counts(self) -> tuple[int, ...]:
        """The numbers of selected rows: 1024, and a tenth of the context."""
        return (min(1_024, self.shape.tokens // 4), self.shape.tokens // 10)


def _backends(result: Result, case: Case, watch: Stopwatch, most: float) -> None:
    """Full attention by every back-end, with the query group as rows of a KV head, and with torch's repetition of KV
    heads."""
    q, keys, values = case.q, case.keys, case.values
    flat = q.flatten(1, 2)[:, :, None]  # [1, H * G, 1, D]
    attend = functional.scaled_dot_product_attention
    ways = {
        "grouped": partial(attend, q, keys, values, scale=case.scaling),
        "enable_gqa": partial(attend, flat, keys, values, scale=case.scaling, enable_gqa=True),
    }
    expected = reference.attention(q, keys, values, case.scaling)[0].float()
    for name, backend in BACKENDS.items():
        for way, call in ways.items():
            label = f"sdpa {name} {way}"
            try:
                with sdpa_kernel(backend):
                    error = float((call().reshape(q.shape).float() - expected).abs().max() / expected.abs().max())
                    seconds = watch.seconds(call)
            except RuntimeError as reason:  # not every back-end supports every shape
                result.row(label, skipped=" ".join(str(reason).split())[:200])
                continue
            result.row(
                label,
                None if error <= NEAR else False,
                microseconds=seconds * 1e6,
                error_of_largest=error,
                hbm_share=2 * keys.nbytes / seconds / most,
            )


def _fetched(result: Result, case: Case, watch: Stopwatch, count: int, rate: float) -> None:
    """The work of a host store without a block cache in a decode step: find the selected rows and fetch them."""
    split = Split(sink=32, window=32, top_k=count)
    placement = HostTier().open(case.device)
    prompt = placement.prompt(GrowingBuffer(case.keys), GrowingBuffer(case.values))
    store = prompt.store(lambda _: split)
    prompt.let_go()
    store.settle()
    store.usage.open()
    first, stop = split.middle(case.shape.tokens)
    chosen = case.order[case.order.ge(first) & case.order.lt(stop)].view(1, case.shape.heads, -1)[:, :, :count]
    indices = split.around(chosen.sort(-1).values, case.shape.tokens)
    seconds = watch.seconds(partial(store.fetch, indices))
    moved = 2 * case.shape.heads * count * case.shape.row
    result.row(
        f"fetch {count} rows a head by the host store",
        microseconds=seconds * 1e6,
        gbps=moved / seconds / 1e9,
        memcpy_share=moved / seconds / rate if rate else None,
    )
    store.settle()
    placement.close()


def _link(result: Result, device: torch.device, watch: Stopwatch, options: Options) -> float:
    """Time page-locking, copies, and rows gathered by a kernel that reads host memory. Returns the bytes per second of
    a copy to the device."""
    body, pinned = kernels(torch.device("cpu"), "gpu"), options.on_gpu
    rows = 8 * 262_144 if not options.tiny else 2_048  # rows of 512 bytes, together 1 GiB
    with result.guarded("page-locking"):
        began = time.perf_counter()
        table = torch.empty(1, 8, rows // 8, 256, dtype=torch.bfloat16, pin_memory=pinned)
        seconds = time.perf_counter() - began
        result.row("page-locking", seconds_a_gib=seconds * 2**30 / table.nbytes, gib=table.nbytes / 2**30)
    rate, there = 0.0, torch.empty_like(table, device=device)
    there.view(torch.int16).random_(0, 16_000)  # these bits hold no NaN
    table.copy_(there)
    with result.guarded("memcpy from the host"):
        seconds = watch.seconds(lambda: there.copy_(table, non_blocking=True), sweep=False)
        rate = table.nbytes / seconds
        back = watch.seconds(lambda: table.copy_(there, non_blocking=True), sweep=False)
        result.row("memcpy from the host", gbps=rate / 1e9, to_host_gbps=table.nbytes / back / 1e9)
    for count in GATHERED if not options.tiny else (64, 256):
        name = f"gather {count} rows of 512 bytes from the host"
        with result.guarded(name):
            indices = torch.rand(1, 8, rows // 8, device=device).argsort(-1)[:, :, : count // 8].sort(-1).values
            target = torch.zeros(1, 8, count // 8, 256, dtype=torch.bfloat16, device=device)
            seconds = watch.seconds(partial(body.gather, table, indices, target))
            same = torch.equal(target, there.gather(2, indices[..., None].expand(-1, -1, -1, 256)))
            got = target.nbytes / seconds
            result.row(
                name,
                None if same else False,
                gbps=got / 1e9,
                memcpy_share=got / rate if rate else None,
                microseconds=seconds * 1e6,
                rows=count,
            )
    return rate
