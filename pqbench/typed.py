"""Checks values against the annotations of the fields that they fill, both in a configuration and in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pqbench.errors import ConfigError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
}
_IN_PYTHON: dict[Any, str] = {bool: "True or False", NoneType: "None"}


def check_types(made: Any, place: str, error: type[Exception] = ConfigError) -> None:
    """Check the fields of a dataclass instance.

    Args:
        made: the instance.
        place: what messages call it, such as ``budget`` or the name of its class.
        error: class of the exception to raise.

    Raises:
        ConfigError: or ``error``, for a value that the annotation of its field does not allow. The message names the
            field, the value and what is allowed.
    """
    kind: Any = type(made)
    hints = _hints(kind)
    for name in (field.name for field in fields(made)):
        value = getattr(made, name)
        if name in hints and not allowed(value, hints[name], made=True):
            raise error(f"{place}.{name} is {shown(value)}: use {words(hints[name], python=True)}")


def allowed(value: Any, hint: Any, made: bool = False) -> bool:
    """Whether a value fits an annotation. An int also fits float; NaN and infinity do not.

    Args:
        made: True if an object must be an instance of the annotated class; False if it must be a mapping of field names
            to values, as in a configuration.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(allowed(value, part, made) for part in inner)
    if origin is Literal:
        return value in inner
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, Real) and math.isfinite(value)
    if hint is int:
        return isinstance(value, Integral)
    if hint in (str, NoneType):
        return isinstance(value, hint)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if isinstance(kind, type) and issubclass(kind, Sequence):
        entry = inner[0] if inner else Any
        return isinstance(value, list | tuple) and all(allowed(one, entry, made) for one in value)
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return True  # the annotation does not say which class a value must have
    return isinstance(value, hint if made else Mapping)


def words(hint: Any, python: bool = False) -> str:
    """What an annotation allows, in words for messages; ``python`` uses the spelling of Python, such as None."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(words(part, python) for part in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "names with values, {name: value}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {words(inner[0], python)}" if inner else "a list"
    known = {**_WORDS, **_IN_PYTHON} if python else _WORDS
    name = f"a {getattr(hint, '__name__', hint)}"
    return known.get(hint) or (name if python else f"the fields of {name}, {{name: value}}")


def shown(value: Any) -> str:
    """A value as messages show it: on one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _hints(made: Any) -> dict[str, Any]:
    """Annotations of a dataclass by field; empty if one cannot be resolved, as for a class inside a function."""
    try:
        return get_type_hints(made)
    except NameError:
        return {}
