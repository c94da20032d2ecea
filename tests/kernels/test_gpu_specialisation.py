"""No context length makes Triton compile a kernel again, since a compilation while decoding takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pqbench.kernels.reference.rows import Blocks, HostTokens

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

HALF = torch.bfloat16
Use = Callable[[int], object]


def rows(count: int, width: int = 128, dtype: torch.dtype = HALF, heads: int = 2) -> Tensor:
    """Rows that are not initialised, so that long ones take no memory."""
    return torch.empty(1, heads, count, width, dtype=dtype)


def uses(width: int) -> dict[str, Use]:
    """Calls for a context length, on contiguous keys, whose strides grow with that length."""
    from pqbench.kernels import gpu

    q = torch.zeros(1, 2, 4, width, dtype=HALF)
    book = torch.zeros(1, 2, 2, 16, width // 2)

    def codes(n: int) -> Tensor:
        return rows(n, 2, torch.uint8)

    def chosen(n: int) -> Tensor:
        return torch.zeros(1, 2, n, dtype=torch.int64)

    table, tally = rows(999, width).view(-1, 2, width)[:500], torch.zeros(3, dtype=torch.int64)

    def fetch(n: int, known: bool) -> object:
        host, more = rows(2 * n, width).view(1, 2, n, 2, width), rows(2 * n + 14, width).view(1, 2, n + 7, 2, width)
        where = torch.zeros(1, n + 5, dtype=torch.int64)
        blocks = Blocks(where, 16, n, torch.zeros(1, n + 5, dtype=torch.int32)) if known else None
        tokens = HostTokens(n, 2 * n, host, 2 * n - 1, more)
        indices, local = chosen(n + 3), torch.zeros(2 * n, dtype=torch.int64)
        slots = gpu.fetch_rows(indices, local, table, n, 3 * n, tokens, tally, blocks, n)
        if blocks is not None:
            gpu.vacate_rows(indices, slots, table, n, 3 * n, blocks)
            gpu.copy_blocks(torch.zeros(1, 4, 2, dtype=torch.int64), tokens, table, n, blocks)
        return slots

    def append(n: int, local: Tensor | None) -> None:
        pairs = rows(2 * n, width).view(1, 2, n, 2, width)
        gpu.append_rows(rows(1, width), rows(1, width), pairs[..., 0, :], pairs[..., 1, :], n, local, n // 3)

    return {
        "append": lambda n: append(n, None),
        "append to a ring": lambda n: append(n, chosen(n)),
        "fetch": lambda n: fetch(n, False),
        "fetch beside blocks": lambda n: fetch(n, True),
        "gather": lambda n: gpu.gather(rows(n, width), chosen(5), rows(5, width)),
        "copy": lambda n: gpu.copy(rows(2 * n, width)[:, :, :n], rows(n, width)),
        "attention": lambda n: gpu.attention(q, rows(n, width), rows(n, width), 0.1),
        "attention of rows": lambda n: gpu.attention(q, rows(n, width), rows(n, width), 0.1, chosen(n)),
        "weights": lambda n: gpu.attention(
            q, rows(n, width), rows(n, width), 0.1, None, torch.ones(1, 2, 4, n, dtype=torch.bool), True
        ),
        "exact_probabilities": lambda n: gpu.exact_probabilities(q, rows(n, width), 0.1),
        "pq_probabilities": lambda n: gpu.pq_probabilities(q, book, codes(n), 0.1),
        "pq_select": lambda n: gpu.pq_select(q, book, codes(n), 0.1, n % 17, n // 2, 2 * n + 17, n, 3 * n + 17),
        "top_k": lambda n: gpu.top_k(torch.zeros(1, 2, n, dtype=torch.float32), n // 2),
        "noise": lambda n: gpu.noise(2, n, n << 31, torch.device("cpu")),
        "train_codebook": lambda n: gpu.train_codebook(rows(n + 16, width), 2, 16, 1, 0, 20),
        "encode": lambda n: gpu.encode(rows(n, width), book),
        "column_sums": lambda n: gpu.column_sums(rows(4 * n, width).view(1, 2, 4, n, width), rows(n, width), 0.1),
    }


def codes_of(note: Callable[[str, Callable[[], object]], list[Any]], use: Use, length: int) -> set[str]:
    """The code that a call would compile."""
    return {launch.key for launch in note("", lambda: use(length))}


NAMES = [
    "append",
    "append to a ring",
    "fetch",
    "fetch beside blocks",
    "gather",
    "copy",
    "attention",
    "attention of rows",
    "weights",
    "exact_probabilities",
    "pq_probabilities",
    "pq_select",
    "top_k",
    "noise",
    "train_codebook",
    "encode",
    "column_sums",
]


@pytest.mark.parametrize("width", [128, 24])
@pytest.mark.parametrize("name", NAMES)
def test_one_kernel_serves_every_length(name: str, width: int, tmp_path: Path) -> None:
    from tests.kernels.gpu_compile import noting

    with noting(tmp_path) as note:
        found = {n: codes_of(note, uses(width)[name], n) for n in (2, 3, 15, 16, 17, 32, 100, 112, 1000, 1024)}
    assert all(keys == found[2] for keys in found.values()), {n: len(keys) for n, keys in found.items()}


def test_one_kernel_serves_every_long_row(tmp_path: Path) -> None:
    """This holds for rows that are split, and for contexts of up to a million tokens."""
    from tests.kernels.gpu_compile import noting

    lengths = (4999, 5008, 8192, 131_072, 1_000_001)
    with noting(tmp_path) as note:
        for name in ("top_k", "pq_select", "exact_probabilities", "attention"):
            found = [codes_of(note, uses(128)[name], n) for n in lengths]
            assert found[0]
            assert all(keys == found[0] for keys in found), name
        select = uses(128)["pq_select"]
        assert codes_of(note, select, 3) == codes_of(note, select, 1_000_001)


def test_every_kernel_is_compiled(tmp_path: Path) -> None:
    from tests.kernels.gpu_compile import launches

    names = set()
    for path in (Path(__file__).resolve().parents[2] / "pqbench/kernels/gpu").glob("*.py"):
        for part in path.read_text(encoding="utf-8").split("@triton.jit")[1:]:
            signature = part.partition('"""')[0]
            names |= set(re.findall(r"\ndef (\w+)\(", signature)) if "-> None:" in signature else set()
    assert len(names) >= 12
    assert names == {launch.fn.__name__ for launch in launches(tmp_path).values()}
