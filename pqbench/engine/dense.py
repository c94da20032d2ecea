"""Full attention as a method. Every other method is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

from pqbench.method import Geometry, LayerState, Method


@dataclass(frozen=True)
class Dense(Method):
    """Attends to every token and has no budget."""

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry)
