"""Runs that are really killed and started again until they finish have the records of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from pqbench.records.file import parse

KILLS = 17  # of workers forked after the imports, and
COMMAND_KILLS = 3  # of the command as users start it
RUN = (
    "method=[full,pqcache,h2o]",
    "model=tiny",
    "threads=1",
    "benchmark=needle",
    "benchmark.lengths=[256]",
    "benchmark.depths=[0,25,50,75,100]",
    "benchmark.per_cell=6",
    "benchmark.max_new_tokens=4",
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

Records = dict[str, list[dict[str, Any]]]


def work(results: Path) -> None:
    """Run the command in a process that has already imported everything."""
    from pqbench.__main__ import main

    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    sys.argv = ["pqbench", *RUN, f"results={results}"]
    main()


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """A context that forks from a server process, which has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.measure.test_resume", "pqbench.__main__", "pqbench.benchmarks.needle"])
    return context


def started(forks: ForkServerContext, results: Path) -> ForkServerProcess:
    process = forks.Process(target=work, args=(results,))
    process.start()
    return process


def completed(forks: ForkServerContext, results: Path) -> Records:
    """The records after the command has run to its end."""
    process = started(forks, results)
    process.join(100)
    assert process.exitcode == 0
    return untimed(results)


@pytest.fixture(scope="module")
def undisturbed(forks: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, float]:
    """The records and the duration of an undisturbed run; the first run also waits for the imports."""
    results = tmp_path_factory.mktemp("undisturbed")
    records = completed(forks, results / "first")
    began = time.perf_counter()
    assert completed(forks, results / "second") == records
    seconds = time.perf_counter() - began
    assert {method: len(rows) for method, rows in records.items()} == {"full": 30, "h2o": 30, "pqcache": 30}
    return records, seconds


def untimed(results: Path) -> Records:
    """Every line of every file without timings; all lines must be complete records."""
    found: Records = {}
    for path in sorted(results.rglob("records.jsonl")):
        rows = [parse(line) for line in path.read_bytes().splitlines()]
        assert all(rows)
        method = path.parent.name.rsplit("-", 1)[0]
        assert method not in found
        found[method] = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows if row]
    return found


def moments(seconds: float) -> Iterator[float]:
    generator = random.Random(20240717)
    while True:
        yield generator.uniform(0.02, seconds)


@pytest.mark.slow
def test_killed_at_random_moments(forks: ForkServerContext, undisturbed: tuple[Records, float], tmp_path: Path) -> None:
    expected, seconds = undisturbed
    kills, finished, with_progress = 0, 0, 0
    pause = moments(seconds)
    while kills < KILLS or finished == 0:
        results = tmp_path / str(finished)
        process = started(forks, results)
        process.join(next(pause) if kills < KILLS else 100)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:  # otherwise it ended before the signal came
            kills += 1
            with_progress += any(path.stat().st_size for path in results.rglob("records.jsonl"))
            continue
        assert process.exitcode == 0
        assert untimed(results) == expected
        finished += 1
    if (tmp_path / str(finished)).exists():  # if it was killed last, let it run to its end
        assert completed(forks, tmp_path / str(finished)) == expected
    assert with_progress >= 3  # otherwise all kills came before the first record


def command(results: Path) -> subprocess.Popen[str]:
    """The command as a terminal starts it: a shell makes background jobs ignore interrupts, which children inherit."""
    line = [sys.executable, "-m", "pqbench", *RUN, f"results={results}"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_records(process: subprocess.Popen[str], results: Path, lines: int) -> None:
    """Wait until the process has written this many lines to a file."""
    for _ in range(6000):
        if process.poll() is not None:
            return
        if any(path.read_bytes().count(b"\n") >= lines for path in results.rglob("records.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError("nothing was measured within a minute")


@pytest.mark.slow
def test_the_command_killed(forks: ForkServerContext, undisturbed: tuple[Records, float], tmp_path: Path) -> None:
    expected, _ = undisturbed
    generator = random.Random(7)
    for i in range(COMMAND_KILLS):
        process = command(tmp_path)
        wait_for_records(process, tmp_path, 2 * i + 1)
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert completed(forks, tmp_path) == expected


@pytest.mark.slow
def test_the_command_interrupted(forks: ForkServerContext, undisturbed: tuple[Records, float], tmp_path: Path) -> None:
    expected, _ = undisturbed
    for attempt in range(5):  # on a busy machine this process may see the first record after the last
        results = tmp_path / str(attempt)
        process = command(results)
        wait_for_records(process, results, 1)
        before = untimed_whole(results)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130
    assert (
        errors.splitlines()[-1]
        == "error: interrupted: finished samples are kept, the same command continues from there"
    )
    assert "Traceback" not in errors
    kept = untimed(results)
    assert all(kept[method][: len(rows)] == rows for method, rows in before.items())
    assert kept != expected
    assert completed(forks, results) == expected


def untimed_whole(results: Path) -> Records:
    """Like :func:`untimed`, for files that are being written: an incomplete last line is left out."""
    copy = results.with_name("copy")
    for path in results.rglob("records.jsonl"):
        target = copy / path.relative_to(results)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data[: data.rfind(b"\n") + 1])
    return untimed(copy)
