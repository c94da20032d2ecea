"""Step 0: what this machine is, and whether it can run the kernels at all."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import psutil
import torch

from gpucheck.options import Options
from gpucheck.result import Result
from pqbench.records.environment import environment

CAPABILITY = (8, 0)  # the kernels need bfloat16 on tensor cores
PACKAGES = ("torch", "triton", "transformers", "numba", "numpy", "safetensors", "hydra-core", "omegaconf")
_ASKED = (
    "name",
    "driver_version",
    "vbios_version",
    "memory.total",
    "memory.free",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.sm",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def run(result: Result, options: Options) -> None:
    """Describe the machine; a row with ``unfit`` says why no other step can run."""
    unfit = reason(options)
    if unfit:
        result.row("the device", unfit=unfit)
        return
    result.machine = facts(options)
    result.row("packages", None, **{name: version for name in PACKAGES if (version := _version(name))})
    memory = psutil.virtual_memory()
    result.row(
        "host memory", total_gib=memory.total / 2**30, available_gib=memory.available / 2**30, locked_limit=_locked()
    )
    if options.on_gpu:
        with result.guarded("the card"):
            _card(result, torch.device(options.device))


def reason(options: Options) -> str | None:
    """Why the check cannot run on the device that was asked for, in one line; None when it can."""
    if not options.on_gpu:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device that torch can use is here: run this where there is one, or with DEVICE=cpu SIZE=tiny"
    index = torch.device(options.device).index or 0
    if index >= torch.cuda.device_count():
        return f"DEVICE is {options.device}, and there are {torch.cuda.device_count()} CUDA devices: use a lower number"
    found = torch.cuda.get_device_capability(index)
    if found < CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]}, and the kernels "
            f"need {CAPABILITY[0]}.{CAPABILITY[1]} (A100 or newer): use such a card"
        )
    return None


def facts(options: Options) -> dict[str, Any]:
    """The description of the machine in every result. ``counts`` says whether its figures can be compared with the
    targets."""
    known = environment()
    found = {
        "device": known["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": known["commit"],
        "size": options.size,
        "counts": options.on_gpu and not options.tiny,
    }
    if options.on_gpu:
        card = torch.cuda.get_device_properties(torch.device(options.device))
        found |= {
            "device": card.name,
            "processor": known["processor"],
            "cuda": torch.version.cuda,
            "driver": _asked(("driver_version",), options).get("driver_version"),
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": card.total_memory / 2**30,
            "multiprocessors": card.multi_processor_count,
        }
    return found


def _card(result: Result, device: torch.device) -> None:
    """The driver's description of the card. An idle link slows down, so the driver is asked while bytes cross the
    link."""
    free, total = torch.cuda.mem_get_info(device)
    result.row("device memory", free_gib=free / 2**30, total_gib=total / 2**30)
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    for _ in range(200):  # one to two seconds of copies
        target.copy_(source, non_blocking=True)
    options = Options(device=str(device))
    result.row(
        "nvidia-smi", None, **(_asked(_ASKED, options) or {"error": "there is no nvidia-smi, or it does not answer"})
    )
    torch.cuda.synchronize(device)


def _asked(fields: tuple[str, ...], options: Options) -> dict[str, str]:
    """The fields that nvidia-smi knows; empty if there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    index = torch.device(options.device).index or 0
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={index}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in said.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) and not said.returncode else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _locked() -> str:
    """How much memory may be page-locked by this process without the driver's help."""
    import resource  # not on every platform that can read results

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
