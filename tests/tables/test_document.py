"""Tables, intervals and rescoring from records made by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from pqbench.benchmarks.averages import GROUPS, PQCACHE_TABLE2, TASKS
from pqbench.errors import DataError
from pqbench.records.file import VERSION, RecordFile, encode
from pqbench.tables.command import main
from pqbench.tables.document import document, frame, run_table, suites, wide
from pqbench.tables.rescore import rescore, stored_benchmark
from pqbench.tables.summaries import DRAWS, Estimate, resampled

EVIL = "a|b\n\x1b[31m[red]\u202e& %_$#{}~^\\<b>`x`[t](http://x)"


def record(sample: str, method: str = "full", score: float | None = 50.0, **fields: Any) -> dict[str, Any]:
    made = {
        "version": VERSION,
        "benchmark": "needle",
        "model": "tiny",
        "task": "number",
        "sample_id": sample,
        "method": method,
        "key": f"key-{method}",
        "budget": "all" if method == "full" else "10 %",
        "question": "dense",
        "status": "ok",
        "score": score,
        "scores": {"score": score},
        "ttft_s": 1.0,
        "tt2t_s": 2.0,
        "tpot_s": 0.1,
        "mass": 0.5,
        "index_bytes": 1000,
        "device_bytes": 10,
        "host_bytes": 5,
        "attended_tokens": 7.0,
    }
    return made | fields


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the markdown table under a title, beginning with the headings."""
    lines = text.split(f"### {title}", 1)[1].split("###", 1)[0].splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in [rows[0], *rows[2:]]]


def stored(root: Path, name: str, records: list[dict[str, Any]], settings: dict[str, Any] | None = None) -> Path:
    folder = root / "needle" / "tiny" / name
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_bytes(b"".join(map(encode, records)))
    if settings:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_scores_have_intervals_counts_and_a_row_per_method() -> None:
    records = [record(str(i), score=float(100 * (i % 2))) for i in range(8)]
    records += [record(str(i), "h2o", score=0.0) for i in range(7)] + [record("7", "h2o", score=None, status="error")]
    table = cells(document(frame(records)), "needle on tiny: scores")
    assert table[0] == ["method", "budget", "n", "number"]
    assert table[1][:3] == ["full", "all", "8"]
    assert table[1][3].startswith("50.0 [")
    assert table[2] == ["h2o", "10 %", "7 (+1 failed)", "0.0 [0.0, 0.0] n=7"]


def test_interval_is_the_seeded_percentile_bootstrap() -> None:
    scores = np.array([0.0, 0.0, 100.0, 100.0, 100.0, 30.0])
    (run,) = suites(frame([record(str(i), score=s) for i, s in enumerate(scores)]))[0].runs
    estimate = run.scores["number"]
    means = resampled("number", scores).means
    assert len(means) == DRAWS
    assert estimate == Estimate(55.0, float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5)), 6)
    assert set(np.round(means * 6, 6)) <= {10.0 * n for n in range(61)}  # means of six of these scores
    wide_sample = np.random.default_rng(0).normal(50, 10, 400)
    low, high = np.percentile(resampled("t", wide_sample).means, [2.5, 97.5])
    half = 1.96 * wide_sample.std() / 20
    assert abs(low - (wide_sample.mean() - half)) < 0.15
    assert abs(high - (wide_sample.mean() + half)) < 0.15


def test_one_sample_has_no_interval() -> None:
    assert cells(document(frame([record("a")])), "needle on tiny: scores")[1][-1] == "50.0 n=1"


def test_labels_are_shown_only_where_runs_differ() -> None:
    def labels(*records: dict[str, Any]) -> list[str]:
        return suites(frame(records))[0].labels

    assert labels(record("a"), record("a", "other", budget="all")) == ["method"]
    assert labels(record("a"), record("a", "h2o")) == ["method", "budget"]
    assert labels(record("a"), record("a", key="k2", question="select")) == ["method", "question"]
    assert labels(record("a"), record("a", key="k2")) == ["method", "key"]


