"""``python -m pqbench``: every bad input is one clear line and exit code 1, and loses nothing that was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import InstantiationException

import pqbench.measure.scored
from methods.sparq import SparQ
from pqbench.__main__ import main
from pqbench.config.compose import check_yamls, explain
from pqbench.errors import BudgetError, ConfigError, DataError
from pqbench.records.file import Record, RecordFile, parse, read_all
from pqbench.support.loading import load_model

SMALL = (
    "model=tiny",
    "benchmark=needle",
    "benchmark.lengths=[256]",
    "benchmark.depths=[50]",
    "benchmark.max_new_tokens=3",
)


@dataclass
class Outcome:
    code: int
    out: str
    errors: list[str]


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; later overrides win."""

    def call(*overrides: str) -> Outcome:
        given = {
            word.split("=")[0]: word for word in (*SMALL, "method=full", f"results={tmp_path / 'results'}", *overrides)
        }
        monkeypatch.setattr(sys, "argv", ["pqbench", *sorted(given.values(), key=lambda word: word[0] != "-")])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return Outcome(int(str(end.value.code)), output.out, output.err.splitlines())

    return call


def measured(results: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(results.rglob("records.jsonl")) if path.stat().st_size}


METHODS = "full, h2o, infllm, magicpig, oracle"
BAD: list[tuple[list[str], list[str]]] = [
    (["methd=full"], ["there is no option methd", "did you mean method?"]),
    (["benchmark=nedle"], ["there is no benchmark 'nedle', did you mean needle?"]),
    (["method=nope"], ["there is no method 'nope'", METHODS]),
    (["method=[full,nope]"], ["there is no method 'nope'", METHODS]),
    (["model=nope"], ["there is no model 'nope'", "smollm2, tiny"]),
    (["benchmark=nope"], ["there is no benchmark 'nope'", "longbench, needle, ruler"]),
    (["method=[]"], ["no method is named"]),
    (["method=pqcache", "budget.ratio=0"], ["budget.ratio is 0", "(0, 1]"]),
    (["method=pqcache", "budget.ratio=-0.1"], ["budget.ratio is -0.1", "(0, 1]"]),
    (["method=pqcache", "budget.ratio=1.01"], ["budget.ratio is 1.01", "(0, 1]"]),
    (["method=pqcache", "budget.ratio=abc"], ["budget"]),
    (["method=pqcache", "budget.tokens=100", "budget.ratio=0.2"], ["exactly one of budget.tokens and budget.ratio"]),
    (["method=pqcache", "budget.ratio=[0.1,0.2]"], ["budget.ratio is [0.1, 0.2]", "use a number or null"]),
    (["method=pqcache", "budget.ratio=.inf"], ["budget.ratio is '.inf'", "use a number or null"]),
    (["method=pqcache", "methods.pqcache.m=two"], ["methods.pqcache.m is 'two'", "use a whole number"]),
    (["method=pqcache", "methods.pqcache.b=2.5"], ["methods.pqcache.b is 2.5", "use a whole number"]),
    (["method=pqcache", "budget.tokens=1e2"], ["budget.tokens is 100.0", "use a whole number or null"]),
    (["method=pqcache", "budget.grow=maybe"], ["budget.grow is 'maybe'", "use true or false"]),
    (["benchmark.seed=abc"], ["benchmark.seed is 'abc'", "use a whole number"]),
    (["benchmark.max_new_tokens=0"], ["benchmark.max_new_tokens is 0", "at least 1"]),
    (["benchmark.max_new_tokens=100000"], ["benchmark.max_new_tokens is 100000", "the model takes 4096"]),
    (["benchmark.per_cell=0"], ["benchmark.per_cell is 0", "at least 1"]),
    (["overlap=abc"], ["overlap is 'abc'", "use true or false"]),
    (["retry_failed=1"], ["retry_failed is 1", "use true or false"]),
    (["debug=7"], ["debug is 7", "use true or false"]),
    (["threads=1000000"], ["threads is 1000000", "cores: use"]),
    (["results="], ["results is empty"]),
    (["method=full", "methods.full.budget.ratio=0.2"], ["methods.full has no budget"]),
    (["method=full", "methods.h2o.budget.ratio=0.2"], ["methods.h2o.budget: no method of that name runs here"]),
    (["method=pqcache", "budget.ratio=null", "budget.tokens=20"], ["budget.tokens is 20", "below sink + window"]),
    (["method=h2o", "budget.window=40", "budget.minimum=1"], ["h2o", "is below sink 32 + window 40"]),
    (["method=[full,h2o]", "budget.ratio=null", "budget.tokens=5000"], ["h2o", "5000, above the longest context"]),
    (["method=[full,pqcache]", "methods.pqcache.m=3"], ["pqcache.m is 3", "divide the head dimension 16"]),
    (["method=pqcache", "methods.pqcache.m=0"], ["m >= 1"]),
    (["method=pqcache", "methods.pqcache.b=0"], ["pqcache.b is 0", "1 to 8"]),
    (["method=pqcache", "methods.pqcache.b=9"], ["pqcache.b is 9", "1 to 8"]),
    (["method=pqcache", "methods.pqcache.tolerance=1"], ["pqcache.tolerance is 1", "below 1"]),
    (["method=pqcache", "methods.pqcache.typo=9"], ["no option methods.pqcache.typo", "pqcache has budget, m, b"]),
    (["method=pqcache", "+methods.pqcache.typo=9"], ["methods.pqcache has no field typo", "docs/configuration.md"]),
    (["method=pqcache", "+budget.typo=9"], ["has no field typo"]),
    (["method=full", "methods.h2o.sink=9"], ["no option methods.h2o.sink"]),
    (["method=full", "+methods.h2o.sink=9"], ["methods.h2o has fields but no class", "method=[..., h2o]"]),
    (["kernels=gpu"], ["kernels=gpu computes on a GPU, not on cpu", "kernels=auto"]),
    (["method=paper_longbench", "budget.ratio=3"], ["budget.ratio is 3"]),
    (["benchmark.lengths=[8192]"], ["8192", "the model takes 4096 tokens at most"]),
    (["model.dtype=int8"], ["model.dtype is 'int8'", "float32, bfloat16, float16"]),
    (["model.device=nope"], ["model.device is 'nope'"]),
    (["model=hf", "model.path=/absent/model"], ["cannot load model '/absent/model'", "model.path="]),
    (["benchmark.lengths=[]"], ["benchmark.lengths"]),
    (["results=/proc/absent"], ["cannot write results to /proc/absent", "set results=FOLDER"]),
    (["results=/dev/null"], ["cannot write results to /dev/null", "set results=FOLDER"]),
    (["question=later"], ["question is 'later'", "dense or select"]),
    (["chunk=0"], ["chunk is 0"]),
    (["threads=-2"], ["threads is -2"]),
    (["probe_tokens=-1"], ["probe_tokens is -1"]),
    (["method=[full"], ["[full"]),
    (["nonsense"], ["nonsense"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_line(command: Command, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    outcome = command(*overrides)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("error: ")
    assert [word for word in words if word not in outcome.errors[0]] == []
    assert "Traceback" not in outcome.out
    assert measured(tmp_path) == {}


def test_a_file_that_ends_the_process_when_it_is_imported_is_an_error(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome = command("method=full", "++methods.mine._target_=leaving.Mine")
    assert outcome.code == 1
    assert "calls sys.exit() when its file is imported" in outcome.errors[-1]


def test_bad_input_loses_nothing_measured(command: Command, tmp_path: Path) -> None:
    assert command("method=[full,pqcache]").code == 0
    before = measured(tmp_path)
    assert len(before) == 2
    for overrides in (
        ["method=nope"],
        ["method=[full,pqcache]", "methods.pqcache.m=3"],
        ["budget.ratio=2", "method=h2o"],
    ):
        assert command(*overrides).code == 1
    assert measured(tmp_path) == before


@pytest.mark.parametrize("first", ["", "# a method of mine", "# @package methods.other"])
def test_a_yaml_that_would_be_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str) -> None:
    """The yaml stops only commands that use it."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "good.yaml").write_text("# @package methods.good\n_target_: x\n")
    check_yamls(tmp_path, {})
    (tmp_path / "method" / "mine.yaml").write_text(f"{first}\n_target_: x\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: its first line must be `# @package methods\.mine`"):
        check_yamls(tmp_path, {}, {"_target_": "x"})
    with pytest.raises(ConfigError, match=r"mine\.yaml: its first line must be `# @package methods\.mine`"):
        check_yamls(tmp_path, {"good": {"_target_": "x"}}, None, ["good", "mine"])
    caplog.clear()
    check_yamls(tmp_path, {"good": {"_target_": "x"}})
    (message,) = caplog.messages
    assert "mine.yaml: its first line must be `# @package methods.mine`; nothing here uses it" in message


def test_debug_shows_where_a_sample_failed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken here")

    monkeypatch.setattr("methods.sparq.SparQState.select", fail)
    assert not [line for line in command("method=sparq").errors if "Traceback" in line]
    shown = command("method=sparq", "debug=true", "retry_failed=true").errors
    assert any(line.startswith("Traceback") for line in shown)
    assert any("RuntimeError: broken here" in line for line in shown)


def test_debug_shows_the_error_itself(command: Command) -> None:
    with pytest.raises(InstantiationException) as caught:
        command("method=h2o", "budget.ratio=2", "debug=true")
    assert isinstance(caught.value.__cause__, BudgetError) or "BudgetError" in str(caught.value)


def test_the_same_command_measures_once(command: Command, tmp_path: Path) -> None:
    first = command("method=[full,h2o]")
    assert first.code == 0
    assert "2 measured, 0 already there" in first.out
    assert first.errors == []
    before = measured(tmp_path)
    second = command("method=[full,h2o]")
    assert "0 measured, 2 already there" in second.out
    assert measured(tmp_path) == before


def test_another_setting_goes_to_another_file(command: Command, tmp_path: Path) -> None:
    for overrides in ([], ["benchmark.seed=1"], ["probe_tokens=0"], ["question=select"], ["chunk=100"]):
        assert command(*overrides).code == 0
    assert len(measured(tmp_path)) == 5


def test_defaults_of_the_code_are_part_of_the_key(command: Command, tmp_path: Path) -> None:
    """Otherwise records from before and after the change of a default would share a file."""
    own = '+methods.own={{_target_: methods.sparq.SparQ, budget: "${{budget}}"{}}}'
    assert command(own.format("")).code == 0
    before = measured(tmp_path)
    settings = yaml.safe_load(next(tmp_path.rglob("own-*/config.yaml")).read_text())["method"]
    assert settings.keys() == {"_target_", *(field.name for field in fields(SparQ))}
    assert settings["rank"] == SparQ().rank
    assert command(own.format(f", rank: {SparQ().rank}")).code == 0
    assert measured(tmp_path) == before


def test_options_of_the_chat_template_reach_it_and_the_key(command: Command, tmp_path: Path) -> None:
    for value in ("true", "false"):
        assert command(f"model.chat_options.enable_thinking={value}").code == 0
    saved = [yaml.safe_load(path.read_text()) for path in (tmp_path / "results").rglob("config.yaml")]
    assert sorted(config["model"]["chat_options"]["enable_thinking"] for config in saved) == [False, True]


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["methods.h2o.budget.ratio=0.5"], {"h2o": "50 %", "sparq": "25 %"}),
        (["methods.h2o.budget={ratio: 0.5}"], {"h2o": "50 %", "sparq": "25 %"}),
        (["methods.h2o.budget.tokens=90"], {"h2o": "90 tokens", "sparq": "25 %"}),
        (["methods.sparq.budget.sink=4", "methods.h2o.budget.tokens=90"], {"h2o": "90 tokens", "sparq": "25 %"}),
    ],
)
def test_a_method_may_have_a_budget_of_its_own(
    command: Command, tmp_path: Path, given: list[str], labels: dict[str, str]
) -> None:
    assert command("method=[h2o,sparq]", "budget.ratio=0.25", *given).code == 0
    assert {record["method"]: record["budget"] for record in read_all(tmp_path / "results")} == labels


def test_tokens_need_no_ratio_of_null_and_are_the_same_run_with_it(command: Command, tmp_path: Path) -> None:
    assert command("method=sparq", "budget.tokens=100").code == 0
    assert "0 measured" in command("method=sparq", "budget.tokens=100", "budget.ratio=null").out
    (record,) = read_all(tmp_path / "results")
    assert record["attended_tokens"] == 100


def test_the_version_is_pqbenchs(command: Command) -> None:
    assert command("--version").out == f"pqbench {version('pqbench')}\n"


def test_settings_that_change_greedy_decoding_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    loaded = load_model("tiny")
    assert not any("greedy" in message for message in caplog.messages)
    loaded.model.generation_config.repetition_penalty = 1.05
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    load_model("hf", path=str(tmp_path), name="mine")
    (message,) = [message for message in caplog.messages if "greedy" in message]
    assert "repetition_penalty=1.05" in message


def test_only_a_deleted_sample_runs_again(command: Command, tmp_path: Path) -> None:
    grid = "benchmark.depths=[0,50,100]"
    assert command(grid).code == 0
    (path,) = measured(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert "1 measured, 2 already there" in command(grid).out
    assert sorted(untimed(path)) == sorted(untimed_lines(lines))


def test_a_cut_line_is_told_and_runs_again(command: Command, tmp_path: Path) -> None:
    grid = "benchmark.depths=[0,50,100]"
    command(grid)
    (path,) = measured(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes()[:-20])
    outcome = command(grid)
    assert outcome.code == 0
    assert "1 measured, 2 already there" in outcome.out
    assert len(outcome.errors) == 1
    assert "warning: " in outcome.errors[0]
    assert "skipped 1 broken line(s) (3)" in outcome.errors[0]
    assert untimed(path) == untimed_lines(lines)


def untimed(path: Path) -> list[str]:
    return untimed_lines(path.read_bytes().splitlines())


def untimed_lines(lines: list[bytes]) -> list[str]:
    records: list[Record] = [record for record in map(parse, lines) if record]
    assert len(records) == len(lines)
    return [str({k: v for k, v in record.items() if not k.endswith("_s")}) for record in records]


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("broken\nkernel"), "error"), (MemoryError(), "oom"), (torch.OutOfMemoryError("no room"), "oom")],
)
def test_failures_become_rows_and_are_retried_on_request(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    decode = pqbench.measure.scored.decode

    def failing(prefilled: Any, method: int, *rest: Any, **more: Any) -> Any:
        if method == 1:
            raise error
        return decode(prefilled, method, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pqbench.measure.scored, "decode", failing)
        outcome = command("method=[full,h2o]")
    assert outcome.code == 1
    assert outcome.errors == [
        f"error: h2o on number-256-50-0: {type(error).__name__}: {' '.join(str(error).split()) or type(error).__name__}"
    ]
    assert {r["method"]: r["status"] for r in read_all(tmp_path)} == {"full": "ok", "h2o": status}
    assert "0 measured, 2 already there" in command("method=[full,h2o]").out
    assert "1 measured, 1 already there" in command("method=[full,h2o]", "retry_failed=true").out
    assert {r["status"] for r in read_all(tmp_path)} == {"ok"}


def test_a_full_disk_ends_the_run_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RecordFile, record: Record) -> bool:
        raise DataError("cannot write results to x: No space left on device; set results=FOLDER to one you may write")

    monkeypatch.setattr(RecordFile, "append", full)
    outcome = command()
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "No space left on device" in outcome.errors[0]


def test_a_sweep_goes_on_past_a_failing_cell(command: Command, tmp_path: Path) -> None:
    outcome = command("--multirun", "method=pqcache", "methods.pqcache.m=3,2", "budget.ratio=2,0.5")
    assert outcome.code == 1
    assert len(measured(tmp_path)) == 1
    start = outcome.errors.index("error: 3 failures in 4 runs:")
    assert sorted(line.split(": ")[1] for line in outcome.errors[start + 1 :]) == [
        "methods.pqcache.m=2 budget.ratio=2",
        "methods.pqcache.m=3 budget.ratio=0.5",
        "methods.pqcache.m=3 budget.ratio=2",
    ]
    said = [line for line in outcome.errors[:start] if "budget.ratio is 2" in line]
    assert len(said) == 1  # the same error of two methods is reported only once while they run


def test_a_bug_in_one_cell_of_a_sweep_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(pqbench.measure.scored, "check_budgets", broken)
    outcome = command()
    assert (outcome.code, outcome.errors) == (1, ["error: ZeroDivisionError: by nothing (debug=true shows where)"])


def test_names_are_never_markup(command: Command, tmp_path: Path) -> None:
    outcome = command("model.name='[red]x[/nope]'", f"results='{tmp_path}/[bold]r[/nope]'")
    assert outcome.code == 0
    assert "[red]x[/nope]" in outcome.out
    assert "[bold]r[/nope]" in outcome.out


def test_interrupting_gives_130(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pqbench.measure.scored, "check_budgets", interrupt)
    outcome = command()
    assert outcome.code == 130
    assert outcome.errors == ["error: interrupted: finished samples are kept, the same command continues from there"]


def test_explain_prefers_our_own_cause() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = DataError("row 3 is cut")
    assert explain(wrapped) == "row 3 is cut"


def test_an_evicting_method_on_the_host_tier_says_what_it_means(command: Command) -> None:
    outcome = command("method=[h2o,snapkv,pqcache]", "store=host")
    assert outcome.code == 0
    assert any("(h2o, snapkv)" in line and "on the device" in line for line in outcome.errors)
    assert not any("evict" in line for line in command("method=h2o", "store=device").errors)
