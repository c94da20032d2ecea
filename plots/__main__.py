"""``python -m plots results/``: every figure that the records allow, as png and pdf, into ``results/figures/``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from plots import attention, costs, fidelity, latency, needle
from pqbench.errors import PqbenchError
from pqbench.records import read_all
from pqbench.summaries import frame
from pqbench.terminal import log_to_terminal

log = logging.getLogger("plots")

# One module per figure; each draws what it can from the records and returns the files it wrote.
FIGURES = (needle, latency, attention, fidelity, costs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures of a results folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m plots", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    options = parser.parse_args(arguments)
    log_to_terminal()
    try:
        table = frame(read_all(options.results))
    except PqbenchError as error:
        log.error(error)
        return 1
    paths = [path for figure in FIGURES for path in figure.draw(table, options.results / "figures")]
    if not paths:
        log.error("no records to draw in %s: run `make bench METHOD=pqcache` first", options.results)
        return 1
    for path in paths:
        if path.suffix == ".png":
            log.info("figure %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
