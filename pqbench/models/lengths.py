"""How long a context a model can have, read from its configuration, and where its rotary frequencies change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pqbench.errors import ConfigError

NO_LIMIT = 1 << 30
_SCALED = ("yarn", "linear", "llama3")  # their factor multiplies the original length; others say the whole length


def rotations(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Every set of rotary parameters of a configuration: one, or one for each type of layer."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if isinstance(found, Mapping):
        yield from ([found] if "rope_type" in found else [one for one in found.values() if isinstance(one, Mapping)])


def longest_context(config: PreTrainedConfig) -> int:
    """Tokens of the longest context a model was made for: its own limit or, where that is more, the original length
    times the factor of its rotary scaling, as model cards write YaRN."""
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
    """Rows of the model's table of learned positions, beyond which it cannot run; None where it has no such table."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    vocabulary = model.get_input_embeddings().num_embeddings
    return limit if limit and any(limit <= rows <= limit + 8 and rows != vocabulary for rows in tables) else None


def length_dependent(config: PreTrainedConfig) -> str | None:
    """The kind of rotary scaling whose frequencies depend on the length of the context, None where they do not."""
    kinds = {one.get("rope_type") for one in rotations(config)}
    return next((kind for kind in ("longrope", "dynamic") if kind in kinds), None)


def check_switch(config: PreTrainedConfig, first: int, last: int) -> None:
    """Raises ConfigError when a context grows from ``first`` to ``last`` tokens in several forward passes while its
    rotary frequencies change: keys of both kinds would mix, which transformers' ``generate`` avoids or mixes otherwise.
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
