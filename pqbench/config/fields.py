"""Every configured value is checked against the annotation of the field it fills, before anything is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, get_type_hints

from pqbench.errors import ConfigError
from pqbench.typed import allowed, shown, words


def check_fields(node: Any, path: str) -> None:
    """Check all values under a node of a composed configuration, whose place in it is ``path``.

    Raises:
        ConfigError: a value that the annotation of its field does not allow; the message names the field, the value and
            what is allowed. Fields that the class does not have are left to the one who makes it. Also for a
            ``_target_`` that names no class.
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
    ConfigError when ``target`` names nothing of the kind; ``path`` is the place of its node."""
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
    """What a full name such as ``methods.full.Full`` stands for; None when there is nothing of that name. Whatever else
    an import raises passes through."""
    parts = target.split(".") if isinstance(target, str) else []
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there and lacks another one
            continue
        except ValueError:  # an empty name
            return None
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None
