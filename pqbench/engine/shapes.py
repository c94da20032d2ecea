"""What is known about a prompt and a model's layers before anything runs: padding, positions, geometry and devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench.engine.batch import positions_of, rows_by_length
from pqbench.engine.cohort import Rows
from pqbench.engine.layers import Shape
from pqbench.engine.rehearsal import Profile, profile
from pqbench.engine.rotary import layer_frequencies
from pqbench.engine.setting import Setting
from pqbench.method import Geometry, Method
from pqbench.models.devices import available_bytes
from pqbench.store.tiers import Need


@dataclass(frozen=True)
class PromptShape:
    """A batch of prompts without its tokens.

    Attributes:
        mask: ``[B, S]`` bool, False on padding.
        cohorts: the rows of each cohort, the longest sequences first.
        padded: whether there is padding anywhere.
    """

    mask: Tensor
    cohorts: list[Rows]
    padded: bool

    @classmethod
    def of(cls, mask: Tensor) -> PromptShape:
        """The shape that a validity mask ``[B, S]`` describes. Waits for the device."""
        return cls(mask, rows_by_length(mask), not bool(mask.all()))

    @property
    def columns(self) -> int:
        """S, padding included."""
        return self.mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt, ``[B]``."""
        return self.mask.long().sum(-1)

    @property
    def positions(self) -> Tensor:
        """Position of every token within its own sequence, ``[B, S]``; 0 on padding."""
        return positions_of(self.mask)


def devices(model: PreTrainedModel) -> set[torch.device]:
    """Where the model's layers are: several devices when it was loaded with ``device=auto``."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return {torch.device(f"cuda:{place}" if str(place).isdigit() else place) for place in placed.values()}


def frequencies(model: PreTrainedModel, methods: Sequence[Method]) -> dict[int, Tensor]:
    """Rotary frequencies of every full-attention layer, see :func:`pqbench.engine.rotary.layer_frequencies`; empty when
    no method renumbers positions."""
    wanted = any(method.needs_positions for method in methods)
    return layer_frequencies(model, list(profile(model).layers)) if wanted else {}


def geometry(
    model: PreTrainedModel, layer: int, rows: Rows, columns: int, rotary: Tensor | None, setting: Setting
) -> Geometry:
    """The geometry for a method's state of one layer and cohort. ``rotary`` holds the layer's :func:`frequencies`."""
    layers = profile(model).layers
    known = layers[layer].geometry(layer, rows, columns - rows.padding, setting.backend)
    return replace(
        known,
        inverse_frequencies=None if rotary is None else rotary.to(known.device),
        layers=len(layers),
        rank=list(layers).index(layer),
        calibration=setting.calibration,
        correction=setting.correction if setting.select_ahead else None,
    )


def needs(
    known: Profile, reserve: int, working: int, free: Callable[[torch.device], int] = available_bytes
) -> list[tuple[int, Need]]:
    """What each device that holds full-attention layers must have room for: how many numbers the keys and values of one
    token are in the layers there, and the rest of the need. See :class:`pqbench.store.tiers.Need` for ``reserve`` and
    ``working``; every device runs layers of the prefill, so ``working`` counts on each. ``free`` says how many bytes
    can still be allocated on a device."""
    placed: dict[torch.device, list[Shape]] = {}
    for layer in known.layers.values():
        placed.setdefault(layer.device, []).append(layer)
    return [
        (
            Profile(dict(enumerate(layers))).row_numbers,
            Need(device, len(layers), free(device), reserve, working),
        )
        for device, layers in placed.items()
    ]


def working_bytes(model: PreTrainedModel, shape: PromptShape, block: int) -> int:
    """Estimate of the bytes that the prefill temporarily needs at its peak, in addition to weights, keys and values.
    They are the activations of one layer for ``block`` tokens of each sequence, the mask that padding needs, and two
    float32 copies of one layer's keys, which clustering takes while it builds an index."""
    config, known = model.config.get_text_config(decoder=True), profile(model)
    hidden = int(config.hidden_size)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    tokens = len(shape.mask) * min(block, shape.columns)
    projections = 2 * int(config.num_attention_heads) * max(layer.head_dim for layer in known.layers.values())
    activations = tokens * (4 * hidden + 3 * intermediate + projections) * model.dtype.itemsize
    mask = tokens * shape.columns * model.dtype.itemsize if shape.padded else 0
    keys = known.row_numbers // (2 * max(1, len(known.layers)))
    return activations + mask + 2 * 4 * keys * len(shape.mask) * shape.columns