def test_plain_mean_only_over_complete_runs() -> None:
    tasks = [
        record(f"{t}{i}", task=t, score=s, benchmark="ruler") for t, s in (("vt", 80.0), ("cwe", 40.0)) for i in "ab"
    ]
    part = [record("vta", "h2o", task="vt", score=10.0, benchmark="ruler")]
    table = cells(document(frame(tasks + part)), "ruler on tiny: scores")
    assert table[0][-3:] == ["vt", "cwe", "mean"]
    assert table[1][-1] == "60.0 [60.0, 60.0] n=4"
    assert table[2][-2:] == ["-", "-"]


def longbench(tasks: tuple[str, ...], suffix: str = "", **fields: Any) -> list[dict[str, Any]]:
    return [
        record(f"{task}/{i}", benchmark="longbench", task=task + suffix, score=10.0 * n + i, **fields)
        for n, task in enumerate(tasks)
        for i in range(2)
    ]


def test_longbench_has_the_official_averages() -> None:
    (suite,) = suites(frame(longbench(TASKS)))
    (run,) = suite.runs
    means = {task: 10.0 * n + 0.5 for n, task in enumerate(TASKS)}
    groups = {name: np.mean([means[task] for task in members]) for name, members in GROUPS.items()}
    for name, value in groups.items():
        assert run.scores[name].value == pytest.approx(value)
        assert run.scores[name].n == 2 * len(GROUPS[name])
    assert run.scores["longbench"].value == pytest.approx(np.mean(list(groups.values())))
    assert run.scores["longbench"].n == 42
    assert run.scores["pqcache_table2"].value == pytest.approx(np.mean([means[task] for task in PQCACHE_TABLE2]))
    assert run.scores["pqcache_table2"].n == 28
    assert suite.columns == [*TASKS, *GROUPS, "longbench", "pqcache_table2"]
    assert 0 < run.scores["longbench"].high - run.scores["longbench"].low < 1


def test_incomplete_longbench_has_no_average_but_complete_groups() -> None:
    (suite,) = suites(frame(longbench(GROUPS["few_shot"])))
    assert suite.columns == [*GROUPS["few_shot"], "few_shot"]


def test_longbench_e_is_a_table_of_its_own_with_buckets() -> None:
    extended = [
        r | {"scores": {"score": r["score"], "0-4k": r["score"]}} for r in longbench(("qasper",), "_e", key="e")
    ]
    text = document(frame(longbench(("qasper",)) + extended))
    assert cells(text, "longbench on tiny: scores")[0][-1] == "qasper"
    assert cells(text, "longbench_e on tiny: scores")[0][-1] == "qasper_e"
    assert cells(text, "longbench_e on tiny: other scores") == [
        ["method", "task", "0-4k"],
        ["full", "qasper_e", "0.5 [0.0, 1.0] n=2"],
    ]


def test_costs_are_means_and_medians_with_units() -> None:
    records = [record(str(i), ttft_s=t, mass=m) for i, (t, m) in enumerate([(1.0, 0.1), (2.0, 0.2), (9.0, 0.6)])]
    headings, values = cells(document(frame(records)), "needle on tiny: costs")
    shown = dict(zip(headings, values, strict=True))
    assert (shown["mass"], shown["TTFT s"], shown["TPOT ms"]) == ("0.300", "2.00", "100.0")
    assert (shown["recall"], shown["KV MB"], shown["attended"]) == ("-", "0.0", "7")


def test_missing_columns_are_dashes() -> None:
    bare = {"version": VERSION, "sample_id": "a", "status": "ok"}
    text = document(frame([bare, {"version": VERSION, "sample_id": "b", "status": "error"}]))
    assert cells(text, "- on -: scores")[1][-1] == "-"
    assert set(cells(text, "- on -: costs")[1]) == {"-"}


@pytest.mark.parametrize("value", ["text", [1], {"a": 1}, True, float("nan"), None])
def test_values_of_the_wrong_type_are_no_figures(value: Any) -> None:
    broken = dict.fromkeys(record("a"), value) | {"version": VERSION, "sample_id": "a", "status": "ok"}
    document(frame([broken, record("b")]))
    document(frame([broken, record("b")]), latex=True)
    assert len(wide(frame([broken, record("b")]))) == 2


