"""How the failures of runs reach the command that started them, whichever process the runs were in."""

from __future__ import annotations

from typing import Any

from pqbench.errors import PqbenchError


class RunFailedError(PqbenchError):
    """A run of a sweep failed in another process, which has logged all of its failures."""


class Failures:
    """What failed in each run of this process, one line each.

    Launchers pickle the task and what it holds, so a worker fills a copy that nobody reads. Hydra brings back no
    values from there, but exceptions: a copy raises.
    """

    def __init__(self) -> None:
        self.runs: list[list[str]] = []
        self._copied = False

    def __getstate__(self) -> dict[str, Any]:
        return {"runs": [], "_copied": True}

    def add(self, lines: list[str]) -> None:
        """Note a run's failures. Raises RunFailedError in another process when there are any."""
        self.runs.append(lines)
        if self._copied and lines:
            more = f" (and {len(lines) - 1} more in this run)" if len(lines) > 1 else ""
            raise RunFailedError(
                f"{lines[0]}{more}; other runs went on: `python -m pqbench.progress` counts what failed"
            )
