"""Decode steps of a whole model. One step is captured in a graph, and later steps replay it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pqbench.engine.graphs.engine import Engine, ready
from pqbench.engine.graphs.layer import CapturedLayer
from pqbench.engine.layers import DecodeLayer, LayeredCache

WARM = 2  # steps before a capture: the first waits for indices, and both may compile kernels
Forward = Callable[[LayeredCache, Tensor, Tensor], Tensor]


class GraphedSteps:
    """The steps of a model whose layers have one cohort each and are all our own.

    The first :data:`WARM` steps run without a graph, and so do steps in which a method is not ready because the context
    is too short for its index. Then one step is captured, and every further step is a replay.
    """

    def __init__(self, cache: LayeredCache, forward: Forward, more: int) -> None:
        """
        Args:
            cache: the cache whose layers decode.
            forward: the model's logits ``[B, V]`` for tokens ``[B]`` at positions ``[B, 1]``, with a given cache.
            more: the largest number of tokens still to come.
        """
        self._cache, self._forward, self._more = cache, forward, more
        self._layers: list[DecodeLayer] = list(cache.selective.values())
        self._engine: Engine | None = None
        self._token = self._position = torch.empty(0)
        self._steps = 0
        self.replays: list[int] = []  # the steps that replayed a captured step, counted from 0

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """One step: logits ``[B, V]`` after tokens ``[B]`` at positions ``[B, 1]``; the next step overwrites them.

        Raises:
            ModelError: the model's step cannot be captured.
        """
        self._steps += 1
        if self._engine is None and self._steps > WARM and self._ready():
            self._engine = self._opened(token, position)
        if self._engine is None:
            return self._forward(self._cache, token, position)
        if self._engine.captured:
            self.replays.append(self._steps - 1)
        self._token.copy_(token)
        self._position.copy_(position)
        logits = self._engine.step()
        for layer in self._layers:
            layer.seen += 1
        return logits

    def _ready(self) -> bool:
        cohorts = [layer.cohorts[0] for layer in self._layers]
        return ready(cohorts, cohorts[0].store.length + self._more - self._steps + 1)

    def _opened(self, token: Tensor, position: Tensor) -> Engine:
        """The engine, with tensors for the token and its position that every replay reads."""
        self._token, self._position = token.clone(), position.clone()
        captured = LayeredCache([CapturedLayer(layer) for layer in self._layers])

        def work() -> Tensor:
            return self._forward(captured, self._token, self._position)

        return Engine([layer.cohorts[0] for layer in self._layers], work)
