"""``python -m plots results/``: every figure that the records allow, as png and pdf, into ``results/figures/``.

``python -m plots results/ cache pareto`` draws only these two.
"""

from __future__ import annotations

import argparse
import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import plots
from plots.data import with_settings
from pqbench.errors import PqbenchError
from pqbench.records.file import read_all
from pqbench.records.folders import read_folders
from pqbench.tables.summaries import frame
from pqbench.terminal import log_to_terminal

log = logging.getLogger("plots")

DEFAULT = "make bench METHOD=pqcache"  # makes the records for the most wanted figures


def figures() -> Mapping[str, ModuleType]:
    """Every module in this folder that has a function ``draw(table, folder) -> paths``, with one figure per module.
    ``NEEDS`` says which records a module needs, ``MADE_BY`` which command makes them."""
    names = [found.name for found in pkgutil.iter_modules(plots.__path__) if found.name != "__main__"]
    modules = {name: import_module(f"plots.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "draw")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures of a results folder. Returns the exit code."""
    drawable = figures()
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    parser.add_argument("figures", nargs="*", help=f"all, or some of: {', '.join(drawable)}")
    options = parser.parse_args(arguments)
    log_to_terminal()
    foreign = sorted(set(options.figures) - drawable.keys())
    if foreign:
        log.error("there is no figure %s: use some of %s", ", ".join(foreign), ", ".join(drawable))
        return 1
    try:
        folders = read_folders(options.results)
        known = {run.key: (run.settings, next(iter(run.environments), {})) for run in folders}
        table = with_settings(frame(read_all(options.results, folders=folders)), known)
    except PqbenchError as error:
        log.error(error)
        return 1
    wanted = {name: drawable[name] for name in options.figures or drawable}
    try:
        drawn = {name: module.draw(table, options.results / "figures") for name, module in wanted.items()}
    except OSError as error:
        log.error("cannot write figures to %s: %s", options.results / "figures", error.strerror or error)
        return 1
    for path in [path for paths in drawn.values() for path in paths if path.suffix == ".png"]:
        log.info("figure %s", path)
    good = int((table["status"] == "ok").sum())
    return report_missing([name for name, paths in drawn.items() if not paths], wanted, options, good)


def report_missing(
    missing: Sequence[str], wanted: Mapping[str, ModuleType], options: argparse.Namespace, good: int
) -> int:
    """Say which records the missing figures need, and which command makes them. Returns the exit code: a missing figure
    is an error if it was asked for by name, or if there are no ``good`` records at all."""
    if not missing:
        return 0
    results = options.results
    if options.figures:
        for name in missing:
            module = wanted[name]
            log.error("%s is not drawn: it needs %s in %s: run `%s`", name, module.NEEDS, results, module.MADE_BY)
        return 1
    if len(missing) == len(wanted) and good:
        log.info("%d record(s) in %s are too few to draw any figure: `%s` makes more", good, results, DEFAULT)
        return 0
    if len(missing) == len(wanted):
        log.error("no records to draw in %s: run `%s` first", results, DEFAULT)
        return 1
    log.info("not drawn: %s; `python -m plots %s NAME` says what a figure needs", ", ".join(missing), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
