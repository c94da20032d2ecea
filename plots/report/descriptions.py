"""Descriptions of methods from their own docstrings. The source is read with ``ast`` and never run, because a file of
results may name any class."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pqbench.records.classes import described

_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
_MARKUP = re.compile(r"``(.+?)``|:\w+:`~?(.+?)`|`(.+?)`", re.DOTALL)
_ATTRIBUTE = re.compile(r"    (\w+): +(.*)")


@dataclass(frozen=True)
class Span:
    """A piece of text that is shown as code or as ordinary words."""

    text: str
    code: bool


@dataclass
class Description:
    """Docstrings of a class and its module, in pieces."""

    summary: list[Span] = field(default_factory=list)
    paragraphs: list[list[Span]] = field(default_factory=list)
    attributes: list[tuple[str, list[Span]]] = field(default_factory=list)
    papers: list[str] = field(default_factory=list)  # arXiv ids


def describe(class_name: str) -> Description | None:
    """The description of a method's class, found by its name even if the class has moved; None if no yaml of a method
    names it."""
    known = described("method").get(class_name)
    return None if known is None else source_description(known.target)


@cache
def source_description(target: str) -> Description | None:
    """The description of a class with this dotted name; None if there is no such source here."""
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    for path in _sources(parts[:-1]):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == parts[-1]:
                return _description(ast.get_docstring(tree) or "", ast.get_docstring(node) or "")
    return None


def spans(text: str) -> list[Span]:
    """Split a text into ordinary words and its reStructuredText literals and roles."""
    found, place = [], 0
    for match in _MARKUP.finditer(text):
        found += [Span(text[place : match.start()], False), Span(match[1] or match[2] or match[3], True)]
        place = match.end()
    return [span for span in [*found, Span(text[place:], False)] if span.text]


def _sources(module: list[str]) -> Iterator[Path]:
    """Files that may define the names of a module: its own file and, for a package, the files inside. Imports
    nothing."""
    try:
        spec = importlib.util.find_spec(module[0])  # for a top-level name this loads no code
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if len(module) == 1 and spec.origin and spec.origin.endswith(".py"):
        yield Path(spec.origin)
    for location in spec.submodule_search_locations or ():
        place = Path(location).joinpath(*module[1:])
        yield place.with_name(f"{place.name}.py")
        yield from sorted(place.glob("*.py"))


def _description(module: str, text: str) -> Description:
    first = " ".join(module.split("\n\n")[0].split())
    found = Description(summary=spans(first), papers=list(dict.fromkeys(_ARXIV.findall(f"{module}\n{text}"))))
    inside = False
    for block in text.split("\n\n"):
        lines = block.splitlines()
        while lines:
            line = lines.pop(0)
            if line.strip() == "Attributes:":
                inside = True
            elif inside and (match := _ATTRIBUTE.fullmatch(line)):
                words = [match[2]]
                while lines and lines[0].startswith(" " * 8):
                    words.append(lines.pop(0).strip())
                found.attributes.append((match[1], spans(" ".join(words))))
            else:
                inside = False
                found.paragraphs.append(spans(" ".join([line, *lines])))
                break
    return found
