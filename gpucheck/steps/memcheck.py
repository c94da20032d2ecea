"""Step 8: six kernels under ``compute-sanitizer``, whose memcheck sees every access outside an allocation.

On the CPU, and if the tool is missing, the same six run without it, so that the code of this step is tested.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from gpucheck.options import Options
from gpucheck.process import run as run_process
from gpucheck.result import Result, one_line
from tests.kernels.gpu_checks import CHECKS

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
KERNELS = ("attention", "pq ", "top_k", "encode", "train", "gather")  # beginnings of the names of their comparisons
FOUND = 99  # exit code of the tool when it found an error


def run(result: Result, options: Options) -> None:
    """Run each kernel in turn, in one process under the tool."""
    tool = shutil.which("compute-sanitizer") or next((path for path in PLACES if Path(path).exists()), None)
    lines = options.folder / "logs" / "memcheck.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", __name__, options.device, str(lines)]
    checked = tool is not None and options.on_gpu
    if checked:
        command = [
            str(tool),
            "--tool",
            "memcheck",
            "--error-exitcode",
            str(FOUND),
            "--report-api-errors",
            "no",
            *command,
        ]
    # Without torch's cache of freed memory the tool knows the bounds of every allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = run_process(command, result.left - 3, options.folder / "logs" / "memcheck.log", environment)
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else ():
        row = json.loads(line)
        result.row(row.pop("name"), row.pop("ok"), **row)
    if checked:
        result.row(
            "memcheck",
            None if ended.code is None else ended.code == 0,
            exit_code=ended.code,
            error=None if ended.code == 0 else ended.said[-1500:],
            timeout=ended.code is None,
        )
    else:
        why = "there is no compute-sanitizer here" if options.on_gpu else "the CPU's memory is no card's"
        result.row("memcheck", skipped=f"{why}; the kernels ran without it")


def work(device: str, file: Path) -> None:
    """The process under the tool: it makes six comparisons and writes a line of JSON for each."""
    kinds = KERNELS if device != "cpu" else KERNELS[:2]
    names = [next(name for name in CHECKS if name.startswith(kind)) for kind in kinds]
    with file.open("a", encoding="utf-8") as lines:
        for name in names:
            row: dict[str, object] = {"name": name, "ok": True}
            try:
                with torch.inference_mode():
                    CHECKS[name](torch.device(device), 1)
                if device != "cpu":
                    torch.cuda.synchronize(device)
            except Exception as error:  # noqa: BLE001 - a finding, and the other kernels still count
                row |= {"ok": False, "error": one_line(error)}
            lines.write(json.dumps(row) + "\n")
            lines.flush()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
