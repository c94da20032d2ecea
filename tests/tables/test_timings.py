"""Tables of timing records: units, medians, ranges, ratios, and no score rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from pqbench.records.file import VERSION, Record, encode
from pqbench.tables.command import main
from pqbench.tables.document import document, frame, run_table
from pqbench.tables.kinds import flat, sections
from pqbench.tables.section import facts, link_of


def latency(method: str, repeat: int, tpot_s: float, context: int = 1024, **fields: Any) -> Record:
    return {
        "version": VERSION,
        "benchmark": "latency",
        "model": "toy",
        "task": "latency",
        "method": method,
        "sample_id": f"{context}-{repeat}",
        "key": f"key-{method}",
        "question": "-",
        "status": "ok",
        "kernels": "cpu",
        "threads": 2,
        "dtype": "float32",
        "budget": "all" if method == "full" else "10 %",
        "context": context,
        "repeat": repeat,
        "ttft_s": 1.0,
        "tt2t_s": 2.0,
        "tpot_s": tpot_s,
        "dense_step_s": 0.02,
        "select_step_s": 0.004,
        "fetch_step_s": 0.003,
        "attend_step_s": 0.002,
        "append_step_s": 0.001,
        "wait_s": 0.5,
        "index_build_s": 0.25,
        "attended_tokens": 102.0,
        "index_bytes": 2e6,
        "to_device_bytes_step": 3e6,
        "to_host_bytes_step": 1e6,
        "cache_hit_rate": 0.75,
        "device_bytes": 4e6,
        "host_bytes": 5e6,
        "copy_share": 0.5,
        "peak_rss_bytes": 6e9,
        "copy_bandwidth_gbps": 20.0,
        "link": None,
        "emulated": False,
        "steps_s": [0.1, 0.2],
    } | fields


def attention(method: str, kernel: str, total_s: float, context: int = 4096, **fields: Any) -> Record:
    return {
        "version": VERSION,
        "benchmark": "attention",
        "model": "llama31_8b",
        "task": "attention",
        "method": method,
        "sample_id": f"{context}-{kernel}",
        "key": f"key-{method}",
        "question": "-",
        "status": "ok",
        "kernels": "cpu",
        "threads": 2,
        "dtype": "float32",
        "budget": "all" if method == "full" else "10 %",
        "context": context,
        "kernel": kernel,
        "geometry": "llama31_8b",
        "keys": "random",
        "select_s": 0.001,
        "fetch_s": 0.0005,
        "attend_s": 0.002,
        "append_s": 0.0001,
        "total_s": total_s,
        "total_min_s": 0.001,
        "total_p90_s": 0.009,
        "dense_ratio": 2.5,
        "bandwidth_gbps": 12.3,
        "copy_share": 0.41,
        "attended_tokens": 410.0,
        "build_s": 0.7,
        "index_bytes": 1.5e6,
        "peak_rss_bytes": 3e9,
        "copy_bandwidth_gbps": 30.0,
        "timed_steps": 4,
    } | fields


def named(row: list[str], headings: list[str]) -> dict[str, str]:
    return dict(zip(headings, row, strict=True))


def test_latency_shows_medians_ranges_and_the_ratio_to_full() -> None:
    records = [latency("full", i, value) for i, value in enumerate((0.1, 0.2, 0.6))]
    records += [latency("pqcache", i, value) for i, value in enumerate((0.1, 0.05))]
    times, step = sections(records)
    assert times.title.startswith("latency of toy (float32, 2 threads, kernels cpu, copy 20.0 GB/s")
    place = times.headings.index("TPOT ms")
    assert times.headings[place : place + 3] == ["TPOT ms", "range", "/ full"]
    assert times.rows[0][place : place + 3] == ["200.0", "100.0-600.0", "1.00"]
    assert times.rows[1][place : place + 3] == ["75.0", "50.0-100.0", "0.38"]
    assert times.rows[1][:4] == ["1024", "pqcache", "10 %", "2"]
    row = named(step.rows[1], step.headings)
    assert row["model ms"] == "20.0"
    assert row["select ms"] == "4.00"
    assert row["in MB/step"] == "3.00"
    assert row["out MB/step"] == "1.00"
    assert row["hits %"] == "75"
    assert row["host MB"] == "5.0"
    assert row["% of copy"] == "50"
    assert row["peak GB"] == "6.00"


def test_the_ratio_is_to_full_at_the_same_context_and_link() -> None:
    records = [latency("full", 0, 0.1), latency("full", 0, 0.4, 2048), latency("pqcache", 0, 0.2, 2048)]
    records += [latency("pqcache", 1, 0.2, link="local"), latency("h2o", 0, 0.2, 4096)]
    (times, _) = sections(records)
    place, link = times.headings.index("TPOT ms") + 2, times.headings.index("link")
    ratios = {(row[0], row[1], row[link]): row[place] for row in times.rows}
    assert ratios["2048", "pqcache", "None"] == "0.50"
    assert ratios["1024", "pqcache", "local"] == "-"
    assert ratios["4096", "h2o", "None"] == "-"


def test_an_emulated_link_is_called_so() -> None:
    records = [latency("full", 0, 0.1, link="emulated PCIe 4.0 x16", emulated=True)]
    assert "KV over emulated PCIe 4.0 x16" in sections(records)[0].title
    assert link_of([latency("full", 0, 0.1, link="X", emulated=True)]) == "emulated X"
    assert link_of([latency("full", 0, 0.1, link="local")]) == "local"


def test_failures_are_counted_and_have_no_figures() -> None:
    failed = {**latency("h2o", 0, 0.1), "status": "oom", "error": "MemoryError: x"}
    times, step = sections([latency("full", 0, 0.1), failed])
    assert times.rows[1][1:] == ["h2o", "10 %", "0 (+1 failed)", *["-"] * 9]
    assert len(step.rows) == 1
    (table,) = sections([attention("full", "sdpa", 0.01), {**attention("h2o", "cpu", 0.1), "status": "oom"}])
    assert named(table.rows[1], table.headings)["select ms"] == "oom"


def test_attention_shows_phases_bandwidth_and_dense_first() -> None:
    records = [attention("pqcache", "cpu", 0.004), attention("full", "torch sdpa grouped", 0.01)]
    (table,) = sections(records)
    assert table.title.startswith("one llama31_8b attention layer, median decode step (float32, 2 threads")
    assert [row[table.headings.index("method")] for row in table.rows] == ["full", "pqcache"]
    row = named(table.rows[1], table.headings)
    assert (row["select ms"], row["fetch ms"], row["attend ms"], row["total ms"]) == (
        "1.000",
        "0.500",
        "2.000",
        "4.000",
    )
    assert (row["x dense"], row["GB/s"], row["% of copy"], row["build s"]) == ("2.50", "12.3", "41", "0.70")
    assert (row["index MB"], row["peak GB"], row["kernel"]) == ("1.50", "3.0", "cpu")


def test_runs_that_differ_only_in_threads_are_told_apart() -> None:
    records = [latency("full", 0, 0.1), latency("full", 0, 0.2, threads=1, key="other")]
    times, _ = sections(records)
    assert "threads" in times.headings
    assert len(times.rows) == 2
    (table,) = sections([attention("full", "sdpa", 0.01), attention("full", "sdpa", 0.02, threads=1)])
    assert "threads" in table.headings


def test_facts_hold_only_what_is_known() -> None:
    assert facts([{"threads": 2}, {"threads": 1}]) == "1/2 threads"
    assert facts([{}]) == ""


def printed(records: list[Record]) -> str:
    """The output of a run at its usual width."""
    console = Console(width=150)
    with console.capture() as captured:
        console.print(run_table(records))
    return captured.get()


def test_nothing_is_cut_at_the_width_of_a_run() -> None:
    slow = {"select_s": 1.2345, "attend_s": 4.91456, "total_p90_s": 4.93, "build_s": 120.5, "budget": "4096 tokens"}
    records = [attention("full", "torch sdpa enable_gqa", 4.91456, 1 << 20, **slow)]
    records += [attention("streaming_llm", "reference", 4.91456, 1 << 20, **slow, dtype="bfloat16")]
    text = printed(records)
    assert "…" not in text
    assert "sdpa enable_gqa" in text
    assert "4914.6" in text
    text = printed([latency("full", 0, 0.1), latency("streaming_llm", 0, 0.1, 131072, budget="4096 tokens")])
    assert "…" not in text
    assert "TTFT" in text


def test_names_are_never_markup() -> None:
    assert "[red]x[/nope]" in printed([latency("[red]x[/nope]", 0, 0.1)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, record in (("full", latency("full", 0, 0.1)), ("pq", attention("pqcache", "cpu", 0.004))):
        folder = tmp_path / str(record["benchmark"]) / "toy" / name
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_bytes(encode(record))
    return tmp_path


def test_the_command_prints_times_and_no_scores(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results), "--csv", str(results / "t.csv")]) == 0
    text = capsys.readouterr().out
    assert "TPOT ms" in text
    assert "x dense" in text
    assert "score" not in text
    table = pd.read_csv(results / "t.csv")
    assert sorted(table["benchmark"]) == ["attention", "latency"]
    assert table.set_index("benchmark").loc["latency", "tpot_s"] == 0.1
    assert "steps_s" not in table


def test_timings_stand_beside_scores(capsys: pytest.CaptureFixture[str]) -> None:
    scored = {**latency("full", 0, 0.1), "kind": "scores", "benchmark": "needle", "task": "number", "score": 50.0}
    text = document(frame([scored]), [latency("full", 0, 0.1)])
    assert "### needle on toy: scores" in text
    assert "### latency of toy" in text
    assert r"\begin{table}" in document(frame([]), [latency("full", 0, 0.1)], latex=True)
    assert flat([scored]) == []
