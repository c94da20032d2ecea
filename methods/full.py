"""Full attention: exact attention to every cached token. The reference for quality and the baseline for time."""

from __future__ import annotations

from dataclasses import dataclass

from pqbench.method import Geometry, LayerState, Method


@dataclass(frozen=True)
class Full(Method):
    """Attends to every token, without selection or budget. Decoding uses grouped SDPA: KV heads are not repeated."""

    def why_not_captured(self, offloads: bool) -> str | None:
        return "attends to the whole context, which the host tier brings over anew as it grows" if offloads else None

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry)
