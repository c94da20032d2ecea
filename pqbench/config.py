"""Where the configuration lies, models by the names it gives them, and what went wrong with it in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pqbench.errors import ConfigError, PqbenchError
from pqbench.models import LoadedModel, ModelSource
from pqbench.rehearsal import profile

# What Hydra says of an option that no yaml has, of an added one that the class does not have; its advice leads astray.
_ABSENT = re.compile(r"Could not override '([^']+)'\.")
_FOREIGN = re.compile(r"unexpected keyword argument '(\w+)'.* full_key: ([\w.]+)")
_PROMPTS = ("chat", "chat_options")  # of the group model: what prompts are made with
_OPEN = ("model.chat_options.",)  # names below these are the user's own
EXPLAINED = (PqbenchError, HydraException, OmegaConfBaseException)


def conf_folder() -> Path:
    """The configuration folder: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else package / "conf"


def opened(arguments: Sequence[str]) -> list[str]:
    """Command line arguments in the form in which Hydra takes names that no yaml has: ``++`` before them."""
    return [f"++{argument}" if argument.startswith(_OPEN) else argument for argument in arguments]


def load_model(name: str = "smollm2", /, **options: Any) -> LoadedModel:
    """The model that conf/model/NAME.yaml describes, with its tokenizer: ``load_model("hf", path="/models/mine")``.

    Args:
        options: fields that replace those of the yaml, e.g. ``dtype="bfloat16"``.

    Raises:
        ConfigError: no such name or field.
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
    """The model of a source, rehearsed: see :mod:`pqbench.rehearsal`.

    Raises:
        ModelError: it cannot be loaded, or no method can serve it exactly.
    """
    found = source.load()
    profile(found.model)
    return found


def model_source(fields: Mapping[str, Any]) -> ModelSource:
    """The source that the group ``model`` of a configuration describes; ``chat`` and ``chat_options`` concern prompts
    alone."""
    source: ModelSource = instantiate({name: value for name, value in fields.items() if name not in _PROMPTS})
    return source


def check_yamls(folder: Path, methods: Mapping[str, Any]) -> None:
    """Raises ConfigError when a method would be left out silently: a yaml under ``folder``/method that does not say by
    its first line where its fields go, or fields of a method whose yaml was not named."""
    for path in sorted((folder / "method").glob("*.yaml")):
        wanted = f"# @package methods.{path.stem}"
        if path.read_text(encoding="utf-8").partition("\n")[0].rstrip() != wanted:
            raise ConfigError(f"{path}: its first line must be `{wanted}`, else its method is left out")
    for name, fields in methods.items():
        if "_target_" not in (fields or {}):
            raise ConfigError(f"methods.{name} has fields but no class: name it with method=[..., {name}], or set "
                              f"methods.{name}._target_")  # fmt: skip


def explain(error: BaseException) -> str:
    """One line that says what to do: our own error when one is behind it, else what Hydra or OmegaConf said."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher":
            return f"there is no launcher {name!r} here: `make setup-sweep` installs those of docs/sweeps.md"
        known = error.options or sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        return f"there is no {group or 'config'} {name!r}: use one of {', '.join(known)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PqbenchError):
            return str(cause)
        cause = cause.__cause__
    text = " ".join(str(error).split())
    absent, foreign = _ABSENT.match(text), _FOREIGN.search(text)
    if absent:
        return f"there is no option {absent[1]} here: the same command with `--cfg job` shows those there are"
    if foreign:
        return f"{foreign[2]} has no field {foreign[1]}: docs/configuration.md lists those it has"
    return text if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {text} (debug=true shows where)"
