"""Every Triton kernel compiles for GPUs of compute capability 9.0 without spilling registers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

pytestmark = pytest.mark.slow


def test_kernels_compile_and_nothing_spills(tmp_path: Path) -> None:
    from tests.kernels.gpu_compile import check

    check(90, tmp_path)
