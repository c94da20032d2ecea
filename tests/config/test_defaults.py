"""Every yaml that is not a preset gives each field the default that its class has."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from pqbench.config.compose import conf_folder

# Presets are yamls that deliberately set other values than their class. Every other yaml holds the defaults.
PRESETS = {
    "model/smollm2": "a model of its own",
    "model/llama31_8b": "a model of its own",
    "model/mistral_7b": "a model of its own",
    "model/qwen25_7b": "a model of its own",
    "benchmark/infinitebench_quick": "a part of infinitebench",
    "benchmark/ruler_quick": "a part of ruler",
}
GROUPS = ("method", "budget", "store", "benchmark", "model")
PROMPTS = {"chat", "chat_options"}  # keys of the group model that concern prompts and are not fields of the source


def plain_yamls() -> list[Path]:
    """Yamls that name a class."""
    found = [path for group in GROUPS for path in sorted((conf_folder() / group).glob("*.yaml"))]
    assert len(found) > 30
    return [path for path in found if "_target_:" in path.read_text(encoding="utf-8")]


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def defaults(target: str) -> dict[str, Any]:
    """The default of every field of a class, or of every parameter of a function, in the notation of yaml."""
    made = get_object(target)
    if is_dataclass(made):
        values = {
            one.name: one.default_factory() if one.default_factory is not MISSING else one.default
            for one in fields(made)
            if one.init
        }
    else:
        values = {name: one.default for name, one in inspect.signature(made).parameters.items()}
    known = {name: value for name, value in values.items() if value not in (MISSING, inspect.Parameter.empty)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


@pytest.mark.parametrize("path", plain_yamls(), ids=label)
def test_a_yaml_gives_every_field_the_default_of_its_class(path: Path) -> None:
    written = dict(OmegaConf.to_container(OmegaConf.load(path), resolve=False))  # type: ignore[arg-type]
    known = defaults(written.pop("_target_"))
    plain = {name: value for name, value in written.items() if not _made_elsewhere(value)}
    differing = {name: (value, known[name]) for name, value in plain.items() if name in known and value != known[name]}
    assert (differing == {}) != (label(path) in PRESETS), differing


def _made_elsewhere(value: Any) -> bool:
    """Whether a value comes from another group, or is an object of its own."""
    return (isinstance(value, str) and value.startswith("${")) or (isinstance(value, dict) and "_target_" in value)


def test_every_preset_is_there() -> None:
    assert set(PRESETS) <= {label(path) for group in GROUPS for path in (conf_folder() / group).glob("*.yaml")}
