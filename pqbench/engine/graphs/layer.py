"""The cache layer that the model sees while a decode step is captured."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pqbench.engine.layers import DecodeLayer, OurLayer, by_kv_head, by_query, check_rows


class CapturedLayer(OurLayer):
    """The device's part of a :class:`pqbench.engine.layers.DecodeLayer` with one cohort. The host's part is done before
    each replay."""

    def __init__(self, layer: DecodeLayer) -> None:
        super().__init__()
        self.cohort = layer.cohorts[0]
        self.seen = layer.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Write the new token as attention sees it, then answer one query per sequence, ``[B, 1, Hq, D]``."""
        check_rows(k, 1)
        self.cohort.check(k, scaling)
        self.cohort.store.writer.write(k, v)
        return by_query(self.cohort.attend_captured(by_kv_head(q, k)))
