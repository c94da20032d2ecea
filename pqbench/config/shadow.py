"""Finds other packages that hide ours. ``methods`` and ``plots`` are ordinary words, and a user may have packages with
these names."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from pqbench.errors import ConfigError

log = logging.getLogger(__name__)

OURS = Path(__file__).resolve().parents[2]  # the folder that holds pqbench/, methods/ and plots/


def check_import_path() -> None:
    """Warn when another package hides our package ``plots``, which only figures need. Imports neither package.

    Raises:
        ConfigError: another package hides our package ``methods``, without which nothing runs.
    """
    if line := hidden("methods"):
        raise ConfigError(line)
    if line := hidden("plots"):
        log.warning(line)


def hidden(name: str) -> str:
    """A line that says which package hides our package ``name`` and what to do; empty when our package is found."""
    found = find_spec(name)
    place = Path(found.origin).resolve().parent if found and found.origin else OURS / name
    if place == OURS / name:
        return ""
    return (
        f"your package {place} hides the package {name} of pqbench in {OURS}, because it comes first on the import "
        f"path: rename it, or take {place.parent} off the import path (run `pqbench` from another folder, or change "
        "PYTHONPATH)"
    )
