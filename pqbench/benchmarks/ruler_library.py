"""lm-eval's RULER generators as a library: loaded quickly and without a network, as a private copy."""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.abc import Loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from pqbench.benchmarks.prose import sentences
from pqbench.errors import DataError

_REMEDY = "run: pip install 'lm-eval[ruler]==0.4.13'"


@cache
def library(name: str) -> ModuleType:
    """A private copy of lm-eval's RULER module ``name``: changes to it do not affect other users of lm-eval.

    Raises:
        DataError: lm-eval or its extra ``ruler`` is not installed.
    """
    path = _path(name)
    try:
        spec = importlib.util.spec_from_file_location(f"{__package__}._lm_eval_{name}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no module")
        module = importlib.util.module_from_spec(spec)
        if name == "prepare_niah":
            _load_prepare_niah(module, spec.loader)
        else:
            spec.loader.exec_module(module)
    except ImportError as error:
        raise DataError(f"RULER's generators come from lm-eval ({error}); {_REMEDY}") from error
    return module


def _path(name: str) -> Path:
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise DataError(f"RULER's generators come from lm-eval, which is not installed; {_REMEDY}")
    return Path(package.submodule_search_locations[0]) / "tasks" / "ruler" / f"{name}.py"


def _load_prepare_niah(module: ModuleType, loader: Loader) -> None:
    """Executes the module without the costs of its import: a download of nltk data and six million strings (1.2 GB)."""
    nltk_data, wonderwords = importlib.import_module("nltk.data"), importlib.import_module("wonderwords")
    categories = wonderwords.RandomWord()._categories
    nouns, adjectives = sorted(set(categories["nouns"])), sorted(set(categories["adjectives"]))
    empty = SimpleNamespace(_categories={kind: [] for kind in categories})
    with replaced(nltk_data, "find", lambda *_, **__: ""), replaced(wonderwords, "RandomWord", lambda: empty):
        loader.exec_module(module)
    vars(module).update(
        generate_random_word=lambda: f"{random.choice(adjectives)}-{random.choice(nouns)}",
        cached_sent_tokenize=sentences,
    )


@cache
def niah_template() -> str:
    """``TEMPLATE`` of niah_utils, read from its source, because executing it would import the costly module."""
    for node in ast.parse(_path("niah_utils").read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="TEMPLATE")], value=ast.Constant(value=str(template))):
                return template
    raise DataError(f"lm-eval's niah_utils has no TEMPLATE; {_REMEDY}")


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Inside the block ``module.name`` is ``value``."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block the global generators of random and numpy start from ``seed``; afterwards their state is
    restored."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