def test_names_cannot_act_in_a_terminal_or_in_markdown() -> None:
    records = [record("a", EVIL, benchmark=EVIL, model=EVIL, task=EVIL, budget=EVIL, scores={"score": 1, EVIL: 2})]
    text = document(frame(records))
    assert "\x1b" not in text
    assert "\u202e" not in text
    for table in text.split("###")[1:]:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) == 3
        assert len({row.replace("\\\\", "").replace("\\|", "").count("|") for row in rows}) == 1
    assert "<b>" not in text
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    console.print(run_table(records))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]" in output
    assert "\x1b[31m" not in output


def test_latex_is_escaped() -> None:
    text = document(frame([record("a", EVIL), record("a", "[x]"), record("a", "*y")]), latex=True)
    assert r"\textbar{}b" in text
    assert r"\& \%\_\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert "\n{[}x] & " in text
    assert "\n{*}y & " in text
    assert text.count(r"\begin{tabular}{l") == 2
    assert "\x1b" not in text


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pqbench.tables", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_csv_has_one_row_per_run_in_the_units_of_records(tmp_path: Path) -> None:
    stored(tmp_path, "full-1", [record(str(i), score=float(i)) for i in range(3)])
    stored(tmp_path, "x-2", [record("a", "x", benchmark="ruler", task="vt", score=7.0)])
    assert main([str(tmp_path), "--csv", str(tmp_path / "out.csv")]) == 0
    table = pd.read_csv(tmp_path / "out.csv").set_index("method")
    assert list(table.index) == ["full", "x"]
    full = table.loc["full"]
    assert (full["score"], full["number"], full["number_n"], full["tpot_s"], full["kv_bytes"]) == (1, 1, 3, 0.1, 15)
    assert full["number_low"] <= 1 <= full["number_high"]
    assert pd.isna(full["vt"])


def test_unwritable_csv_and_empty_folders_are_one_line(tmp_path: Path) -> None:
    stored(tmp_path / "some", "full-1", [record("a")])
    (tmp_path / "none" / "needle").mkdir(parents=True)
    commands = {
        "cannot write": [str(tmp_path / "some"), "--csv", str(tmp_path / "absent" / "x.csv")],
        "no records under": [str(tmp_path / "none")],
        "no results folder": [str(tmp_path / "absent")],
        "no fidelity records of 'oracle': there are no": [str(tmp_path / "some"), "--relative", "oracle"],
    }
    for message, arguments in commands.items():
        run = command(*arguments)
        assert run.returncode == 1
        assert run.stdout == ""
        assert len(run.stderr.splitlines()) == 1
        assert message in run.stderr


def test_the_command_prints_tables_on_stdout_and_warnings_on_stderr(tmp_path: Path) -> None:
    folder = stored(tmp_path, "full-1", [record("a", EVIL), record("old", version=0)])
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"cut')
    run = command(str(tmp_path))
    assert run.returncode == 0
    assert run.stdout.startswith("### needle on tiny")
    assert "\x1b" not in run.stdout + run.stderr
    assert [line.split(":")[0] for line in run.stderr.splitlines()] == ["warning", "warning"]


NEEDLE = {"benchmark": {"_target_": "pqbench.benchmarks.needle.Needle", "lengths": [512]}}


def found(sample: str, prediction: str, score: float) -> dict[str, Any]:
    scores = {"score": score, "rouge1": 0.0}
    metadata = {"variant": "number", "needle": "The secret number is 1234567."}
    references = ["1234567"]
    return record(sample, prediction=prediction, references=references, score=score, scores=scores, metadata=metadata)


def test_rescoring_needs_no_model_and_changes_scores_only(tmp_path: Path) -> None:
    right, wrong = found("a", "1234567", 0.0), found("b", "nothing", 0.0)
    failed = record("c", score=None, status="error")
    folder = stored(tmp_path, "full-1", [right, wrong, failed, record("old", version=0)], NEEDLE)
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b"{broken\n")
    before = (folder / "records.jsonl").read_bytes().split(b"\n")
    result = rescore(tmp_path)
    assert (result.records, result.runs, result.changed, result.failed) == (2, 1, 1, 0)
    after = (folder / "records.jsonl").read_bytes().split(b"\n")
    assert after[1:] == before[1:]
    changed = json.loads(after[0])
    assert changed["score"] == changed["scores"]["score"] == 100.0
    assert {k: v for k, v in changed.items() if "score" not in k} == {
        k: v for k, v in right.items() if "score" not in k
    }
    assert rescore(tmp_path).changed == 0


