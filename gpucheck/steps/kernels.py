"""Step 1: every kernel against its definition, in several processes, since compiling is what takes the time.

The comparisons are those of tests/kernels/gpu_checks.py, on the GPU also at a larger scale; beside them run the tests
of tests/gpu that are no such comparison (page-locked memory, streams, threads, a long context).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gpucheck.options import Options
from gpucheck.process import Running
from gpucheck.result import Result, one_line
from tests.kernels.gpu_checks import CHECKS

PROCESSES = 6
SCALES = (1, 29)  # of the shapes in the checks
TESTS = ("-m", "pytest", "tests/gpu", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-x",
         "-k", "not test_triton_equals_the_reference")  # fmt: skip


def run(result: Result, options: Options) -> None:
    """Start all processes, gather their rows as they come, and say which checks never came to an end."""
    shares = 2 if options.tiny else PROCESSES - 1
    folder = options.folder / "logs"
    files = [folder / f"kernels-{i}.jsonl" for i in range(shares)]
    workers = []
    for i, file in enumerate(files):
        file.unlink(missing_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", __name__, options.device, f"{i}/{shares}", str(file)]
        workers.append(Running(command, folder / f"kernels-{i}.log"))
    tests = [Running([sys.executable, *TESTS], folder / "kernels-tests.log")] if options.on_gpu else []
    read = [0] * shares
    while any(process.running for process in (*workers, *tests)) and result.left > 3:
        time.sleep(0.5)
        _gather(result, files, read)
    for process in tests:
        _report(result, process)
    said = " ".join(worker.wait(0).said for worker in workers)
    _gather(result, files, read)
    done = {row["name"] for row in result.rows}
    missing = [label for name, scale in _all(options.device) if (label := f"{name} x{scale}") not in done]
    if missing:
        result.row("checks that came to no end", False, error=f"{', '.join(missing)} {said}"[:2000])


def _report(result: Result, process: Running) -> None:
    """The row of the tests of tests/gpu."""
    ended = process.wait(0)
    error = {} if ended.code == 0 else {"error": f"exit code {ended.code}: {ended.said[-1500:]}"}
    result.row("tests/gpu", ended.code == 0, **error)


def _gather(result: Result, files: Sequence[Path], read: list[int]) -> None:
    """Take over the rows that the workers have written since the last time."""
    for i, file in enumerate(files):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole[read[i] :]:
            row = json.loads(line)
            result.row(row.pop("name"), row.pop("ok"), **row)
        read[i] = len(whole)


def _all(device: str) -> list[tuple[str, int]]:
    """Every comparison: a check and the scale of its shapes."""
    return [(name, scale) for scale in (SCALES if device != "cpu" else SCALES[:1]) for name in CHECKS]


def work(device: str, share: str, file: Path) -> None:
    """A worker: every n-th comparison, a line of JSON for each as soon as it is done."""
    number, _, count = share.partition("/")
    with file.open("a", encoding="utf-8") as lines:
        for name, scale in _all(device)[int(number) :: int(count)]:
            began, row = time.perf_counter(), {"name": f"{name} x{scale}", "ok": True}
            try:
                with torch.inference_mode():
                    CHECKS[name](torch.device(device), scale)
            except Exception as error:  # noqa: BLE001 - a finding, and the other checks still count
                row |= {"ok": False, "error": one_line(error)}
            row["seconds"] = round(time.perf_counter() - began, 3)
            lines.write(json.dumps(row) + "\n")
            lines.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
