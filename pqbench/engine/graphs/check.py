"""Checks, before anything runs, of which methods, tiers and models can be captured in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from pqbench.engine.layers import layer_types
from pqbench.errors import ConfigError
from pqbench.method import Method
from pqbench.store.tiers import Tier

_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose frequencies the host chooses by the length


def check_captured(methods: Mapping[str, Method], tier: Tier, model: PreTrainedModel | None = None) -> None:
    """Raises ConfigError when a decode step of a method over a tier, or of a model, cannot be captured."""
    obstacle = tier.why_not_captured()
    if obstacle is not None:
        raise ConfigError(f"graphs=true: {obstacle}")
    for name, method in methods.items():
        reason = method.why_not_captured(tier.offloads)
        if reason is not None:
            raise ConfigError(f"graphs=true: {name} {reason}: use graphs=false for it")
    if model is not None:
        _check_model(model)


def check_methods_ahead(methods: Mapping[str, Method]) -> None:
    """Raises ConfigError when a method cannot select with the query of the step before."""
    for name, method in methods.items():
        reason = method.why_not_ahead()
        if reason is not None:
            raise ConfigError(f"select_ahead=true: {name} {reason}: use select_ahead=false for it")


def _check_model(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    name = type(model).__name__
    if "sliding_attention" in layer_types(config):
        raise ConfigError(
            f"graphs=true: {name} has layers with sliding windows, whose cache moves in every step: use graphs=false"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    by_layer = [rotary] if "rope_type" in rotary else [part for part in rotary.values() if isinstance(part, Mapping)]
    for kind in {part.get("rope_type") for part in by_layer} & set(_LENGTH_DEPENDENT):
        raise ConfigError(
            f"graphs=true: {name} has a rotary embedding that depends on the length ({kind}): use graphs=false"
        )
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        raise ConfigError(f"graphs=true: {name} is spread over several devices: use a model that fits one GPU")


def check_batch_captured(cohorts: Sequence[object], padded: bool) -> None:
    """Raises ConfigError when the sequences of a batch are not all equally long."""
    if padded or len(cohorts) > 1:
        raise ConfigError("graphs=true serves batches of prompts of one length: use graphs=false, or a batch of one")
