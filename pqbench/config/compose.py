"""From a command line to a configuration. Errors in it are explained in one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pqbench.errors import ConfigError, PqbenchError
from pqbench.models.sources import ModelSource
from pqbench.records.classes import conf_folder

log = logging.getLogger("pqbench")

# Hydra's messages about an option that no yaml has, and about an added option that the class does not have. They are
# replaced, because their advice is misleading.
_ABSENT = re.compile(r"Could not override '([^']+)'\.")
_FOREIGN = re.compile(r"unexpected keyword argument '(\w+)'.* full_key: ([\w.]+)")
_FOREIGN_TO = re.compile(r"call to target '[\w.]*?(\w+)'.*unexpected keyword argument '(\w+)'")
_PROMPTS = ("chat", "chat_options")  # fields of the group model that concern only prompts
_OPEN = ("model.chat_options.", "model.chat_options=", "budgets.")  # below these the user may choose any names
_OWN_BUDGET = re.compile(r"^methods\.(\w+)\.budget\.(?=\w+=)")
CHOICES = ("method", "budget", "model", "store", "benchmark", "scale", "experiment")  # groups of files in conf/
EXPLAINED = (PqbenchError, HydraException, OmegaConfBaseException)


def opened(arguments: Sequence[str]) -> list[str]:
    """Rewrite command line arguments for Hydra. Names that no yaml has get ``++`` in front. Fields of the budget of one
    method are collected in ``budgets``, because Hydra cannot set them inside an interpolation.

    Raises:
        ConfigError: an unknown flag, or a group such as ``model`` is given something else than the name of a file.
    """
    check_flags(arguments)
    check_choices(arguments)
    own = [_OWN_BUDGET.sub(r"budgets.\1.", argument) for argument in arguments]
    return [f"++{argument}" if argument.startswith(_OPEN) else argument for argument in own]


def own_budgets(config: DictConfig) -> None:
    """Change the configuration in place: every method whose budget has fields of its own gets the common budget with
    these fields replaced.

    Raises:
        ConfigError: there are fields for a method that does not run or that has no budget.
    """
    fields = dict(config.get("budgets") or {})
    with open_dict(config):
        for name, node in config.methods.items():
            written = OmegaConf.to_container(node, resolve=False).get("budget")
            own = dict(written) if isinstance(written, dict) and "_target_" not in written else {}
            own |= fields.pop(name, {})
            if not own:
                continue
            if written is None:
                raise ConfigError(f"methods.{name} has no budget of its own to set: see its fields with --cfg job")
            if ("tokens" in own) != ("ratio" in own):  # one of the two counts
                own["ratio" if "tokens" in own else "tokens"] = None
            node.budget = OmegaConf.merge(config.budget, own)
    if fields:
        raise ConfigError(f"methods.{next(iter(fields))}.budget: no method of that name runs here")


def model_source(fields: Mapping[str, Any]) -> ModelSource:
    """The model source that the group ``model`` of a configuration describes. ``chat`` and ``chat_options`` are left
    out, because they concern only prompts."""
    described = {name: value for name, value in fields.items() if name not in _PROMPTS}
    try:
        source: ModelSource = instantiate(described, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, PqbenchError):
            raise error.__cause__ from None  # our own line without Hydra's text around it
        raise
    return source


def chosen_methods() -> list[str]:
    """The files of the group ``method`` that this run asked for by name; none outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    values = [text.partition("=")[2] for text in HydraConfig.get().overrides.task if text.startswith("method=")]
    return [name.strip(" '\"") for name in values[-1].strip("[]").split(",")] if values else []


def check_yamls(
    folder: Path,
    methods: Mapping[str, Any],
    stray: Mapping[str, Any] | None = None,
    chosen: Sequence[str] = (),
) -> None:
    """Look for method yamls under ``folder``/method whose first line does not name their place in the configuration.
    Such a yaml is named in a warning if this run does not use it.

    Args:
        methods: the methods of the run.
        stray: fields outside of ``methods``, which come from a used yaml without that line.
        chosen: the yamls that the run asks for by name.

    Raises:
        ConfigError: a method of this run would be left out silently, because its yaml lacks the line or its fields name
            no class.
    """
    for path in sorted((folder / "method").glob("*.yaml")):
        wanted = f"# @package methods.{path.stem}"
        if path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].rstrip() != wanted:
            if path.stem in chosen or (stray and not chosen):
                raise ConfigError(f"{path}: its first line must be `{wanted}`, otherwise its method is left out")
            log.warning("%s: its first line must be `%s`; nothing here uses it", path, wanted)
    for name, fields in methods.items():
        if "_target_" not in (fields or {}):
            raise ConfigError(
                f"methods.{name} has fields but no class: name it with method=[..., {name}], or set "
                f"methods.{name}._target_"
            )


