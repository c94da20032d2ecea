"""``python -m plots results/``: every figure that the records allow, as png and pdf, into ``results/figures/``.

``python -m plots results/ cache pareto`` draws these alone.
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
from pqbench.records.folders import read_settings
from pqbench.tables.summaries import frame
from pqbench.terminal import log_to_terminal

log = logging.getLogger("plots")

DEFAULT = "make bench METHOD=pqcache"  # makes the records of figures that do not say otherwise


def figures() -> Mapping[str, ModuleType]:
    """Every module beside this one with a function ``draw(table, folder) -> paths``: one figure each."""
    names = [found.name for found in pkgutil.iter_modules(plots.__path__) if found.name != "__main__"]
    modules = {name: import_module(f"plots.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "draw")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures of a results folder. Returns the exit code."""
    known = figures()
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    parser.add_argument("figures", nargs="*", help=f"all, or some of: {', '.join(known)}")
    options = parser.parse_args(arguments)
    log_to_terminal()
    foreign = sorted(set(options.figures) - known.keys())
    if foreign:
        log.error("there is no figure %s: use some of %s", ", ".join(foreign), ", ".join(known))
        return 1
    try:
        table = with_settings(frame(read_all(options.results)), read_settings(options.results))
    except PqbenchError as error:
        log.error(error)
        return 1
    wanted = {name: known[name] for name in options.figures or known}
    drawn = {name: module.draw(table, options.results / "figures") for name, module in wanted.items()}
    for path in [path for paths in drawn.values() for path in paths if path.suffix == ".png"]:
        log.info("figure %s", path)
    good = int((table["status"] == "ok").sum())
    return report_missing([name for name, paths in drawn.items() if not paths], wanted, options, good)


def report_missing(
    missing: Sequence[str], wanted: Mapping[str, ModuleType], options: argparse.Namespace, good: int
) -> int:
    """Say which command makes the records of figures that were not drawn. It is an error when these were asked for by
    name, or when there are no ``good`` records at all; fewer records than any figure needs are none."""
    if not missing:
        return 0
    if options.figures:
        commands = dict.fromkeys(getattr(wanted[name], "MADE_BY", DEFAULT) for name in missing)
        lacking = ", ".join(missing)
        log.error("no records to draw %s in %s: run `%s` first", lacking, options.results, "`, `".join(commands))
        return 1
    if len(missing) == len(wanted) and good:
        log.info("%d record(s) in %s are too few to draw any figure: `%s` makes more", good, options.results, DEFAULT)
        return 0
    if len(missing) == len(wanted):
        log.error("no records to draw in %s: run `%s` first", options.results, DEFAULT)
        return 1
    log.info(
        "no records for %s: `python -m plots %s NAME` says which command makes them",
        ", ".join(missing),
        options.results,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
