"""Releases of transformers describe the layers of a cache differently; we read the same layers from each."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, cache_utils

from pqbench.engine.layers import layer_types, sliding_layers

CONFIGS: dict[str, tuple[PreTrainedConfig, list[str], list[int]]] = {
    "mixed": (
        Gemma3TextConfig(
            num_hidden_layers=3,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ["sliding_attention", "full_attention", "sliding_attention"],
        [24, 24],
    ),
    "full": (LlamaConfig(num_hidden_layers=2), ["full_attention"] * 2, []),
    "sliding": (MistralConfig(num_hidden_layers=2, sliding_window=16), ["sliding_attention"] * 2, [16, 16]),
}


def of_5_17(config: Any) -> tuple[list[str], dict[str, Any]]:
    """The answer of release 5.17: one set of arguments for the layers of all types."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return kinds, {"sliding_window": window} if "sliding_attention" in kinds else {}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("release", ["installed", "5.17", "without"])
def test_every_release_gives_the_same_layers(name: str, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, kinds, windows = CONFIGS[name]
    if release == "5.17":
        monkeypatch.setattr(cache_utils, "get_layer_types_and_kwargs", of_5_17)
    elif release == "without":
        monkeypatch.delattr(cache_utils, "get_layer_types_and_kwargs")
    assert layer_types(config) == kinds
    layers: dict[int, Any] = sliding_layers(config)
    assert [layers[i].sliding_window for i in sorted(layers)] == windows