def check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for the first argument that begins like a flag but is not one of Hydra's flags."""
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in flags:
            raise ConfigError(f"there is no flag {name}{meant(name, flags)}: `python -m pqbench --help` lists them")


def check_choices(arguments: Sequence[str]) -> None:
    """Raises ConfigError when an argument gives a group such as ``model`` something else than names of files."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if group in CHOICES and (value in ("null", "true", "false") or re.match(r"[{+\-.\d]", value)):
            raise ConfigError(f"{group} is {value}: use {'names' if group == 'method' else 'one'} of {_stems(group)}")


def _stems(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))


def meant(name: str, known: Iterable[Any]) -> str:
    """``, did you mean ...?`` if one of the known names is similar to this one, and otherwise an empty text."""
    same = {str(one).lower(): str(one) for one in known if str(one) != name}
    close = get_close_matches(name.lower(), same, 1)
    return f", did you mean {same[close[0]]}?" if close else ""


def absent(option: str) -> str:
    """The message for an option that the composed configuration does not have."""
    *parents, field = option.split(".")
    folder = conf_folder()
    if not parents:
        known = [*OmegaConf.load(folder / "config.yaml"), *CHOICES]
        hint = meant(field, known)
        return f"there is no option {option} here{hint}: the same command with `--cfg job` shows the options"
    group = "method" if parents[0] == "methods" else parents[0]
    if group not in CHOICES:
        hint = meant(group, [*CHOICES, "methods"])
        return f"there is no option {option} here{hint}: the same command with `--cfg job` shows the options"
    fields = {path.stem: _fields(path) for path in sorted((folder / group).glob("*.yaml"))}
    if group == "method":
        name = parents[1] if len(parents) > 1 else field
        if name not in fields:
            return f"there is no method {name}{meant(name, fields)}: use one of {', '.join(fields)}"
        if field in (*fields[name], name):
            return f"there is no option {option} here, since {name} does not run: name it with method=[..., {name}]"
        return f"there is no option {option}{meant(field, fields[name])}: {name} has {', '.join(fields[name])}"
    holders = [f"{group}={stem}" for stem, held in fields.items() if field in held]
    if holders:
        return f"there is no option {option} here: it belongs to {' and '.join(holders)}, set that as well"
    every = dict.fromkeys(name for held in fields.values() for name in held)
    return f"there is no option {option} here{meant(field, every)}: the same command with `--cfg job` shows the options"


def _fields(path: Path) -> list[str]:
    """The fields of a yaml and of the yamls that it builds on."""
    found = OmegaConf.load(path)
    bases = [one for one in found.get("defaults", []) if isinstance(one, str) and one != "_self_"]
    own = [str(name) for name in found if name not in ("_target_", "defaults")]
    return [*own, *(name for base in bases for name in _fields(path.parent / f"{base}.yaml"))]


def explain(error: BaseException) -> str:
    """One line for an error: the message of the pqbench error that caused it, if there is one, and otherwise a line
    made from the message of Hydra or OmegaConf."""
    if isinstance(error, SystemExit):
        return "a method or benchmark of this run calls sys.exit() when its file is imported: remove that call"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher":
            return f"there is no launcher {name!r} here: `make setup-sweep` installs those of docs/sweeps.md"
        known = error.options or sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        return f"there is no {group or 'config'} {name!r}{meant(name, known)}: use one of {', '.join(known)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PqbenchError):
            return str(cause)
        cause = cause.__cause__
    text = " ".join(str(error).split())
    missing, foreign, made = _ABSENT.match(text), _FOREIGN.search(text), _FOREIGN_TO.search(text)
    if missing:
        return absent(missing[1])
    if foreign:
        return f"{foreign[2]} has no field {foreign[1]}: docs/configuration.md lists its fields"
    if made:
        return f"a {made[1]} has no field {made[2]}: docs/configuration.md lists its fields"
    return text if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {text} (debug=true shows where)"
