"""The settings from which the key of a run is made: everything that can change a figure, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pqbench.budget import Budget
from pqbench.method import Method
from pqbench.records.identity import method_code

KEYED = (
    "benchmark",
    "model",
    "store",
    "question",
    "chunk",
    "probe_tokens",
    "threads",
    "kernels",
    "overlap",
)  # what figures depend on, apart from the method
# Options that are part of the key only when they are switched on, so that older keys stay valid.
KEYED_WHEN_ON = {"graphs": ("graphs",), "select_ahead": ("select_ahead", "correction")}


def run_settings(plain: Mapping[str, Any], name: str, method: Method | None) -> dict[str, Any]:
    """The settings from which the key of a run is made: those of the whole run, those of one method, and the method's
    own code.

    Args:
        plain: the composed configuration, in which the methods have all their fields.
        name: the name of the method in the results.
        method: the method itself; None for records that do not belong to a configured method.
    """
    settings = {part: plain[part] for part in KEYED}
    settings |= {part: plain[part] for option, parts in KEYED_WHEN_ON.items() if plain[option] for part in parts}
    settings |= {"method": plain["methods"].get(name), "code": None if method is None else method_code(method)}
    if plain["weights"] is not None:
        settings["weights"] = plain["weights"]
    return settings


def whole(given: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """A method's configuration, completed with the default values of the fields that it does not set."""
    found = dict(given)
    for name in (field.name for field in fields(method)):
        value = getattr(method, name)
        if isinstance(value, Method):  # a method that contains another method
            found[name] = whole(given.get(name, {}), value)
        elif isinstance(value, Budget) and isinstance(given.get(name), Mapping):
            found[name] = {option: getattr(value, option, was) for option, was in given[name].items()}
        elif name not in given and type(value) in (bool, int, float, str, type(None)):
            found[name] = value
    return found
