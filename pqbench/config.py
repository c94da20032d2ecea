"""Where the configuration lies, and models by the names it gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqbench.errors import ConfigError

if TYPE_CHECKING:
    from pqbench.models import LoadedModel


def conf_folder() -> Path:
    """The configuration folder: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").exists() else package / "conf"


def load_model(name: str = "smollm2", /, **options: Any) -> LoadedModel:
    """The model that conf/model/NAME.yaml describes, with its tokenizer: ``load_model("hf", path="/models/mine")``.

    Args:
        options: fields that replace those of the yaml, e.g. ``dtype="bfloat16"``.

    Raises:
        ConfigError: no such name or field.
        ModelError: the model cannot be loaded.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    folder = conf_folder() / "model"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no model {name!r}: use one of {', '.join(known)}")
    fields = dict(OmegaConf.load(folder / f"{name}.yaml"))
    foreign = sorted(set(options) - set(fields))
    if foreign:
        raise ConfigError(f"model {name} has no field {', '.join(foreign)}: it has {', '.join(map(str, fields))}")
    fields.pop("chat")  # concerns prompts, not the model
    source = instantiate({**fields, **options})
    loaded: LoadedModel = source.load()
    return loaded
