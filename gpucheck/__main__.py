"""``python3 -m gpucheck``: run the steps one after another, each in a process of its own, and summarise the results.

The exit code is 0 if nothing is wrong, even if targets were missed; 1 if something is wrong; 2 if the check cannot
start, with one line that says why; 130 if it was interrupted. Existing results are kept.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gpucheck.needs import bring
from gpucheck.options import ROOT, Options, UsageError, parse
from gpucheck.plan import STEPS, Step, granted, scaled
from gpucheck.process import Ended, run
from gpucheck.result import CUT, Result, read_json, write_json
from gpucheck.summary import line_of, summarise

MARGIN = 5.0  # seconds that are kept for the summary


def main() -> None:
    """Entry point."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        options = parse(sys.argv[1:])
        options.folder.mkdir(parents=True, exist_ok=True)
        code = check(options, began)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: finished steps are kept, STEPS=4,5 runs chosen ones\n")
        sys.exit(130)
    sys.exit(code)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def check(options: Options, began: float) -> int:
    """Run the steps. Returns the exit code.

    Raises:
        UsageError: a package or the GPU is missing, or the GPU cannot run the kernels.
    """
    packages = ROOT / "build" / "gpu-check-packages"
    shutil.rmtree(packages, ignore_errors=True)
    brought = bring((ROOT / options.wheels).resolve(), packages)
    if brought:
        say(f"unpacked from {options.wheels}: {', '.join(need.package for need in brought)}")
    environment = environment_of(options, packages if brought else None)
    end = began + options.limit - MARGIN
    _first(options, environment, end)
    try:
        waiting = [scaled(step, options.limit) for step in STEPS[1:] if step.number in options.steps]
        for step in _postponed(_in_order(waiting, options, environment, end), options, environment, end):
            _skip(step, options, f"no time left of {options.limit:g} seconds (LIMIT)")
    finally:
        summary = summarise(options.folder)
        (options.folder / "summary.md").write_text(summary.text, encoding="utf-8")
        write_json(options.folder / "summary.json", summary.content)
    say(f"\n{summary.text}\n{time.monotonic() - began:.0f} s; summary in {options.folder}/summary.md")
    return 1 if summary.wrong else 0


def _first(options: Options, environment: Mapping[str, str], end: float) -> None:
    """Run step 0, without which nothing else can run. Raises UsageError if the machine is not suitable; the description
    of an earlier run's machine is then kept."""
    path = options.folder / STEPS[0].file
    before = read_json(path)
    seconds = min(scaled(STEPS[0], options.limit).seconds, end - time.monotonic())
    result = _run(STEPS[0], seconds, options, environment, time.monotonic() + seconds)
    unfit = [row["unfit"] for row in result.get("rows", ()) if row.get("unfit")]
    if unfit:
        write_json(path, before) if before else path.unlink()
        raise UsageError(unfit[0])
    say(line_of(result))


def _in_order(waiting: list[Step], options: Options, environment: Mapping[str, str], end: float) -> list[Step]:
    """Run steps in order as long as the more important ones keep their time. Returns the skipped steps."""
    passed = []
    for i, step in enumerate(waiting):
        seconds = _share(step, waiting[i + 1 :], options, end)
        if seconds:
            say(line_of(_run(step, seconds, options, environment, time.monotonic() + seconds)))
        else:
            passed.append(step)
    return passed


def _postponed(passed: list[Step], options: Options, environment: Mapping[str, str], end: float) -> list[Step]:
    """Run skipped steps in the time that is left in the end, the most important first. Returns the steps that still did
    not fit."""
    left_out = []
    for step in sorted(passed, key=lambda step: step.importance):
        seconds = _share(step, (), options, end)
        if seconds:
            say(line_of(_run(step, seconds, options, environment, time.monotonic() + seconds)))
        else:
            left_out.append(step)
    return left_out


def _share(step: Step, later: Sequence[Step], options: Options, end: float) -> float:
    """Seconds that a step may take. The limits of the steps are meant for a GPU; on the CPU each step may use all the
    time that is left."""
    left = end - time.monotonic()
    return granted(step, later, left) if options.on_gpu else max(0.0, left)


def _run(
    step: Step, seconds: float, options: Options, environment: Mapping[str, str], deadline: float
) -> dict[str, Any]:
    """Run one step in a process of its own, complete its file, and say how it ended."""
    path = options.folder / step.file
    path.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "gpucheck.step", str(step.number), options.text(), str(deadline)]
    ended = run(command, seconds, options.folder / "logs" / f"{step.number}_{step.name}.log", environment, group=True)
    content = _settled(step, ended, read_json(path), options)
    write_json(path, content)
    return content


def _settled(step: Step, ended: Ended, content: dict[str, Any], options: Options) -> dict[str, Any]:
    """The result of a step, completed with what its process could not report itself."""
    if not content:
        empty = Result(step, options.folder, read_json(options.folder / STEPS[0].file).get("machine", {}))
        empty.write()
        content = read_json(options.folder / step.file)
    content["seconds"] = round(ended.seconds, 2)
    if content["message"] != CUT:
        return content  # the step closed it itself
    if ended.code is None:
        content["status"] = "timeout"
        content["message"] = f"out of time after {ended.seconds:.0f} s with {len(content['rows'])} rows"
    else:
        content["message"] = f"{CUT}, with exit code {ended.code}: {ended.said[-1500:]}"
    return content


def _skip(step: Step, options: Options, reason: str) -> None:
    result = Result(step, options.folder, read_json(options.folder / STEPS[0].file).get("machine", {}))
    result.close("skipped", reason)
    say(line_of(read_json(options.folder / step.file)))


def environment_of(options: Options, packages: Path | None) -> dict[str, str]:
    """The environment of the steps: this checkout and the unpacked packages come first on the path, there is no
    network, and on the CPU Triton's interpreter is used."""
    path = [str(ROOT), *([str(packages)] if packages else []), os.environ.get("PYTHONPATH", "")]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not options.on_gpu:
        found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return found


def say(line: str) -> None:
    """Print one line on the terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
