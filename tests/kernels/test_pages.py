"""Large row buffers are ordinary tensors, use huge pages if the system has them, and are freed with their last view."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch

from pqbench.kernels.pages import empty_rows

CPU = torch.device("cpu")
LARGE = (1, 2, 1 << 15, 256)  # 64 MiB of float32
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kilobytes(address: int) -> int:
    """The kilobytes in huge pages of the mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (3, 1, 5), LARGE])
def test_a_buffer_holds_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    buffer = empty_rows(shape, dtype, CPU)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == (torch.Size(shape), dtype, True)
    expected = torch.arange(buffer.numel()).remainder(251).to(dtype).view(shape)
    buffer.copy_(expected)
    assert torch.equal(buffer, expected)


def test_a_view_outlives_its_buffer() -> None:
    view = empty_rows(LARGE, torch.float32, CPU)[:, :, 100:101].fill_(7.0)
    gc.collect()
    assert bool((view == 7).all())


def test_memory_returns_with_the_last_view() -> None:
    process = psutil.Process()
    buffer = empty_rows((1, 1, 1 << 18, 256), torch.float32, CPU).fill_(1.0)  # 256 MiB
    held = process.memory_info().rss
    del buffer
    gc.collect()
    assert held - process.memory_info().rss > 200 << 20


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages here")
def test_large_buffers_lie_in_huge_pages() -> None:
    buffer = empty_rows(LARGE, torch.float32, CPU).fill_(1.0)
    assert huge_kilobytes(buffer.data_ptr()) > 32 << 10
    assert huge_kilobytes(torch.empty(LARGE).fill_(1.0).data_ptr()) == 0 or "[always]" in SETTING.read_text()
