"""Which packages the check needs, which of them are missing, and how they are installed.

A bare image has the large packages. The small ones that it lacks can come as a folder of wheels. All of them are plain
Python, so it is enough to unpack a wheel.
"""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpucheck.options import ROOT, UsageError


class Need(NamedTuple):
    """The name of a package in an index, and the module whose import shows that it is installed."""

    package: str
    module: str


IMAGE = tuple(
    Need(package, module)
    for package, module in [
        ("torch", "torch"),
        ("triton", "triton"),
        ("transformers", "transformers"),
        ("tokenizers", "tokenizers"),
        ("safetensors", "safetensors"),
        ("numba", "numba"),
        ("numpy", "numpy"),
        ("psutil", "psutil"),
        ("jinja2", "jinja2"),
        ("pyyaml", "yaml"),
        ("filelock", "filelock"),
        ("pytest", "pytest"),
    ]
)
CARRIED = tuple(
    Need(package, module)
    for package, module in [
        ("hydra-core", "hydra"),
        ("omegaconf", "omegaconf"),
        ("antlr4-python3-runtime", "antlr4"),
        ("threadpoolctl", "threadpoolctl"),
        ("platformdirs", "platformdirs"),
        ("rich", "rich"),
        ("markdown-it-py", "markdown_it"),
        ("mdurl", "mdurl"),
        ("pygments", "pygments"),
    ]
)


def missing(needs: Iterable[Need]) -> list[Need]:
    """The packages that cannot be imported here."""
    importlib.invalidate_caches()
    return [need for need in needs if find_spec(need.module) is None]


def pins(packages: Iterable[str]) -> list[str]:
    """The packages with their versions in constraints.txt, which were tested together."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    known = {_plain(line.partition("==")[0]): line.strip() for line in lines if "==" in line}
    return [known.get(_plain(package), package) for package in packages]


def bring(wheels: Path, into: Path) -> list[Need]:
    """Unpack the wheels of missing packages into a folder and put it on the path. Returns the packages that were added.

    Raises:
        UsageError: a package is missing and has no wheel; the message names it and the command that installs it.
    """
    absent = missing(IMAGE)
    if absent:
        names = [need.package for need in absent]
        raise UsageError(
            f"gpu-check needs {', '.join(names)}, which {sys.executable} lacks: use an image that has "
            f"them (PYTHON=/path/to/its/python3), or {_install(names)}"
        )
    wanted, brought = missing(CARRIED), []
    for need in wanted:
        wheel = _wheel(wheels, need.package)
        if wheel is not None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
            brought.append(need)
    if brought:
        sys.path.insert(0, str(into))
    lacking = [need.package for need in missing(CARRIED)]
    if lacking:
        where = f"{wheels} has no wheels of them" if wheels.is_dir() else f"there is no folder {wheels}"
        offline = "for a machine without a network run `make gpu-wheels` where there is one and bring its folder along"
        raise UsageError(f"gpu-check needs {', '.join(lacking)}, and {where}: {_install(lacking)}; {offline}")
    return brought


def _wheel(folder: Path, package: str) -> Path | None:
    """The newest wheel of a package that holds plain Python only."""
    found = [path for path in folder.glob("*-none-any.whl") if _plain(path.name.partition("-")[0]) == _plain(package)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _install(packages: Iterable[str]) -> str:
    return f"run `{sys.executable} -m pip install {' '.join(pins(packages))}`"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
