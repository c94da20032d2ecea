"""``python -m plots.report results/``: one self-contained page, ``results/report/index.html``, of all records."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from plots.report.load import load
from plots.report.page import render
from pqbench.errors import DataError, PqbenchError
from pqbench.records.file import unwritable, write_atomically
from pqbench.terminal import log_to_terminal

log = logging.getLogger("plots")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a results folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m plots.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder that runs wrote to")
    options = parser.parse_args(arguments)
    log_to_terminal()
    path = options.results / "report" / "index.html"
    try:
        loaded = load(options.results)
        if not loaded.records:
            raise DataError(f"no records to report in {options.results}: run `make bench METHOD=pqcache` first")
        page = render(loaded).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, page)
        except OSError as error:
            raise unwritable(path.parent, error) from error
    except PqbenchError as error:
        log.error(error)
        return 1
    log.info("report %s (%.1f MB)", path, len(page) / 1e6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
