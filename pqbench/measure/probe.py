"""How well a method's selections approximate exact attention: retained mass, top-k recall and output error.

The probe is teacher-forced on a given continuation. Its inputs are clean: every layer passes the output of dense
attention on. All methods therefore see the same queries, and one pass measures all of them. Nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pqbench.engine.cohort import Cohort
from pqbench.engine.layers import OurLayer, by_kv_head, by_query, check_rows
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.steps import Forced, Steps
from pqbench.kernels import reference
from pqbench.kernels.sinks import left_by_sinks, with_sinks
from pqbench.method import Selection, Split
from pqbench.store.base import Store


class Exact:
    """Full attention of one step in one layer. Every method's answer to the same query is compared with it.

    Attributes:
        weights: probabilities ``[B, H, G, S]``; if the model has learned sinks, they add up to less than one.
        output: ``[B, H, G, D]`` float32.
        sunk: probability ``[B, H]`` that learned sinks hold, as a mean over the query group. Every method retains it.
    """

    def __init__(self, weights: Tensor, output: Tensor, sunk: Tensor | float = 0.0) -> None:
        self.weights, self.output, self.sunk = weights, output.float(), sunk
        self._best: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def received(self) -> Tensor:
        """Probabilities summed over the query group, ``[B, H, S]``."""
        return self.weights.sum(2)

    def best(self, split: Split) -> Tensor:
        """Positions ``[B, H, k]`` of the exact top-k among the middle tokens. They are computed once for each split."""
        first, stop = split.middle(self.weights.shape[3])
        key = first, stop, max(0, min(split.top_k, stop - first))
        if key not in self._best:
            self._best[key] = first + reference.top_k(self.received[..., first:stop], key[2])
        return self._best[key]


@dataclass(frozen=True)
class Seen:
    """The tokens that a method attends to in one step.

    Attributes:
        positions: ``[B, H, n]``, no token twice.
        visible: which of these tokens each query head sees, ``[B, H, G, n]`` bool; None if all heads see all of them.
    """

    positions: Tensor
    visible: Tensor | None

    def mass(self, exact: Exact) -> Tensor:
        """Share ``[B, H]`` of the exact probability that these tokens and learned sinks hold, as a mean over the query
        group."""
        if self.visible is None:
            return exact.received.gather(2, self.positions).sum(-1) / exact.weights.shape[2] + exact.sunk
        at = self.positions[:, :, None].expand(self.visible.shape)
        return (exact.weights.gather(3, at) * self.visible).sum(-1).mean(2) + exact.sunk

    def hits(self, wanted: Tensor, length: int) -> Tensor:
        """Which of the positions ``wanted`` ``[B, H, k]`` at least one query head attends to, bool ``[B, H, k]``."""
        any_head = (
            self.visible.any(2) if self.visible is not None else torch.ones_like(self.positions, dtype=torch.bool)
        )
        member = torch.zeros(*wanted.shape[:2], length, dtype=torch.bool, device=wanted.device)
        return member.scatter_(2, self.positions, any_head).gather(2, wanted)


@dataclass
class Fidelity:
    """Figures of one method. Each list holds one number ``[]`` for each layer and step, on the device where it was
    computed; ``mass`` and ``recall`` are means over KV heads.

    Attributes:
        mass: share of the exact attention probability that the attended tokens hold.
        recall: share of the exact top-k (same group rule, same k, middle tokens only) that is attended.
        output_error: ||o - o_full|| / ||o_full|| of the layer's attention output, all heads together.
    """

    mass: list[Tensor] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    output_error: list[Tensor] = field(default_factory=list)

    def means(self) -> dict[str, float | None]:
        """The mean of each figure; None for a figure that does not apply. Waits for the device."""
        figures = {"mass": self.mass, "recall": self.recall, "output_error": self.output_error}
        return {
            name: sum(torch.stack(values).tolist()) / len(values) if values else None
            for name, values in figures.items()
        }

    def add(self, exact: Exact, output: Tensor, seen: Seen, split: Split | None) -> None:
        """Count one step of one layer, in which the method answered ``output`` ``[B, H, G, D]``."""
        self.mass.append(seen.mass(exact).mean())
        difference = (output.float() - exact.output).flatten(1).norm(dim=1) / exact.output.flatten(1).norm(dim=1)
        self.output_error.append(difference.mean())
        best = None if split is None else exact.best(split)
        if best is not None and best.shape[2]:
            self.recall.append(seen.hits(best, exact.weights.shape[3]).float().mean())


class ProbeLayer(OurLayer):
    """Answers each query with dense attention, and also lets every method answer it."""

    def __init__(
        self, dense: Store, cohorts: Sequence[Cohort], fidelities: Sequence[Fidelity], splits: Any, seen: int
    ) -> None:
        super().__init__()
        self.dense, self.cohorts, self.fidelities, self.splits, self.seen = dense, cohorts, fidelities, splits, seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += 1
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Dense attention of one query per sequence, ``[B, 1, Hq, D]``."""
        check_rows(k, 1)
        self.dense.append(k, v)
        for cohort in self.cohorts:
            cohort.check(k, scaling)
            if cohort.store is self.dense:
                cohort.update()
            else:
                cohort.append(k, v)
        grouped = by_kv_head(q, k)
        full, lse, weights = reference.attention(
            grouped, self.dense.keys(), self.dense.values(), scaling, need_weights=True
        )
        known, sunk = self.cohorts[0].state.geometry.sinks, None
        if known is not None:
            full, weights = with_sinks(full, lse, weights, known)
            sunk = (1 - left_by_sinks(lse, known)).mean(2)
        exact = Exact(cast(Tensor, weights), full, 0.0 if sunk is None else sunk)
        for cohort, fidelity, split in zip(self.cohorts, self.fidelities, self.splits, strict=True):
            selection = cohort.select(grouped)
            cohort.contract.check(selection, cohort.store)
            seen = _seen(selection, cohort.store)
            output = cohort.answer(grouped, selection)
            fidelity.add(exact, output, seen, split(self.dense.length))
        return by_query(full)


