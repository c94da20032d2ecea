"""Parts of a page that a command keeps up to date; they lie between two comments that are invisible to readers."""

from __future__ import annotations

from collections.abc import Mapping

from plots.pages.source import MAKER
from pqbench.errors import DataError


def replaced(page: str, parts: Mapping[str, str]) -> str:
    """The page with the text between the marks of each part replaced.

    Raises:
        DataError: the page lacks a mark.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name}: made by `{MAKER}` -->", f"<!-- end of {name} -->"
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise DataError(f"the README needs the lines {begin!r} and {end!r} around its part {name!r}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page
