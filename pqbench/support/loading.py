"""Loads models and compares them with transformers on a few tokens, so that they are ready to be measured."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import OmegaConf

from pqbench.config.compose import model_source
from pqbench.engine.chooser import changes_of_greedy
from pqbench.engine.rehearsal import profile
from pqbench.errors import ConfigError
from pqbench.models.sources import LoadedModel, ModelSource
from pqbench.records.classes import conf_folder

log = logging.getLogger("pqbench")


def load_model(name: str = "smollm2", /, **options: Any) -> LoadedModel:
    """The model that conf/model/NAME.yaml describes, with its tokenizer: ``load_model("hf", path="/models/mine")``.

    Args:
        options: fields that replace those of the yaml, e.g. ``dtype="bfloat16"``.

    Raises:
        ConfigError: there is no model or field with this name.
        ModelError: the model cannot be loaded.
    """
    folder = conf_folder() / "model"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no model {name!r}: use one of {', '.join(known)}")
    fields = dict(OmegaConf.load(folder / f"{name}.yaml"))
    foreign = sorted(set(options) - set(fields))
    if foreign:
        raise ConfigError(f"model {name} has no field {', '.join(foreign)}: it has {', '.join(map(str, fields))}")
    return rehearsed(model_source({**fields, **options}))


def rehearsed(source: ModelSource) -> LoadedModel:
    """The model of a source, rehearsed: see :mod:`pqbench.engine.rehearsal`.

    Raises:
        ModelError: the model cannot be loaded, or no method can serve it exactly.
    """
    found = source.load()
    profile(found.model)
    changed = changes_of_greedy(found.model)
    if changed:
        log.warning(
            "%s: its generation settings change what greedy decoding chooses (%s); pqbench decodes without them, so "
            "that answers differ from those of transformers' generate",
            found.name,
            ", ".join(changed),
        )
    return found
