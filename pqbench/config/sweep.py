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
        self.runs: list[list[str]] = []
        self._reasons: set[str] = set()
        self._copied = False

    def __getstate__(self) -> dict[str, Any]:
        return {"runs": [], "_reasons": set(), "_copied": True}

    def new(self, reason: str) -> bool:
        """Whether no run of this process has failed for this reason before."""
        known = reason in self._reasons
        self._reasons.add(reason)
        return not known

    def add(self, lines: list[str]) -> None:
        """Note a run's failures. Raises RunFailedError in another process when there are any."""
        self.runs.append(lines)
        if self._copied and lines:
            more = f" (and {len(lines) - 1} more in this run)" if len(lines) > 1 else ""
            raise RunFailedError(
                f"{lines[0]}{more}; other runs went on: `python -m pqbench.progress` counts what failed"
            )
