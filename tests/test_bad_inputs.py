"""Any bad input ends in one clear line that names the field and in exit code 1; nothing is started or lost.

Every field of every yaml in conf/ gets values of wrong types; the table adds values out of range, misspelt names, and
combinations that cannot work.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from pqbench.__main__ import main, run_config
from pqbench.config.compose import conf_folder
from pqbench.errors import PqbenchError
from tests.bad_options import REFUSED, REFUSED_LATER

SMALL = ("model=tiny", "benchmark=needle", "method=full")
NEEDLE = ("benchmark.lengths=[256]", "benchmark.depths=[50]", "benchmark.max_new_tokens=3")


def outcome(results: Path, *overrides: str) -> tuple[Any, list[str]]:
    """Exit code and lines on standard error of the command in this process; later overrides win."""
    given = {word.split("=")[0]: word for word in (*SMALL, f"results={results}", *overrides)}
    if given["benchmark"] == "benchmark=needle":
        given = {**{word.split("=")[0]: word for word in NEEDLE}, **given}
    arguments, errors = sys.argv, io.StringIO()
    sys.argv = ["pqbench", *sorted(given.values(), key=lambda word: word[0] != "-")]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as end:
        return end.code, errors.getvalue().splitlines()
    finally:
        sys.argv = arguments
    raise AssertionError("main() always exits")


def refused(results: Path, overrides: str, words: list[str], begun: bool = False) -> None:
    """Check that the command with these overrides, separated by spaces, ends in one line. With ``begun`` only a loaded
    model shows the error, so the folder of the run exists, but no record."""
    code, errors = outcome(results, *overrides.split())
    assert code == 1
    assert len(errors) == 1, errors
    line = errors[0]
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == [], line
    for inner in ("Traceback", "debug=true", "StrictDataclass", "OmegaConf", "NoneType"):
        assert inner not in line
    assert begun or not results.exists()
    assert [path for path in results.rglob("records.jsonl") if path.stat().st_size] == []


# Wrong overrides, and words of the error line: the field, and the allowed values.
@pytest.mark.parametrize("overrides", REFUSED)
def test_a_bad_option_is_refused_before_anything_is_begun(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, REFUSED[overrides])


@pytest.mark.parametrize("overrides", REFUSED_LATER)
def test_what_only_the_model_can_tell_is_refused_before_anything_is_measured(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, REFUSED_LATER[overrides], begun=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("overrides", ["kernels=gpu", "model.device=cuda", "model.device=cuda:99"])
def test_a_gpu_that_is_not_there(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, [overrides.partition("=")[2].partition(":")[0], "here"])


def test_bad_input_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    assert outcome(tmp_path)[0] == 0
    (records,) = tmp_path.rglob("records.jsonl")
    before = records.read_bytes()
    for overrides in ("method=nope", "budget.ratio=2 method=h2o", "model.heads=3", "benchmark.lengths=[8192]"):
        assert outcome(tmp_path, *overrides.split())[0] == 1
        assert records.read_bytes() == before


def test_a_bad_cell_of_a_sweep_is_named(tmp_path: Path) -> None:
    code, errors = outcome(tmp_path, "--multirun", "model.kv_heads=2,3")
    assert code == 1
    assert errors[0].startswith("error: model.kv_heads=3: model.kv_heads is 3")
    assert errors[1:] == ["error: 1 failures in 2 runs:", errors[0]]


def test_a_method_that_ends_the_process_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any, **__: Any) -> Any:
        raise SystemExit(3)

    monkeypatch.setattr("methods.sparq.SparQState.select", leave)
    code, errors = outcome(tmp_path, "method=[sparq,full]")
    assert code == 1
    assert [line for line in errors if "sparq" in line] == [
        "error: sparq on number-256-50-0: RuntimeError: a method would end the process: SystemExit(3)"
    ]
    assert sum('"status": "ok"' in path.read_text() for path in tmp_path.rglob("records.jsonl")) == 1


WRONG: list[Any] = ["oops", 1.5, True, [1.5, "x"], {"a": 1}, None, float("nan"), float("inf")]
GROUPS = ("budget", "store", "model", "benchmark", "method")


def fields_of(group: str) -> Iterator[tuple[str, str]]:
    """Every yaml of a group with every field that it sets."""
    for path in sorted((conf_folder() / group).glob("*.yaml")):
        for name in OmegaConf.load(path):
            if name not in ("_target_", "defaults"):
                yield path.stem, str(name)


def composed(group: str, stem: str, results: Path) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        chosen = {"model": "tiny", "method": "full", group: stem}
        words = [f"{name}={value}" for name, value in chosen.items()]
        return compose("config", [*words, "model.device=cpu", f"results={results}"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_type_in_any_field_is_named(group: str, tmp_path: Path) -> None:
    """The annotation of the field decides which values are wrong, by a check that is written out here."""
    count = 0
    stems = dict.fromkeys(stem for stem, _ in fields_of(group))
    for stem in stems:
        config = composed(group, stem, tmp_path / "results")
        place = f"methods.{stem}" if group == "method" else group
        if group == "budget":
            config.methods = {"h2o": {"_target_": "methods.h2o.H2O", "budget": "${budget}"}}
        made = get_object(OmegaConf.select(config, place)._target_)
        hints = get_type_hints(made)
        for name in (name for other, name in fields_of(group) if other == stem):
            for value in (value for value in WRONG if name in hints and wrong(value, str(hints[name]))):
                changed = config.copy()
                OmegaConf.update(changed, f"{place}.{name}", value, merge=False, force_add=True)
                with pytest.raises(PqbenchError) as caught:
                    run_config(changed)
                line = str(caught.value)
                assert "\n" not in line
                assert f"{place}.{name} is " in line, (stem, name, value, line)
                assert "use " in line
                count += 1
    assert count > 40
    assert not (tmp_path / "results").exists()


def wrong(value: Any, hint: str) -> bool:
    """Whether a value is certainly wrong for a field, judged by the text of its annotation."""
    if value is None:
        return "None" not in hint and "Any" not in hint
    kinds = {str: "str", bool: "bool", float: "float", list: ("Sequence", "list", "tuple"), dict: ("Mapping", "dict")}
    wanted = kinds[type(value)]
    names = (wanted,) if isinstance(wanted, str) else wanted
    if isinstance(value, float) and value != 1.5:
        return True
    if isinstance(value, dict) or "Any" in hint or "Literal" in hint:
        return False  # the names in a mapping are looked at by other checks
    if isinstance(value, list):
        return not any(name in hint for name in names) or "str" not in hint
    return not any(name in hint for name in names)


def process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pqbench", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_process_ends_with_one_line_too(tmp_path: Path) -> None:
    done = process("model=tny", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "did you mean tiny?" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="how far the imports are is read from /proc")
def test_an_interrupt_during_the_imports_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pqbench", *SMALL]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        while "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text():
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGINT)
        output, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert errors.splitlines() == ["error: interrupted before any work began"]
    assert output == ""
    assert list(tmp_path.iterdir()) == []
