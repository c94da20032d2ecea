"""Prompt templates of the package ``lm-eval``, read from its task files without importing the package itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, UndefinedError

from pqbench.errors import DataError

# A trailing newline is part of a prompt, and a field that a row lacks must be an error, not an empty string.
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def _tasks_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("prompt templates come from the package lm-eval: pip install 'lm-eval==0.4.13'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_lm_eval_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loader(folder: Path) -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Callable[..., Any]:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")

        def call(*args: Any, **options: Any) -> Any:
            # The module is imported on the first call, because most tasks are loaded only for their text.
            return getattr(_module(folder / f"{module}.py"), name)(*args, **options)

        return call

    Loader.add_constructor("!function", function)
    return Loader


@cache
def load_task(relative_path: str) -> Mapping[str, Any]:
    """The task file at ``relative_path`` below lm-eval's task folder, with its ``include`` files merged in.

    ``!function`` entries become callables. Each file is read once, because generators ask for it at every step of their
    search for a length.

    Raises:
        DataError: lm-eval is not installed, or has no such task file.
    """
    path = _tasks_folder() / relative_path
    if not path.is_file():
        raise DataError(f"lm-eval has no task file {relative_path}: the templates are those of lm-eval 0.4.13")
    # The loader derives from SafeLoader, so no code of the file runs while it is read.
    own: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(path.parent))
    include = own.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [include] if isinstance(include, str) else include:
        merged |= load_task(str(Path(relative_path).parent / name))
    return MappingProxyType(merged | own)


def fill(config: Mapping[str, Any], doc: Mapping[str, Any]) -> str:
    """The prompt of ``doc``: the task's description, then its ``doc_to_text``.

    Raises:
        DataError: ``doc`` lacks a field that the template names.
    """
    template = config["doc_to_text"]
    try:
        text = template(doc) if callable(template) else _JINJA.from_string(template).render(dict(doc))
    except (UndefinedError, KeyError) as error:
        raise DataError(f"task {config.get('task', '?')}: the row lacks a field of the prompt ({error})") from error
    return str(config.get("description", "")) + str(text)
