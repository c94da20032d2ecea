"""Every configured value is checked against the annotation of the field it fills, before anything is made from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from pqbench.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def check_fields(node: Any, path: str) -> None:
    """Check all values under a node of a composed configuration, whose place in it is ``path``.

    Raises:
        ConfigError: a value that the annotation of its field does not allow; the message names the field, the value and
            what is allowed. Fields that the class does not have are left to the one who makes it.
    """
    if isinstance(node, Mapping):
        hints = _hints(node["_target_"]) if "_target_" in node else {}
        for name, value in node.items():
            place = f"{path}.{name}" if path else str(name)
            if name in hints and not allowed(value, hints[name]):
                raise ConfigError(f"{place} is {_shown(value)}: use {words(hints[name])}")
            check_fields(value, place)


def allowed(value: Any, hint: Any) -> bool:
    """Whether a value of a yaml fits an annotation. A whole number is a number; NaN and infinity are none. What an
    annotation names beyond yaml's own types (a class, made from a node with ``_target_``) is not looked at."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(allowed(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        entry = inner[0] if inner else Any
        return isinstance(value, list | tuple) and all(allowed(one, entry) for one in value)
    return True if hint is Any else not isinstance(value, str | bool | int | float | list | tuple)


def words(hint: Any) -> str:
    """What an annotation allows, for people."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(words(part) for part in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "names with values, {name: value}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {words(inner[0])}" if inner else "a list"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _hints(target: str) -> dict[str, Any]:
    """Annotations of the fields of a dataclass, or of the parameters of a function; none for what cannot be loaded: its
    error comes when it is made."""
    try:
        found = get_object(target)
        made = found if is_dataclass(found) or not isinstance(found, type) else found.__init__  # type: ignore[misc]
        hints = get_type_hints(made)
    except Exception:  # noqa: BLE001 - any error of an import; instantiating reports it
        return {}
    hints.pop("return", None)
    return hints


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
