"""The attention figure stacks the phases of the records, beside the dense kernels of the same dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from plots import attention


def row(
    method: str, kernel: str, dtype: str, budget: str, times: tuple[float, float, float], **more: Any
) -> dict[str, Any]:
    select, fetch, attend = times
    return {
        "kind": "attention",
        "benchmark": "attention",
        "model": "llama31_8b",
        "geometry": "llama31_8b",
        "method": method,
        "key": "k",
        "status": "ok",
        "kernel": kernel,
        "dtype": dtype,
        "budget": budget,
        "context": 32768.0,
        "keys": "real",
        "select_s": select,
        "fetch_s": fetch,
        "attend_s": attend,
        "append_s": 0.001,
        "total_s": sum(times) + 0.001,
        "link": None,
        "emulated": False,
        "device": "AMD EPYC",
        "threads": 2.0,
        "kernels": "cpu",
        "timed_steps": 20.0,
        "dense_ratio": 0.02 / (sum(times) + 0.001),
        "copy_bandwidth_gbps": 30.0,
    } | more


@pytest.fixture
def run() -> pd.DataFrame:
    dense = [
        row("full", kernel, dtype, "all", (0.0, 0.0, seconds))
        for dtype in ("float32", "bfloat16")
        for kernel, seconds in (("torch sdpa enable_gqa", 0.099), ("torch sdpa grouped", 0.019))
    ]
    methods = [
        row("pqcache", "cpu", dtype, budget, (0.002, 0.001, 0.003))
        for dtype in ("float32", "bfloat16")
        for budget in ("10 %", "1024 tokens")
    ]
    return attention.timed(pd.DataFrame([*dense, *methods, row("h2o", "cpu", "float32", "10 %", (0.0, 0.0, 0.004))]))


def test_a_panel_for_each_dtype_and_budget(run: pd.DataFrame) -> None:
    figure = attention.bars(run)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "float32, budget 10 %",
        "float32, budget 1024 tokens",
        "bfloat16, budget 10 %",
        "bfloat16, budget 1024 tokens",
    ]
    assert figure.get_suptitle() == "One llama31_8b attention layer, 32K tokens"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["select", "fetch", "attend", "append"]
    notes = " ".join(text.get_text() for text in figure.texts)
    assert "median of 20 steps in turns; real keys; AMD EPYC, 2 threads, kernels: cpu; copy 30.0 GB/s" in notes
    assert "not drawn: torch sdpa enable_gqa 100 ms (float32)" in notes


def test_bars_are_the_phases_in_ms(run: pd.DataFrame) -> None:
    axis = attention.bars(run).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["full (torch sdpa grouped)", "h2o", "pqcache"]
    select, fetch, attend, append = axis.containers
    assert [bar.get_width() for bar in select] == pytest.approx([0, 0, 2])
    assert [bar.get_width() for bar in fetch] == pytest.approx([0, 0, 1])
    assert [bar.get_width() for bar in attend] == pytest.approx([19, 4, 3])
    assert [bar.get_x() for bar in append] == pytest.approx([19, 4, 6])
    assert axis.get_xlabel().startswith("ms per decode step")
    assert [text.get_text() for text in axis.texts] == ["20 ms", "5 ms, 4.00x dense", "7 ms, 2.86x dense"]
    (line,) = axis.lines
    assert list(line.get_xdata()) == pytest.approx([20, 20])


def test_without_methods_the_dense_kernels_are_drawn(run: pd.DataFrame) -> None:
    figure = attention.bars(run[run["method"] == "full"])
    assert [axis.get_title() for axis in figure.axes] == ["bfloat16", "float32"]


def test_without_dense_kernels_the_methods_are_drawn(run: pd.DataFrame) -> None:
    axis = attention.bars(run[run["method"] != "full"]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["h2o", "pqcache"]
    assert len(axis.lines) == 0


def test_files_are_named_by_geometry_and_context(run: pd.DataFrame, tmp_path: Path) -> None:
    paths = attention.draw(run, tmp_path)
    assert {path.name for path in paths} == {"attention_llama31_8b_32K.png", "attention_llama31_8b_32K.pdf"}
    assert attention.draw(run.assign(status="oom"), tmp_path) == []
    emulated = run.assign(link="emulated PCIe 4.0 x16", emulated=True)
    assert attention.headline(emulated).endswith("KV over emulated PCIe 4.0 x16")
