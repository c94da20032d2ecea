"""Compiles every Triton kernel as it would be launched, without a GPU.

The real driver is replaced by one that only names a target. Then the public functions are called, and a hook of Triton
notes what they would have compiled instead of compiling and launching it. Triton's wheel contains the assemblers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pqbench.kernels.reference.blocks import Residency
from pqbench.kernels.reference.rows import Blocks, HostTokens

triton = pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that one block may use
PROCESSORS = 132  # of an H100; they determine the number of parts of a row, and so the compiled code
HALF = torch.bfloat16


@dataclass(frozen=True)
class Launch:
    """The code that a launch would have compiled."""

    fn: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, int]

    @property
    def key(self) -> str:
        """Equal for launches of the same code."""
        return f"{self.fn} {self.signature} {self.constants} {self.attrs} {self.options}"


class Target:
    """A driver with a target but without a device."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return -1  # Triton keeps kernels by device: those of a real one stay apart

    def get_current_stream(self, device: int) -> int:
        return 0


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def calls(backend: ModuleType, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Representative calls: 4 query heads per KV head, head dimension 128, keys and values side by side in storage."""
    q, rows = random(1, 2, 4, 128, dtype=dtype), random(1, 2, 640, 2, 128, dtype=dtype)
    keys, values, mha = rows[:, :, :, 0], rows[:, :, :, 1], random(1, 2, 1, 128, dtype=dtype)
    indices, visible = torch.zeros(1, 2, 96, dtype=torch.int64), torch.ones(1, 2, 4, 96, dtype=torch.bool)
    prompt, wide = random(1, 2, 4, 64, 128, dtype=dtype), random(1, 2, 640, 256, dtype=dtype)

    def score(m: int, b: int, query: Tensor) -> object:
        codes = torch.zeros(1, 2, 640, m, dtype=torch.uint8)
        return backend.pq_probabilities(query, random(1, 2, m, 2**b, 128 // m), codes, 0.1)

    def select(m: int, b: int, query: Tensor, tensors: bool, heads: int = 2, tokens: int = 640) -> object:
        codes, kept = torch.empty(1, heads, tokens, m, dtype=torch.uint8), torch.ones(1, heads, dtype=torch.bool)
        book = random(1, heads, m, 2**b, 128 // m)
        if not tensors:
            return backend.pq_select(query, book, codes, 0.1, 4, 64, tokens + 8, tokens, 80)
        four, many, every, middle = (torch.tensor([n], dtype=torch.int32) for n in (4, 64, tokens + 8, tokens))
        out = torch.zeros(1, heads, 80, dtype=torch.int64)
        return backend.pq_select(query, book, codes, 0.1, four, many, every, middle, 80, kept, out)

    def search(m: int, b: int, query: Tensor) -> object:
        starts, waiting = (
            torch.zeros(1, 2, 2 ** (m * b) + 1, dtype=torch.int32),
            torch.zeros(1, 2, 64, dtype=torch.int32),
        )
        return backend.best_of_cells(
            query, random(1, 2, m, 2**b, 128 // m), starts, waiting[:, :, :0], waiting, 32, 0.1
        )

    uses: dict[str, Callable[[], object]] = {
        "attention": lambda: backend.attention(q, keys, values, 0.1, indices),
        "attention, all wanted": lambda: backend.attention(
            q, keys, values, 0.1, indices, visible, True, torch.zeros(1, 2, 4, 96)
        ),
        "attention, all rows": lambda: backend.attention(mha, keys, values, 0.1),
        "attention, D=256": lambda: backend.attention(wide[:, :, :8], wide, wide, 0.1),
        "attention, D=64": lambda: backend.attention(q[..., :64], keys[..., :64], values[..., :64], 0.1, indices),
        "attention, G=32": lambda: backend.attention(random(1, 2, 32, 128, dtype=dtype), keys, values, 0.1),
        "exact_probabilities": lambda: backend.exact_probabilities(q, keys, 0.1),
        "exact_probabilities, D=256": lambda: backend.exact_probabilities(wide[:, :, :8], wide, 0.1),
        "pq_probabilities, m=2": lambda: score(2, 6, q),
        "pq_probabilities, m=4": lambda: score(4, 8, q),
        "pq_probabilities, G=1": lambda: score(4, 8, mha),
        "pq_probabilities, G=32": lambda: score(4, 8, random(1, 2, 32, 128, dtype=dtype)),
        "pq_select, 2x6": lambda: select(2, 6, q, False),
        "pq_select, 4x8": lambda: select(4, 8, q, False),
        "best_of_cells, 2x6": lambda: search(2, 6, q),
        "best_of_cells, 2x8, G=1": lambda: search(2, 8, mha),
        "train_codebook, m=2": lambda: backend.train_codebook(keys, 2, 64, 1, 0),
        "train_codebook, m=4": lambda: backend.train_codebook(keys, 4, 256, 1, 0),
        "encode, m=1": lambda: backend.encode(wide, random(1, 2, 1, 256, 256)),
        "column_sums": lambda: backend.column_sums(prompt, keys, 0.1),
        "column_sums, band": lambda: backend.column_sums(random(1, 2, 8, 32, 256, dtype=dtype), wide, 0.1, 64),
        "gather": lambda: backend.gather(keys, indices, random(1, 2, 96, 128, dtype=dtype)),
        "gather, both": lambda: backend.gather(rows, indices, random(1, 2, 96, 2, 128, dtype=dtype)),
        "top_k, short": lambda: backend.top_k(random(1, 2, 200), 100),
        "top_k, long": lambda: backend.top_k(random(1, 2, 20000), 100),
    }
    if dtype != HALF:
        return uses
    other = {group: random(1, 2, group, 128, dtype=dtype) for group in (7, 32)}
    return uses | {
        "attention, its count on the device": lambda: backend.attention(
            q, keys, values, 0.1, indices, count=torch.tensor([9], dtype=torch.int32)
        ),
        "dense attention, its count on the device": lambda: backend.dense_attention(
            q, keys, values, 0.1, torch.tensor([9], dtype=torch.int32)
        ),
        "pq_select, 4x8, numbers on the device": lambda: select(4, 8, q, True),
        "pq_select, 2x6, 128K": lambda: select(2, 6, random(1, 8, 4, 128, dtype=dtype), False, 8, 131_072),
        "pq_select, 4x8, 1M": lambda: select(4, 8, random(1, 8, 4, 128, dtype=dtype), True, 8, 1 << 20),
        "pq_select, 2x6, G=1": lambda: select(2, 6, mha, True),
        "pq_select, 4x8, G=7": lambda: select(4, 8, other[7], False),
        "pq_select, 4x8, G=32": lambda: select(4, 8, other[32], False),
        "pq_select, 8x8": lambda: select(8, 8, q, False),
        "noise": lambda: backend.noise(2, 100, 3, torch.device("cpu")),
    }


def row_calls(backend: ModuleType, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls by which a step with a host store writes, finds and copies rows, and moves blocks into and out of the block
    cache."""
    rows, table = random(1, 2, 640, 2, 128, dtype=dtype), random(1000, 2, 128, dtype=dtype)
    new, indices, known = random(1, 2, 1, 128, dtype=dtype), torch.zeros(1, 2, 96, dtype=torch.int64), torch.zeros(700)
    local, tally, at = known.long(), torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    tokens = HostTokens(0, 650, rows, 640, rows[:, :, :64])
    blocks = Blocks(torch.zeros(1, 1024).long(), 128, 80, torch.zeros(1, 1024).int())
    residency = Residency.empty(1, 64, known.device)._replace(where=blocks.where)
    pairs, slots = (rows[..., 0, :], rows[..., 1, :]), torch.zeros_like(indices)

    def fetch(blocks: Blocks | None, count: int | Tensor | None) -> object:
        return backend.fetch_rows(indices, local, table, 300, 600, tokens, tally, blocks, count)

    return {
        "append": lambda: backend.append_rows(new, new, *pairs, 600),
        "append, number on the device": lambda: backend.append_rows(new, new, *pairs, at),
        "append to a ring": lambda: backend.append_rows(new, new, *pairs, 600, local, 4),
        "append to a ring, number on the device": lambda: backend.append_rows(new, new, *pairs, at, local, 4),
        "copy": lambda: backend.copy(rows[:, :, :100, :1], random(1, 2, 100, 1, 128, dtype=dtype)),
        "fetch": lambda: fetch(None, None),
        "fetch, number on the device": lambda: fetch(None, at),
        "fetch beside blocks": lambda: fetch(blocks, None),
        "admit, lfu": lambda: backend.admit_blocks(blocks.counts, 900, 32, True, residency, tally),
        "admit, lru": lambda: backend.admit_blocks(blocks.counts, at, 32, False, residency, tally),
        "admit, 1M tokens": lambda: backend.admit_blocks(
            torch.zeros(1, 8192).int(),
            8000,
            64,
            True,
            Residency.empty(1, 1024, known.device)._replace(where=torch.zeros(1, 8192).long()),
            tally,
        ),
        "vacate": lambda: backend.vacate_rows(indices, slots, table, 300, 600, blocks),
        "copy blocks": lambda: backend.copy_blocks(torch.zeros(1, 32, 2).long(), tokens, table, 300, blocks),
    }


@contextmanager
def noting(folder: Path) -> Iterator[Callable[[str, Callable[[], object]], list[Launch]]]:
    """A function that makes a call under a name, and returns the code that it would have compiled."""
    from pqbench.kernels.gpu import launch as gpu_launch

    with triton.knobs.cache.scope(), triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.cache.dir = str(folder)
        triton.runtime.driver.set_active(Target())
        patch.setattr(gpu_launch, "processors", lambda _: PROCESSORS)
        try:
            yield note
        finally:
            triton.runtime.driver._active = None


def note(name: str, call: Callable[[], object]) -> list[Launch]:
    recorder = Recorder(name, {})
    triton.knobs.runtime.jit_cache_hook = recorder
    call()
    triton.knobs.runtime.jit_cache_hook = None
    return list(recorder.noted.values())


def launches(folder: Path) -> dict[str, Launch]:
    """All code that the representative calls would compile, by name, without duplicates."""
    from pqbench.kernels import gpu

    noted: dict[str, Launch] = {}
    with noting(folder):
        for dtype in (HALF, torch.float32):
            for name, call in {**calls(gpu, dtype), **row_calls(gpu, dtype)}.items():
                triton.knobs.runtime.jit_cache_hook = Recorder(f"{name}, {str(dtype).split('.')[1]}", noted)
                call()
        triton.knobs.runtime.jit_cache_hook = None
    return noted


class Recorder:
    """Notes launches under a name, without duplicates; its return value tells Triton not to compile."""

    def __init__(self, name: str, noted: dict[str, Launch]) -> None:
        self.name, self.noted = name, noted

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002 - Triton's name
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        launch = Launch(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options)
        if launch.key not in {other.key for other in self.noted.values()}:
            self.noted[f"{fn.name.split('.')[-1]} ({self.name}{self._step(launch)})"] = launch
        return True

    @staticmethod
    def _step(launch: Launch) -> str:
        names = launch.fn.arg_names
        return f", byte {launch.constants[(names.index('step'),)]}" if "step" in names else ""


def compiled(launch: Launch, arch: int) -> Any:
    source = triton.compiler.ASTSource(launch.fn, launch.signature, launch.constants, launch.attrs)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=launch.options)


def resources(cubin: bytes, folder: Path) -> SimpleNamespace:
    """Registers and bytes of local memory per thread; values spill to local memory if there are too few registers."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return SimpleNamespace(registers=found["REG"], local=found["STACK"] + found["LOCAL"])


def check(arch: int, folder: Path) -> None:
    """Compile all code for one architecture. No kernel may spill registers or need more shared memory than there is.
    The message of a failure lists registers and shared memory of every kernel."""
    table, bad = [], []
    for name, launch in launches(folder).items():
        kernel = compiled(launch, arch)
        used = resources(kernel.asm["cubin"], folder)
        line = f"{name}: {used.registers} registers, {used.local} spilled, {kernel.metadata.shared} shared"
        table.append(line)
        if used.local or kernel.metadata.shared > SHARED[arch]:
            bad.append(line)
    assert not bad, "\n".join([f"sm_{arch}:", *bad, "", "all:", *table])
