"""The longest context of a model, read from its configuration, and the lengths at which its rotary frequencies
change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pqbench.errors import ConfigError

NO_LIMIT = 1 << 30
_SCALED = ("yarn", "linear", "llama3")  # their factor multiplies the original length; other kinds give the whole length


def rotations(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Every set of rotary parameters of a configuration: one, or one for each type of layer."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if isinstance(found, Mapping):
        yield from ([found] if "rope_type" in found else [one for one in found.values() if isinstance(one, Mapping)])


def longest_context(config: PreTrainedConfig) -> int:
    """The longest context in tokens that a model was made for. It is the larger of the model's own limit and the
    original length times the factor of its rotary scaling, which is how model cards specify YaRN."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not limit or limit < 0:
        return NO_LIMIT
    scaled = [
        int(one["factor"] * (one.get("original_max_position_embeddings") or limit))
        for one in rotations(config)
        if one.get("rope_type") in _SCALED and one.get("factor")
    ]
    return max([int(limit), *scaled])


def learned_positions(model: PreTrainedModel) -> int | None:
    """Number of rows in the model's table of learned positions; None if it has no such table. The model cannot run
    beyond this length."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    vocabulary = model.get_input_embeddings().num_embeddings
    return limit if limit and any(limit <= rows <= limit + 8 and rows != vocabulary for rows in tables) else None


def length_dependent(config: PreTrainedConfig) -> str | None:
    """The kind of rotary scaling if its frequencies depend on the length of the context; otherwise None."""
    kinds = {one.get("rope_type") for one in rotations(config)}
    return next((kind for kind in ("longrope", "dynamic") if kind in kinds), None)


def check_switch(config: PreTrainedConfig, first: int, last: int) -> None:
    """Raises ConfigError when rotary frequencies change while a context grows from ``first`` to ``last`` tokens in
    several forward passes. The cache would mix keys with old and new frequencies, and the result would differ from
    transformers' ``generate``.
    """
    text = config.get_text_config(decoder=True)
    for one in rotations(config):
        kind = one.get("rope_type")
        own = getattr(text, "max_position_embeddings", None) or NO_LIMIT
        switch = int(one.get("original_max_position_embeddings") or own)
        if kind == "longrope" and first <= switch < last:
            raise ConfigError(
                f"the model's rotary frequencies change after {switch} tokens (longrope), and this run "
                f"would cross that length between {first} and {last} tokens: prefill in one block "
                "(chunk=null), and keep prompt and answer together on one side"
            )
        if kind == "dynamic" and last > switch:
            raise ConfigError(
                f"the model's rotary frequencies change with every token beyond {switch} (dynamic), "
                f"and this run would reach {last}: keep prompt and answer within {switch}"
            )
