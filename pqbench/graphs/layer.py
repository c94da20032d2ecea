"""The cache layer that the model sees while a decode step is captured."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pqbench.cache import DecodeLayer, OurLayer


class CapturedLayer(OurLayer):
    """The device work of a :class:`pqbench.cache.DecodeLayer` with one group; the host's is done before each replay."""

    def __init__(self, layer: DecodeLayer) -> None:
        super().__init__()
        self.group = layer.groups[0]
        self.seen = layer.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.group.store.write(key_states, value_states)
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of one query per sequence, ``[B, 1, Hq, D]``."""
        batch, heads, _, width = q.shape
        grouped = q.view(batch, k.shape[1], heads // k.shape[1], width)  # [B, H, G, D]
        return self.group.attend_captured(grouped).reshape(batch, 1, heads, width)
