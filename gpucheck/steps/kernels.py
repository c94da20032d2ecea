"""Step 1: every kernel against its definition, in several processes, since most of the time is spent on compiling.

The comparisons are those of tests/kernels/gpu_checks.py, on the GPU also at a larger scale. The tests of tests/gpu run
beside them; they cover page-locked memory, streams, threads and a long context.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from gpucheck.options import Options
from gpucheck.process import Running
from gpucheck.result import Result, device_is_lost, one_line
from tests.kernels.gpu_checks import CHECKS

PROCESSES = 6
SCALES = (1, 29)  # scales of the shapes in the checks
TESTS = (
    "-m",
    "pytest",
    "tests/gpu",
    "--noconftest",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-q",
    "-k",
    "not test_triton_equals_the_reference",
)
END = 3  # seconds that are kept for ending the processes


def run(result: Result, options: Options) -> None:
    """Start all processes, collect their rows as they come, and name the checks that did not finish."""
    # The tests of tests/gpu are the sixth process. In the interpreter two processes run a third of the comparisons.
    shares = ["0/6", "3/6"] if options.tiny else [f"{i}/{PROCESSES - 1}" for i in range(PROCESSES - 1)]
    folder = options.folder / "logs"
    workers = [Worker(options.device, share, folder / f"kernels-{i}") for i, share in enumerate(shares)]
    tests = [Running([sys.executable, *TESTS], folder / "kernels-tests.log")] if options.on_gpu else []
    while any([*(worker.going_on(result) for worker in workers), *(tested.running for tested in tests)]):
        if result.left < END:
            break
        time.sleep(0.5)
    for tested in tests:
        ended = tested.wait(0)
        error = {} if ended.code == 0 else {"error": f"exit code {ended.code}: {ended.said[-1500:]}"}
        result.row("tests/gpu", ended.code == 0, **error)
    missing = [name for worker in workers for name in worker.end(result)]
    if missing:
        result.row("comparisons without an end", False, error=f"out of time before {', '.join(missing)}")


class Worker:
    """A process that runs a share of the comparisons. If a comparison ends the process, or the GPU then refuses further
    work, the process is started again at the next comparison."""

    def __init__(self, device: str, share: str, path: Path) -> None:
        self._names = [label(name, scale) for name, scale in share_of(device, share)]
        self._device, self._share, self._path = device, share, path
        self._done = 0
        self._start()

    def going_on(self, result: Result) -> bool:
        """Take over the rows that were written since the last call. Returns whether more are to come."""
        running = self._process.running  # asked first, so that all that a process wrote before its end is read
        self._gather(result)
        if self._done == len(self._names):
            return running
        if not running:
            ended = self._process.wait(0)
            if self._started == self._done:  # no row since the start: this comparison ended the process
                result.row(self._names[self._done], False, error=f"exit code {ended.code}: {ended.said[-500:]}")
                self._done += 1
            if self._done < len(self._names):
                self._start()
        return self._done < len(self._names)

    def end(self, result: Result) -> list[str]:
        """End the process. Returns the comparisons that it did not reach."""
        self._process.wait(0)
        self._gather(result)
        return self._names[self._done :]

    def _start(self) -> None:
        self._started = self._done
        self._lines = self._path.with_name(f"{self._path.name}-from-{self._done}.jsonl")
        self._lines.unlink(missing_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", __name__, self._device, self._share, str(self._done)]
        self._process = Running([*command, str(self._lines)], self._lines.with_suffix(".log"))

    def _gather(self, result: Result) -> None:
        text = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        for line in whole[self._done - self._started :]:
            row = json.loads(line)
            result.row(row.pop("name"), row.pop("ok"), **row)
            self._done += 1


def share_of(device: str, share: str) -> list[tuple[str, int]]:
    """Every n-th comparison, beginning with the i-th, from a text ``i/n``. A comparison is a check and the scale of its
    shapes."""
    number, _, count = share.partition("/")
    everything = [(name, scale) for scale in (SCALES if device != "cpu" else SCALES[:1]) for name in CHECKS]
    return everything[int(number) :: int(count)]


def label(name: str, scale: int) -> str:
    """The name of a row."""
    return f"{name} x{scale}"


def work(device: str, share: str, done: int, file: Path) -> None:
    """The process of a worker: it skips the first ``done`` comparisons, and writes a line of JSON after each of the
    others."""
    with file.open("a", encoding="utf-8") as lines:
        for name, scale in share_of(device, share)[done:]:
            began, row = time.perf_counter(), {"name": label(name, scale), "ok": True}
            try:
                with torch.inference_mode():
                    CHECKS[name](torch.device(device), scale)
            except Exception as error:  # noqa: BLE001 - a finding, and the other checks still count
                row |= {"ok": False, "error": one_line(error)}
            row["seconds"] = round(time.perf_counter() - began, 3)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            if not row["ok"] and device_is_lost():
                return


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
