"""``python -m plots.pages``: write ``docs/results/*.md``, their figures and the README's tables.

It reads the records in ``results/measured/`` and never runs a model. With ``--pack NAME RESULTS --command COMMAND`` it
first replaces the records of one page with those of a results folder.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType

from plots.pages import ablation, fidelity, quick, speed
from plots.pages.answer import answer, choice, overview
from plots.pages.marks import replaced
from plots.pages.packed import SUFFIX, Measured, pack, unpack
from pqbench.errors import DataError, PqbenchError
from pqbench.terminal import log_to_terminal

log = logging.getLogger("plots")

ROOT = Path(__file__).resolve().parents[2]
PAGES: Mapping[str, ModuleType] = MappingProxyType(
    {"quick_suite": quick, "fidelity": fidelity, "ablation": ablation, "speed": speed}
)  # one page each; a page without records is not made


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all pages of a checkout. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m plots.pages", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="the checkout; the default is this one")
    parser.add_argument("--pack", nargs=2, metavar=("NAME", "RESULTS"), help=f"NAME is one of {', '.join(PAGES)}")
    parser.add_argument("--command", help="with --pack: the command that made the results")
    options = parser.parse_args(arguments)
    log_to_terminal()
    try:
        if options.pack:
            _pack(options.root, options.pack[0], Path(options.pack[1]), options.command)
        found = read(options.root)
        if not found:
            raise DataError(f"no records in {options.root / 'results/measured'}: name the checkout that holds them")
        texts = made(found, (options.root / "README.md").read_text(encoding="utf-8"))
        for name, text in texts.items():
            path = options.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            log.info("page %s", path)
        draw(found, options.root / "docs" / "figures")
    except PqbenchError as error:
        log.error(error)
        return 1
    return 0


def _pack(root: Path, name: str, results: Path, command: str | None) -> None:
    if name not in PAGES:
        raise DataError(f"there is no page {name}: use one of {', '.join(PAGES)}")
    if not command:
        raise DataError("--pack needs --command: the command that made the results, as the page will show it")
    path = root / "results" / "measured" / f"{name}{SUFFIX}"
    log.info("%s: %d records", path, pack(results, path, command))


def read(root: Path) -> dict[str, Measured]:
    """The committed records behind each page; a page without records is absent.

    Raises:
        DataError: a file of records is damaged.
    """
    paths = {name: root / "results" / "measured" / f"{name}{SUFFIX}" for name in PAGES}
    return {name: unpack(path) for name, path in paths.items() if path.exists()}


def made(found: Mapping[str, Measured], readme: str) -> dict[str, str]:
    """The text of every page by its path in the checkout, the README with its tables included.

    Args:
        found: records by page.
        readme: the present text of the README; only the parts between its marks change.

    Raises:
        DataError: a mark is missing in the README.
    """
    texts = {f"docs/results/{name}.md": PAGES[name].page(measured) for name, measured in found.items()}
    if {"quick_suite", "fidelity"} <= found.keys():
        chosen = choice(found["quick_suite"], found["fidelity"])
        texts["README.md"] = replaced(readme, {"answer": answer(chosen), "overview": overview(chosen)})
    return texts


def draw(found: Mapping[str, Measured], folder: Path) -> None:
    """The figures of every page as png."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, measured in found.items():
            for path in PAGES[name].figures(measured, Path(scratch)):
                if path.suffix == ".png":
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, folder / path.name)
                    log.info("figure %s", folder / path.name)


if __name__ == "__main__":
    sys.exit(main())
