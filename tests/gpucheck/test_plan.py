"""How steps share the time, and which options the command line accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpucheck.options import ROOT, Options, UsageError, parse
from gpucheck.plan import LIMIT, STEPS, Step, granted, scaled

MANY = 10_000.0


def step(seconds: float = 10, least: float = 5, importance: int = 1, elastic: bool = False) -> Step:
    return Step(0, "any", "", seconds, least, importance, elastic=elastic)


def test_with_time_for_everything_a_step_gets_its_own_limit() -> None:
    assert granted(step(), [step(), step(importance=0)], MANY) == 10


def test_a_step_leaves_their_time_to_more_important_ones_behind_it() -> None:
    important, other = step(seconds=30, importance=1), step(seconds=30, importance=3)
    assert granted(step(importance=2), [important, other], 38) == 8
    assert granted(step(importance=2), [important], 34) == 0  # less than the 5 seconds that it needs at least
    assert granted(step(importance=2), [important], 1) == 0
    assert granted(step(importance=1), [other], 34) == 10


def test_an_elastic_step_also_gets_what_nobody_behind_it_could_use() -> None:
    assert granted(step(elastic=True), [step(seconds=30, importance=3)], 100) == 70
    assert granted(step(elastic=True), [step(seconds=30, importance=3)], 35) == 10


def test_the_steps_keep_to_the_limit_however_long_each_takes() -> None:
    """For every limit and every order of events, the granted seconds together stay below the limit."""
    for limit in (60.0, 300.0, LIMIT, 2 * LIMIT):
        left = limit
        for i, one in enumerate(STEPS):
            left -= granted(scaled(one, limit), [scaled(other, limit) for other in STEPS[i + 1 :]], left)
        assert left >= 0


def test_with_the_usual_limit_only_the_two_least_important_are_ever_left_out() -> None:
    left, skipped = LIMIT, []
    for i, one in enumerate(STEPS):
        seconds = granted(one, STEPS[i + 1 :], left)
        left -= seconds
        skipped += [one] if not seconds else []
    assert {one.importance for one in skipped} <= {8, 9}
    assert sorted(one.importance for one in STEPS) == list(range(1, 10))
    assert [one.number for one in STEPS] == list(range(9))


def test_more_time_for_everything_is_more_time_for_each() -> None:
    assert scaled(STEPS[3], 2 * LIMIT).seconds == 2 * STEPS[3].seconds
    assert scaled(STEPS[3], LIMIT / 2).seconds == STEPS[3].seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device=tpu"], "DEVICE is 'tpu'"),
        (["--device=cuda:x"], "DEVICE is 'cuda:x'"),
        (["--size=huge"], "SIZE is 'huge'"),
        (["--limit=-3"], "LIMIT is -3"),
        (["--limit=soon"], "--limit"),
        (["--steps=9"], "STEPS has 9: the steps are 0 to 8"),
        (["--steps=four"], "STEPS is 'four'"),
        (["--speed=9"], "--speed=9"),
    ],
)
def test_bad_options_get_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_reach_the_process_of_a_step_unchanged() -> None:
    options = parse(["--device=cpu", "--size=tiny", "--steps=5,3,3", "--results=/somewhere"])
    assert options.steps == (3, 5)
    assert Options.from_text(options.text()) == options
    assert str(options.folder) == "/somewhere"
    assert replace(options, results="").folder == ROOT / "build/gpu-tiny"
    assert Options().folder == ROOT / "results/gpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpucheck", f"--results={tmp_path}"]
    earlier = {"0_machine.json": {"machine": {"device": "a card"}, "rows": []}, "summary.json": {"wrong": []}}
    for name, content in earlier.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert {name: json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in earlier} == earlier
