"""The rotary frequencies with which each layer of a model rotates its keys, for methods that give keys other positions.

The model's buffers hold candidate frequencies, and a measurement finds those that a layer uses; model code is not read.
One token goes through the model at several positions, each time as a sequence of its own. Such a sequence attends only
to itself. The input of each layer therefore does not depend on the position, and the keys of a layer differ only by
their rotation. Our rotation with the right frequencies gives the same keys. A layer whose keys do not change has no
rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pqbench.engine.attention import attached, dense_attention, forward, takes_positions
from pqbench.engine.batch import check_logits
from pqbench.engine.layers import LayeredCache, OurLayer, sliding_layers
from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.models.lengths import length_dependent

_POSITIONS = (0, 1, 7, 60, 1000)


class KeyLayer(OurLayer):
    """A cache layer that keeps the keys ``[B, H, 1, D]`` of one token per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of each token to itself, ``[B, 1, Hq, D]``."""
        self.keys = k.float()
        return dense_attention(module, q, k, v, mask, scaling, self.sinks)


@torch.inference_mode()
def layer_frequencies(model: PreTrainedModel, layers: list[int]) -> dict[int, Tensor]:
    """Rotary frequencies ``[D_rotary / 2]`` in radians per position of each of ``layers``; an empty tensor ``[0]``
    where a layer does not rotate its keys.

    Raises:
        ModelError: the model has no rotary embedding, one that depends on the length, or one that pairs dimensions in
            another way or rotates other dimensions than the first ones.
        ConfigError: the model computes NaN.
    """
    name, frequencies = type(model).__name__, _candidates(model)
    if not takes_positions(model) or not frequencies:
        raise ModelError(f"{name} has no rotary position embedding, which this method renumbers")
    if length_dependent(model.config) is not None:
        raise ModelError(
            f"{name} has rotary frequencies that depend on the length of the context, so that this method "
            f"cannot renumber its keys ({length_dependent(model.config)})"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _POSITIONS[-1] + 1
    positions = torch.tensor([p for p in _POSITIONS if p < limit], device=model.device)[:, None]
    ours = {i: KeyLayer() for i in layers}
    every = {**sliding_layers(model.config.get_text_config(decoder=True)), **ours}
    cache = LayeredCache([every[i] for i in range(len(every))])
    with attached(model):
        check_logits(forward(model, torch.full_like(positions, 5), cache, None, positions))
    for layer in ours.values():
        check_logits(layer.keys.flatten(1))  # no frequencies would be found for NaN
    accuracy = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.03
    found = {i: _found(layer.keys[:, :, 0], positions[:, 0], frequencies, accuracy) for i, layer in ours.items()}
    if any(one is None for one in found.values()):
        raise ModelError(f"{name} rotates keys in a way this method cannot renumber")
    return {i: one for i, one in found.items() if one is not None}


def _candidates(model: PreTrainedModel) -> list[Tensor]:
    """All different frequencies that the model keeps in its buffers."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.ndim == 1 and not any(torch.equal(buffer, known) for known in found):
            found.append(buffer)
    return found


def _found(keys: Tensor, positions: Tensor, frequencies: list[Tensor], accuracy: float) -> Tensor | None:
    """The frequencies that rotate the first of the keys ``[n, H, D]`` into each of the others. An empty tensor ``[0]``
    if all keys are equal; None if no frequencies give these keys."""
    none = torch.empty(0, device=keys.device)
    tolerance = accuracy * float(keys.norm(dim=-1).max())
    turns = positions[:, None].expand(keys.shape[:2])
    for tried in (none, *(one.to(keys.device) for one in frequencies)):
        if 2 * len(tried) <= keys.shape[-1]:
            turned = reference.rotate(keys[:1].expand_as(keys), turns, tried)
            if float((turned - keys).norm(dim=-1).max()) <= tolerance:
                return tried
    return None
