"""Every method of conf/method with any budget, for the contract tests. A new yaml is included without registration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from pqbench.config.compose import conf_folder
from pqbench.method import Budget, Method

FOLDER = conf_folder() / "method"
# Options that make an index small enough for prompts of a few dozen tokens. All other options have their defaults.
SMALL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sparq": {"rank": 4},
        "infllm": {"block_size": 4, "representatives": 2},
        "pqcache": {"m": 2, "b": 3},
        "pqcache_plus": {"b": 3, "b_v": 3},
        "snapkv": {"observation": 6, "kernel": 3},
        "pyramidkv": {"observation": 6, "kernel": 3},
        "quest": {"page_size": 4},
        "magicpig": {"bits": 1, "tables": 12},  # samples more than small budgets allow
        "vattention": {"base": {"_target_": "methods.sparq.SparQ", "rank": 4}},
    }
)
# Variants of methods: the name of the yaml, and options in addition to those above.
_CELLS = {"tail": "mean", "codebook": "centred", "spread": False, "search": "cells"}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "infllm per head": ("infllm", {"block_size": 5, "representatives": 1, "per_head": True}),
        "pqcache_plus mean": ("pqcache_plus", {"b": 2, **_CELLS}),
        "pqcache_plus sampled": ("pqcache_plus", {"tail": "sampled", "codebook": "rotated", "refresh": 7}),
        "snapkv avg": ("snapkv", {"observation": 70, "kernel": 5, "pooling": "avg"}),
        "quest max": ("quest", {"page_size": 5, "group": "max"}),
        "tova per head": ("tova", {"per_head": True}),
        "vattention oracle": ("vattention", {"base": {"_target_": "methods.oracle.Oracle"}, "share": 0.2}),
    }
)


def method_of(name: str, budget: Budget | None = None, **options: Any) -> Method:
    """The method of conf/method/NAME.yaml with these options and, unless it is None, this budget."""
    fields = OmegaConf.load(Path(FOLDER, f"{name}.yaml"))
    if "budget" in fields:
        del fields["budget"]
    method: Method = instantiate(OmegaConf.merge(fields, OmegaConf.create(dict(options))), _convert_="all")
    return method if budget is None else method.with_budget(budget)


def names() -> list[str]:
    """Names of the yamls of methods, without those that are only presets of another method."""
    found = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [name for name in found if "${budget." not in Path(FOLDER, f"{name}.yaml").read_text(encoding="utf-8")]


def small(name: str, budget: Budget) -> Method:
    """A method or variant with this budget and a small index; a method without a budget is not changed."""
    yaml, options = VARIANTS.get(name, (name, {}))
    method = method_of(yaml, **{**SMALL.get(yaml, {}), **options})
    return method if method.budget is None else method.with_budget(budget)


SELECTING = tuple(name for name in (*names(), *VARIANTS) if small(name, Budget()).budget is not None)
EVERY = (*SELECTING, *(name for name in names() if name not in SELECTING))


def exact(name: str) -> Method:
    """A method with a budget that holds every token. If a method renumbers tokens outside the window by design, all
    tokens are in the window."""
    method = small(name, Budget(sink=4, ratio=1.0))
    renumbers = method.needs_positions and not method.evicts
    return small(name, Budget(sink=0, window=4096, ratio=1.0)) if renumbers else method