@torch.inference_mode()
def probe(prefilled: Prefilled, tokens: Sequence[int], methods: Sequence[int] | None = None) -> list[Fidelity]:
    """Measure fidelity over the steps that read ``tokens`` as the continuation of a prefilled prompt.

    ``methods`` are indices into the prompt's methods; None for all of them. Returns one result for each method.

    Raises:
        RuntimeError: the sequences of the batch have different lengths.
        SelectionError: a method breaks its contract in one of the steps.
    """
    if len(prefilled.cohorts) != 1:
        raise RuntimeError("probe() needs sequences of equal length")
    chosen = range(len(prefilled.methods)) if methods is None else methods
    length, fidelities = int(prefilled.lengths[0]), [Fidelity() for _ in chosen]
    splits = [partial(prefilled.methods[m].split, prompt=length) for m in chosen]
    layers = {}
    for i, layer in prefilled.layers.items():
        dense, cohorts = prefilled.over_one_store(i, chosen)
        layers[i] = ProbeLayer(dense, cohorts, fidelities, splits, layer.seen)
    read_clean(prefilled, layers, tokens)
    return fidelities


def read_clean(prefilled: Prefilled, layers: Mapping[int, ProbeLayer], tokens: Sequence[int]) -> None:
    """Read ``tokens`` after a prompt with these layers as the cache, and wait for all transfers."""
    with Steps(prefilled, prefilled.cache(layers), Forced(tokens, prefilled.lengths)) as steps:
        steps.run()
    for probed in layers.values():
        for store in (probed.dense, *(cohort.store for cohort in probed.cohorts)):
            store.settle()


def _seen(selection: Selection, store: Store) -> Seen:
    """The tokens that a selection of a store's rows attends to. Positions are copied: answering may drop rows."""
    positions = store.positions
    positions = positions.clone() if selection.indices is None else positions.gather(2, selection.indices)
    return Seen(positions, selection.visible)
