"""Two processes with the same command share the samples, and if one is killed, the other measures its samples.

With ``KILLS=50`` in the environment there are fifty kills instead of a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pqbench.__main__ import run_config
from pqbench.measure.scored import WAIT_S
from pqbench.records.claims import STALE_S, alone, claimed
from pqbench.records.classes import conf_folder
from pqbench.records.file import RecordFile
from tests.measure.test_resume import Records, completed, forks, moments, started, undisturbed, untimed

__all__ = ["forks", "undisturbed"]  # fixtures

KILLS = int(os.environ.get("KILLS", "6"))


def by_sample(records: Records) -> Records:
    """Records in an order that does not depend on which process wrote first."""
    return {method: sorted(rows, key=lambda row: row["sample_id"]) for method, rows in records.items()}


def test_two_processes_share_the_samples(forks, undisturbed: tuple[Records, float], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expected, _ = undisturbed
    both = [started(forks, tmp_path), started(forks, tmp_path)]
    for process in both:
        process.join(200)
        assert process.exitcode == 0
    assert by_sample(untimed(tmp_path)) == by_sample(expected)


@pytest.mark.slow
def test_kills_of_two_processes_lose_and_double_nothing(  # type: ignore[no-untyped-def]
    forks, undisturbed: tuple[Records, float], tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    generator, pause = random.Random(5), moments(1.5 * seconds)
    kills = finished = 0
    while kills < KILLS:
        results = tmp_path / str(finished)
        both = [started(forks, results), started(forks, results)]
        victim = generator.choice(both)
        victim.join(next(pause))
        if victim.exitcode is None:
            victim.kill()
        for process in both:
            process.join(200)
        kills += victim.exitcode == -signal.SIGKILL
        assert [process.exitcode for process in both if process is not victim] == [0]  # it finished all samples
        assert by_sample(untimed(results)) == by_sample(expected)
        finished += 1
    assert by_sample(completed(forks, tmp_path / "0")) == by_sample(expected)


def hold(folder: Path, ready: Path) -> None:
    """Claim a sample and sleep."""
    with claimed(RecordFile(folder), "a") as mine:
        ready.write_text(str(mine))
        signal.pause()


def test_a_claim_is_of_one_process_and_ends_with_it(forks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file, ready = RecordFile.create(tmp_path, "needle", "tiny", "mine", {"m": 1}), tmp_path / "ready"
    process = forks.Process(target=hold, args=(file.folder, ready))
    process.start()
    while not ready.exists() or not ready.read_text():
        process.join(0.05)
    assert ready.read_text() == "True"
    with claimed(file, "a") as a, claimed(file, "b") as b:
        assert (a, b) == (False, True)
    process.kill()
    process.join()
    with claimed(file, "a") as again:
        assert again
    with claimed(file, "a") as again:  # and one that was given back can be taken once more
        assert again


def hold_and_go_on(folder: Path, ready: Path, stop: Path, sample: str = "a") -> None:
    """Claim a sample until a file is there."""
    with claimed(RecordFile(folder), sample):
        ready.touch()
        while not stop.exists():
            time.sleep(0.02)


def test_a_claim_that_is_never_given_back_is_taken_over_when_it_is_old(  # type: ignore[no-untyped-def]
    forks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, ready, stop = RecordFile.create(tmp_path, "n", "m", "x", {"m": 1}), tmp_path / "ready", tmp_path / "stop"
    process = forks.Process(target=hold_and_go_on, args=(file.folder, ready, stop))
    process.start()
    while not ready.exists():
        process.join(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    (lock,) = (file.folder / "claims").iterdir()
    long_ago = time.time() - STALE_S
    os.utime(lock, (long_ago + 60, long_ago + 60))
    with claimed(file, "a") as early:
        assert not early
    assert lock.exists()
    os.utime(lock, (long_ago - 60, long_ago - 60))
    with claimed(file, "a") as mine, claimed(file, "a") as third:
        assert (mine, third) == (True, False)  # the claim that was taken over is new
        stop.touch()
        os.kill(process.pid, signal.SIGCONT)
        process.join(20)
        assert process.exitcode == 0
        assert lock.exists()  # the process that went on has not given back a claim that it no longer had
        with claimed(file, "a") as fourth:
            assert not fourth
    assert not lock.exists()
    (message,) = caplog.messages
    assert "claimed a over 60 minutes ago" in message


def test_a_lock_file_that_a_killed_process_left_is_no_old_claim(tmp_path: Path) -> None:
    file = RecordFile.create(tmp_path, "n", "m", "x", {"m": 1})
    with claimed(file, "a"):
        (lock,) = (file.folder / "claims").iterdir()
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    with claimed(file, "a") as mine, claimed(file, "a") as other:
        assert (mine, other) == (True, False)


def test_a_run_says_once_for_which_sample_it_waits(  # type: ignore[no-untyped-def]
    forks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ready, stop = tmp_path / "ready", tmp_path / "stop"
    job = ["method=[full]", "model=tiny", "kernels=reference", "benchmark=needle", "benchmark.lengths=[256]"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*job, "benchmark.depths=[0,50]", "benchmark.per_cell=1", f"results={tmp_path}"])
    assert run_config(config) == []
    (path,) = tmp_path.rglob("records.jsonl")
    kept, due = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(kept)
    sample = json.loads(due)["sample_id"]
    caplog.clear()
    process = forks.Process(target=hold_and_go_on, args=(path.parent, ready, stop, sample))
    process.start()
    while not ready.exists():
        process.join(0.05)
    timer = threading.Timer(4 * WAIT_S, stop.touch)
    timer.start()
    assert run_config(config) == []
    timer.join()
    process.join()
    waits = [message for message in caplog.messages if "waiting" in message]
    assert waits == [f"another process measures {sample}: waiting until it has ended"]
    assert [json.loads(line)["sample_id"] for line in path.read_bytes().splitlines()][1:] == [sample]


def test_whoever_measures_times_waits_until_nobody_else_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    files = [RecordFile.create(tmp_path, "latency", "tiny", name, {"m": 1}) for name in ("full", "mine")]
    with alone(files):
        assert not caplog.messages
        for file in files:
            with pytest.raises(TimeoutError):
                alone([file], patience=0.1).__enter__()
    assert [
        f"another process measures in {file.folder}: waiting until it has ended" for file in files
    ] == caplog.messages
    with alone(files):
        pass
