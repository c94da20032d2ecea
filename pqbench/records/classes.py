"""The classes that records name, found by their names in the present configuration. Loads nothing that runs a model.

A record names its classes by their import paths at the time of the run. A path changes when a file is moved. Therefore
the class of an old record is the class with the same name in a yaml of ``conf/``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import yaml

from pqbench.records.identity import class_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """A class that a yaml of the configuration describes: the name of the yaml, and the present place of the class."""

    name: str
    target: str


def conf_folder() -> Path:
    """The configuration folder: next to the package in a checkout, inside the package when installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else package / "conf"


def described(group: str) -> dict[str, Described]:
    """The classes that the yamls of a group describe, by class name without the module. Yamls that name a constructor
    of a class are left out."""
    found: dict[str, Described] = {}
    for path in sorted((conf_folder() / group).glob("*.yaml")):
        try:
            node = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            log.warning("%s is no yaml file that can be read: its class is not known", path)
            continue
        target = str(node.get("_target_", "")) if isinstance(node, dict) else ""
        name = class_name(target)
        if name and target.endswith(f".{name}"):
            found.setdefault(name, Described(path.stem, target))
    return found
