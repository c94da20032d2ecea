"""Teacher-forced decoding with a method in all layers: its errors run on through the model, as in generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.attention import attached
from pqbench.batch import check_logits
from pqbench.generation import Generation
from pqbench.method import Geometry, LayerState, Method
from pqbench.prompt import Prefilled, forward, now


@dataclass(frozen=True)
class Dense(Method):
    """Full attention: what all methods are compared with."""

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry)


@dataclass
class Drift:
    """Next-token predictions against full attention's, step by step.

    Attributes:
        full: ``[T, V]`` logits of full attention after each token read.
        targets: the T tokens of the text that follow those.
        kl: KL(full || method) in nats.
        agrees: whether the most likely token is the same.
        nll: -log probability of the text's token, in nats.
        nll_full: the same of full attention.
    """

    full: Tensor
    targets: Sequence[int]
    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_full: list[float] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """Count the next step: logits ``[V]``. In float64, for a difference of distributions that hardly differ."""
        step = len(self.kl)
        exact, mine = self.full[step].double().log_softmax(-1), logits.double().log_softmax(-1)
        self.kl.append(max(0.0, float((exact.exp() * (exact - mine)).nansum())))  # 0 * (-inf + inf) where p is 0
        self.agrees.append(bool(exact.argmax() == mine.argmax()))
        self.nll.append(-float(mine[self.targets[step]]))
        self.nll_full.append(-float(exact[self.targets[step]]))


def dense_logits(prefilled: Prefilled, tokens: Sequence[int]) -> Tensor:
    """Logits ``[T, V]`` of the prompt's method 0 after each of the T tokens read."""
    rows: list[Tensor] = []
    read(prefilled, 0, tokens, rows.append)
    return torch.stack(rows)


@torch.inference_mode()
def read(
    prefilled: Prefilled, method: int, tokens: Sequence[int], visit: Callable[[Tensor], None]
) -> Generation:  # fmt: skip
    """Let a method read ``tokens`` after the prompt one by one; ``visit`` gets the logits ``[V]`` after each.

    Returns what it cost, as if the tokens had been generated. One sequence at a time.

    Raises:
        ConfigError: the model computes NaN.
    """
    prefilled.build(method)
    cache, position, steps = prefilled.fork(method), prefilled.lengths[:, None], []
    logits = prefilled.logits
    with attached(prefilled.model):
        for step, token in enumerate(tokens):
            began = now(prefilled.model)
            logits = forward(prefilled.model, torch.full_like(position, token), cache, None, position + step)
            steps.append(now(prefilled.model) - began)
            visit(logits[0])
    check_logits(logits)  # once: NaN in a token's keys stays, since the window holds it
    read_ids = torch.tensor([list(tokens)], device=logits.device)
    observe, build = prefilled.observe_seconds[method], prefilled.build(method)
    generation = Generation(read_ids, prefilled.seconds + observe, steps, observe, build, 0.0, cache)
    generation.settle()
    return generation
