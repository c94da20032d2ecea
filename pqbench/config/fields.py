"""Every configured value is checked against the annotation of the field it fills, before anything is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.utils import get_object

from pqbench.errors import ConfigError
from pqbench.typed import allowed, shown, words


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
                raise ConfigError(f"{place} is {shown(value)}: use {words(hints[name])}")
            check_fields(value, place)


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