def test_a_module_that_no_longer_exists_is_no_obstacle_to_rescoring(tmp_path: Path) -> None:
    moved = {"benchmark": NEEDLE["benchmark"] | {"_target_": "pqbench.suites.of_old.Needle"}}
    folder = stored(tmp_path, "full-1", [found("a", "1234567", 0.0)], moved)
    result = rescore(tmp_path)
    assert (result.records, result.changed, result.failed) == (1, 1, 0)
    assert json.loads((folder / "records.jsonl").read_bytes())["score"] == 100.0


@pytest.mark.parametrize(
    "target", ["pqbench.timing.latency.Latency", "pqbench.measure.latency.Latency", "gone.Latency"]
)
def test_records_without_scores_are_passed_over_wherever_their_class_lay(tmp_path: Path, target: str) -> None:
    old = record("1024-0", benchmark="latency", context=1024, repeat=0, score=None)
    stored(tmp_path, "full-1", [old], {"benchmark": {"_target_": target}})
    result = rescore(tmp_path)
    assert (result.runs, result.records, result.failed) == (0, 0, 0)


def test_rescored_runs_go_on(tmp_path: Path) -> None:
    folder = stored(tmp_path, "full-1", [found("a", "1234567", 0.0)], NEEDLE)
    file = RecordFile(folder)
    assert file.append(record("b"))
    rescore(tmp_path)
    assert not file.append(record("b"))
    assert file.append(record("c"))
    assert [r["sample_id"] for r in file.read()] == ["a", "b", "c"]


REFUSED: list[Any] = [
    {"_target_": "os.system", "command": "touch hacked"},
    {"_target_": "pqbench.benchmarks.needle.random.seed"},
    {"_target_": "pqbench.benchmarks.base.Prompter"},
    {"_target_": "pqbench.benchmarks.needle.Sample"},
    {"_target_": "pqbench.benchmarks.absent.X"},
    {"_target_": "pqbench.measure.latency.Latency"},
    {"_target_": "pqbench.benchmarks.needle.Needle", "unknown": 1},
    {"_target_": "pqbench.benchmarks.needle.Needle", "lengths": []},
    {"_target_": ["x"]},
    {},
    None,
    "text",
]


@pytest.mark.parametrize("node", REFUSED, ids=range(len(REFUSED)))
def test_only_our_benchmarks_are_made_from_a_config_file(tmp_path: Path, node: Any) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"benchmark": node}))
    with pytest.raises(DataError) as caught:
        stored_benchmark(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "a: [", "!!python/object/apply:os.system [ls]", "\x00", "3"])
def test_damaged_configs_are_one_line(tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture) -> None:
    folder = stored(tmp_path, "full-1", [found("a", "x", 0.0)])
    if text is not None:
        (folder / "config.yaml").write_text(text)
    assert rescore(tmp_path).failed == 1
    (message,) = caplog.messages
    assert message.startswith(f"not rescored: {folder / 'config.yaml'} names no benchmark")


def test_the_command_rescores_and_says_what_changed(tmp_path: Path) -> None:
    stored(tmp_path, "full-1", [found("a", "1234567", 0.0)], NEEDLE)
    run = command(str(tmp_path), "--rescore")
    assert run.returncode == 0
    assert run.stderr == "rescored 1 records of 1 runs: 1 scores changed, 0 runs or records could not be scored\n"
    assert "100.0 n=1" in run.stdout
    stored(tmp_path, "full-2", [record("a", key="2")])
    assert command(str(tmp_path), "--rescore").returncode == 1


@pytest.mark.parametrize("field", ["prediction", "references", "metadata"])
def test_records_that_cannot_be_scored_stay(tmp_path: Path, field: str, caplog: pytest.LogCaptureFixture) -> None:
    broken = found("a", "1234567", 0.0) | {field: 3}
    folder = stored(tmp_path, "full-1", [broken, found("b", "1234567", 0.0)], NEEDLE)
    result = rescore(tmp_path)
    assert (result.failed, result.changed) == (1, 1)
    assert (folder / "records.jsonl").read_bytes().startswith(encode(broken))
    assert len(caplog.messages) == 1
