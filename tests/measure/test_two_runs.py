"""Two processes with the same command share the samples, and if one is killed, the other measures its samples.

With ``KILLS=50`` in the environment there are fifty kills instead of a few.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from pqbench.records.claims import alone, claimed
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
