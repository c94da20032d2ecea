"""Checks every configured value against the annotation of its field, before any object is made from the
configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, get_type_hints

from pqbench.errors import ConfigError
from pqbench.typed import allowed, shown, words


def check_fields(node: Any, path: str) -> None:
    """Check all values under a node of a composed configuration. ``path`` is the node's place in the configuration.

    Raises:
        ConfigError: the annotation of a field does not allow its value, or a ``_target_`` does not name a class. The
            message names the field, the value and what is allowed. Fields that the class does not have are not checked
            here, because making the object reports them.
    """
    if isinstance(node, Mapping):
        hints = _hints(node["_target_"], path) if "_target_" in node else {}
        for name, value in node.items():
            place = f"{path}.{name}" if path else str(name)
            if name in hints and not allowed(value, hints[name]):
                raise ConfigError(f"{place} is {shown(value)}: use {words(hints[name])}")
            check_fields(value, place)


def _hints(target: Any, path: str) -> dict[str, Any]:
    """Annotations of the fields of a dataclass, or of the parameters of a function or of another class. Raises
    ConfigError when ``target`` names none of these; ``path`` is the place of its node."""
    found = located(target)
    if not callable(found):
        raise ConfigError(
            f"{path}._target_ is {shown(target)}: use the full name of a class, such as methods.full.Full"
        )
    made = found if is_dataclass(found) or not isinstance(found, type) else found.__init__  # type: ignore[misc]
    try:
        hints = get_type_hints(made)
    except NameError:  # an annotation that only a type checker can resolve
        return {}
    hints.pop("return", None)
    return hints


def located(target: Any) -> Any:
    """The object that a full name such as ``methods.full.Full`` names; None when there is no object with this name.
    Other errors of the import are raised unchanged."""
    parts = target.split(".") if isinstance(target, str) else []
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but it imports another module that is missing
            continue
        except ValueError:  # an empty name
            return None
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None
