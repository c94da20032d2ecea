"""The part of a page that names the origin of its figures: machine, threads, date, code and command."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from plots.pages.packed import Measured
from pqbench.records.file import Record

MAKER = "python -m plots.pages"
WIDTH = 110  # of a command line on a page


def heading(title: str, introduction: str) -> list[str]:
    """The first lines of every page."""
    made = f"This page is made by `{MAKER}` from the records in `results/measured/`. Do not edit it by hand."
    return [f"# {title}", "", made, "", introduction, ""]


def origin(measured: Measured, samples: str) -> list[str]:
    """A list of where the figures come from, and the command that makes their records.

    Args:
        measured: the packed records.
        samples: how many samples stand behind a figure, in words.
    """
    environments = [environment for _, environment in measured.runs.values()]
    versions = {
        f"{name} {environment['packages'][name]}"
        for environment in environments
        for name in ("torch", "transformers")
        if name in environment.get("packages", {})
    }
    machines = {str(one.get("accelerator") or f"{one.get('processor')}, no GPU") for one in environments}
    commits = {str(one.get("commit"))[:9] for one in environments if one.get("commit")}
    rows = [
        ("Machine", joined(machines)),
        ("Threads", joined({str(one.get("threads")) for one in environments})),
        ("Samples", samples),
        ("Measured on", measured.date),
        ("Versions", joined(versions)),
        ("Commit", joined(commits)),
    ]
    lines = [f"- {name}: {value}" for name, value in rows if value]
    return [*lines, "", "The command that makes these records:", "", "```", *wrapped(measured.command), "```", ""]


def wrapped(command: str) -> list[str]:
    """A command over several lines, which end in backslashes; it is cut at spaces between arguments."""
    if "'" in command:  # a quoted argument may hold spaces, so it has a line of its own
        parts = command.split(" '")
        plain, quoted = parts[0], [f"'{part}" for part in parts[1:]]
    else:
        plain, quoted = command, []
    lines = textwrap.wrap(plain, WIDTH, break_long_words=False, break_on_hyphens=False) + quoted
    indented = [lines[0], *(f"    {line}" for line in lines[1:])]
    return [*(f"{line} \\" for line in indented[:-1]), indented[-1]]


def filled(text: str) -> list[str]:
    """A paragraph in lines."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def joined(words: Iterable[str]) -> str:
    """Words in alphabetical order with commas between them."""
    return ", ".join(sorted(words))


def good(records: Sequence[Record]) -> list[Record]:
    """The records without those of failures."""
    return [record for record in records if record["status"] == "ok"]


def mean(records: Sequence[Record], field: str) -> float | None:
    """The mean of a field over the records in which it is a number; None if there is no such record."""
    values = [record[field] for record in records if isinstance(record.get(field), int | float)]
    return fmean(values) if values else None


def picture(text: str, name: str) -> list[str]:
    """Markdown that shows a figure of ``docs/figures/`` on a page in ``docs/results/``."""
    return [f"![{text}](../figures/{Path(name).name})", ""]
