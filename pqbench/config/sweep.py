"""How the failures of runs reach the command that started them, whichever process the runs were in."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from pqbench.errors import PqbenchError


def cell() -> str:
    """The values of a sweep that this process is at, as the beginning of a message; nothing for a single run. What the
    command line gives to all runs is left out, as far as this process knows the command line."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    own = [override for override in HydraConfig.get().overrides.task if override not in sys.argv]
    return f"{' '.join(own)}: " if own else ""


class RunFailedError(PqbenchError):
    """A run of a sweep failed in another process, which has logged all of its failures."""


class Failures:
    """What failed in each run of this process, one line each.

    Launchers pickle the task and what it holds, so a worker fills a copy that nobody reads. Hydra brings back no
    values from there, but exceptions: a copy raises.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str, list[str]]] = []  # of each run, its cell and its failures
        self._copied = False

    def __getstate__(self) -> dict[str, Any]:
        return {"runs": [], "_copied": True}

    @property
    def count(self) -> int:
        """Failures of all runs."""
        return sum(len(lines) for _, lines in self.runs)

    def new(self, line: str) -> bool:
        """Whether no run of this process has failed in this way before."""
        return all(line not in lines for _, lines in self.runs)

    def add(self, lines: list[str], where: str = "") -> None:
        """Note a run's failures; ``where`` is its :func:`cell`. Raises RunFailedError in another process when there are
        any."""
        self.runs.append((where, lines))
        if self._copied and lines:
            more = f" (and {len(lines) - 1} more in this run)" if len(lines) > 1 else ""
            raise RunFailedError(
                f"{where}{lines[0]}{more}; other runs went on: `python -m pqbench.progress` counts what failed"
            )

    def listed(self) -> list[str]:
        """Every way in which runs failed: once where all of them failed so, otherwise once for each cell."""
        found: dict[str, list[str]] = {}
        for where, lines in self.runs:
            for line in dict.fromkeys(lines):
                found.setdefault(line, []).append(where)
        return [
            named
            for line, cells in found.items()
            for named in (
                [line] if len(cells) == len(self.runs) else dict.fromkeys(f"{where}{line}" for where in cells)
            )
        ]
