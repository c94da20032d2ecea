"""Brings the failures of runs to the command that started them, also from runs in other processes."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from pqbench.errors import PqbenchError


def cell() -> str:
    """The sweep values of the present run, as the beginning of a message; empty for a single run. Values that the
    command line gives to all runs are left out, if this process knows the command line."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    own = [override for override in HydraConfig.get().overrides.task if override not in sys.argv]
    return f"{' '.join(own)}: " if own else ""


class RunFailedError(PqbenchError):
    """A run of a sweep failed in another process. That process has logged all failures of the run."""


class Failures:
    """The failures of each run of this process, one line each.

    Launchers pickle the task and the objects in it, so a worker process fills a copy that nobody reads. Hydra returns
    exceptions from workers, but no values. Therefore a copy raises an exception when failures are added.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str, list[str]]] = []  # for each run: its cell and its failures
        self._copied = False

    def __getstate__(self) -> dict[str, Any]:
        return {"runs": [], "_copied": True}

    @property
    def count(self) -> int:
        """Number of failures of all runs."""
        return sum(len(lines) for _, lines in self.runs)

    def new(self, line: str) -> bool:
        """Whether no earlier run of this process has failed with this line."""
        return all(line not in lines for _, lines in self.runs)

    def add(self, lines: list[str], where: str = "") -> None:
        """Note a run's failures; ``where`` is its :func:`cell`. Raises RunFailedError in another process when there are
        any."""
        self.runs.append((where, lines))
        if self._copied and lines:
            more = f" (and {len(lines) - 1} more in this run)" if len(lines) > 1 else ""
            raise RunFailedError(
                f"{where}{lines[0]}{more}; other runs continued: `python -m pqbench.progress` counts the failures"
            )

    def listed(self) -> list[str]:
        """All different failures. A failure of all runs is listed once; any other failure is listed once for each
        cell."""
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
