"""Prompts as a batch: checks of what goes into a model and of what comes out, and the cohorts of a left-padded
batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench.engine.cohort import Rows
from pqbench.errors import ConfigError
from pqbench.method import Check
from pqbench.models.lengths import check_switch, length_dependent, longest_context


def check_prompt(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    any_length: bool = False,
    max_length: int | None = None,
) -> Tensor:
    """Check a batch and return its validity mask ``[B, S]`` bool. With ``any_length`` a prompt may be longer than the
    model's limit; with ``max_length`` it may have up to that many tokens.

    Raises:
        ConfigError: an empty prompt, a mask of another shape, a mask with holes or right padding, or a prompt longer
            than allowed.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ConfigError(
            f"the prompt is empty: input_ids has shape {tuple(input_ids.shape)}, expected [B, S] with S > 0"
        )
    if not any_length:
        check_length(model, input_ids.shape[1], max_length)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ConfigError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids is {tuple(input_ids.shape)}")
    mask = attention_mask.to(input_ids.device, torch.bool)
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ConfigError("attention_mask has holes or right padding: pad on the left (tokenizer.padding_side='left')")
    if not bool(mask[:, -1].all()):
        raise ConfigError("a sequence of the batch is all padding: its prompt is empty")
    return mask


def positions_of(mask: Tensor) -> Tensor:
    """Position of every token within its own sequence ``[B, S]``, for a validity mask ``[B, S]``; 0 on padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def check_length(model: PreTrainedModel, tokens: int, max_length: int | None = None) -> None:
    """Raises ConfigError when ``tokens`` exceed both the model's own limit and ``max_length``."""
    limit = max(longest_context(model.config), max_length or 0)
    if tokens > limit:
        raise ConfigError(
            f"{tokens} tokens of prompt and generation exceed the model's limit of {limit}: shorten the "
            "prompt, choose a model with a longer context, or set model.max_length"
        )


def check_blocks(model: PreTrainedModel, mask: Tensor, chunk: int) -> None:
    """Raises ConfigError when a prompt of this mask, prefilled ``chunk`` columns at a time, would cross a length at
    which the model's rotary frequencies change."""
    if length_dependent(model.config) is None:  # otherwise the host would wait for the GPU
        return
    longest = int(mask.sum(-1).max())
    padding = mask.shape[1] - longest  # of the longest sequence
    check_switch(model.config, min(longest, max(0, chunk - padding)), longest)


def check_logits(logits: Tensor) -> None:
    """Raises ConfigError when the logits contain NaN. Tokens chosen from NaN would look like an ordinary answer."""
    if bool(logits.isnan().any()):
        raise ConfigError("the model's logits are NaN: weights or keys are not finite, try model.dtype=float32")


def check_indices(checks: Sequence[Check]) -> None:
    """Raises ConfigError with the message of the first check that does not hold; waits for the device once."""
    if not checks:
        return
    first = checks[0].holds.device
    for check, holds in zip(checks, torch.stack([c.holds.to(first) for c in checks]).tolist(), strict=True):
        if not holds:
            raise ConfigError(check.message)


def rows_by_length(mask: Tensor) -> list[Rows]:
    """The cohorts of a validity mask ``[B, S]``: sequences of equal length, the longest first."""
    padding = (~mask).long().sum(-1)
    if int(padding.min()) == int(padding.max()):
        return [Rows(slice(None), int(padding[0]), mask.shape[0])]
    found = []
    for columns in padding.unique(sorted=True).tolist():
        index = (padding == columns).nonzero().squeeze(1)
        found.append(Rows(index, columns, len(index)))
    return found
