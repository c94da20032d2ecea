"""Checks of a device before work starts. Each error is one line that says what to do."""

from __future__ import annotations

import importlib.util
import os

import psutil
import torch

from pqbench.errors import ModelError

CAPABILITY = (8, 0)  # smallest supported compute capability; the Triton kernels use bfloat16, which older GPUs lack


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, including memory that torch keeps for later use."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)


def check_room(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises ModelError when ``needed`` bytes for ``what`` do not fit the device; ``remedy`` ends the message."""
    free = available_bytes(device)
    if needed > free:
        raise ModelError(f"{what} need {needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free: {remedy}")


def check_device(device: str, option: str = "model.device") -> None:
    """Raises ModelError when this machine does not have the device; ``option`` is the option that chose it."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{option} is {device!r}: use cpu, cuda, cuda:N or auto") from error
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"{option} is {device!r}: use cpu, cuda, cuda:N or auto")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"{option}={device}, but no CUDA device is available here: set {option}=cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"{option}={device}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0")


def check_kernels(backend: str, device: torch.device) -> None:
    """Raises ModelError when a backend cannot compute on a device. The Triton backend needs a GPU of compute capability
    :data:`CAPABILITY`; on the CPU it works only in Triton's interpreter."""
    if backend == "gpu" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        remedy = (
            "set model.device=cuda, or kernels=auto"
            if torch.cuda.is_available()
            else "there is none here, set kernels=auto"
        )
        raise ModelError(f"kernels=gpu computes on a GPU, not on {device.type}: {remedy}")
    if backend == "gpu" or (backend == "auto" and device.type == "cuda"):
        _check_triton()
    if device.type == "cuda" and backend in ("gpu", "auto"):
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            raise ModelError(
                "the Triton kernels need a GPU of compute capability {}.{}, and ".format(*CAPABILITY)
                + f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: "
                "set kernels=reference, or model.device=cpu"
            )


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ModelError(
            "kernels on a GPU are written in Triton, which is not installed here: `pip install triton`, "
            "or set kernels=reference"
        )
