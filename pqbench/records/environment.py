"""What figures may depend on apart from the configuration: versions, commit, machine and threads."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("pqbench", "torch", "transformers", "numba", "faiss-cpu", "lm-eval")


def environment() -> dict[str, Any]:
    """Versions, machine and thread count of this process, as JSON."""
    import torch  # takes seconds, and reading records does not need it

    return {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two environments, each as ``name old -> new``."""
    flat_old, flat_new = _flat(old), _flat(new)
    names = [*flat_old, *(name for name in flat_new if name not in flat_old)]
    return [
        f"{name} {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in names
        if flat_old.get(name) != flat_new.get(name)
    ]


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    packages = facts.get("packages")
    rest = {name: value for name, value in facts.items() if name != "packages"}
    return (packages if isinstance(packages, dict) else {}) | rest


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def _commit() -> str | None:
    """Commit of the checkout that contains this package, followed by + if there are local changes; None outside a
    checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # an installed package may lie inside somebody else's checkout
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
