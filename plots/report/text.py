"""Text from models and files, made safe for the page: long text is shortened, and control characters are made
visible."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pqbench.terminal import plain

NAME = 80  # most characters of a name

# Control characters except tab and newline, bidirectional and other invisible controls, and lone surrogates. The
# joiners U+200C and U+200D are kept, since scripts and emoji need them and they do nothing else.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def inert(text: object) -> str:
    """Text with its control characters written out: the escape character as ``\\x1b``, an override as ``\\u202e``."""
    return _ACTIVE.sub(_escaped, str(text).replace("\r\n", "\n"))


def name(text: object) -> str:
    """A name on one line, shortened with an ellipsis."""
    return _shortened(str(text))


@lru_cache(maxsize=1 << 14)
def _shortened(text: str) -> str:
    shown = plain(text)
    return shown if len(shown) <= NAME else f"{shown[: NAME - 1]}…"


@dataclass(frozen=True)
class Clip:
    """The start of a text, and the number of characters that were cut off."""

    text: str
    cut: int


def clip(text: object, limit: int) -> Clip:
    """The first ``limit`` characters of a text, made inert."""
    whole = str(text)
    return Clip(inert(whole[:limit]), max(0, len(whole) - limit))


def facts(node: object, prefix: str = "", depth: int = 8) -> dict[str, str]:
    """A nested mapping as dotted names and short texts, ``{"budget.ratio": "0.1"}``; at most 200 of them."""
    found: dict[str, str] = {}
    _collect(node, prefix, depth, found)
    return found


def _collect(node: Any, prefix: str, depth: int, found: dict[str, str]) -> None:
    if len(found) >= 200:
        return
    if isinstance(node, Mapping) and node and depth:
        for key, value in node.items():
            _collect(value, f"{prefix}.{name(key)}" if prefix else name(key), depth - 1, found)
    else:
        plain_lists = isinstance(node, list) and all(isinstance(member, str | int | float) for member in node)
        shown = (
            ", ".join(map(str, node[:20]))
            if plain_lists
            else "null"
            if node is None
            else node
            if isinstance(node, str)
            else reprlib.repr(node)
        )
        found[prefix or "value"] = name(shown)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
