"""Checks the outline of a composed configuration: every group is present and holds names with values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from pqbench.errors import ConfigError
from pqbench.method import Method
from pqbench.typed import shown

GROUPS = ("budget", "store", "model", "benchmark")


def check_shape(config: DictConfig) -> None:
    """Check what all other checks assume.

    Raises:
        ConfigError: a group was taken away or replaced by a value, or a field that concerns prompts has another type.
    """
    for group in GROUPS:
        if not isinstance(config.get(group), Mapping):
            raise ConfigError(f"{group} is {shown(config.get(group))}: choose one with {group}=NAME")
    for name in ("methods", "budgets"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {shown(value)}: use names with values, {{name: value}}")
    for name, fields in (config.get("methods") or {}).items():
        if fields is not None and not isinstance(fields, Mapping):
            raise ConfigError(f"methods.{name} is {shown(fields)}: use the fields of a method, {{name: value}}")
    for name, fields in (config.get("budgets") or {}).items():
        if not isinstance(fields, Mapping):
            raise ConfigError(f"methods.{name}.budget is {shown(fields)}: use the fields of a budget, {{name: value}}")
    check_prompts(config.model)


def check_prompts(model: Mapping[str, Any]) -> None:
    """Raises ConfigError for wrong values of ``chat`` and ``chat_options`` of the group ``model``, which no class
    checks."""
    if type(model.get("chat", True)) is not bool:
        raise ConfigError(f"model.chat is {shown(model['chat'])}: use true or false")
    options = model.get("chat_options")
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"model.chat_options is {shown(options)}: use names with values, {{name: value}}")


def made_method(name: str, fields: Any) -> Method:
    """The method that ``methods.NAME`` describes. Raises ConfigError when its class is not a method."""
    found = instantiate(fields)
    if not isinstance(found, Method):
        raise ConfigError(
            f"methods.{name}._target_ is {fields['_target_']!r}, which is not a method: see docs/add_a_method.md"
        )
    return found


def check_store(store: Mapping[str, Any]) -> None:
    """Raises ConfigError when no tier can be made from the group ``store``."""
    instantiate(store)
