"""Fidelity with clean inputs: every layer sees the dense model's queries. Figures are kept for each layer and KV head.

One pass measures all methods, through the same layer as in :mod:`pqbench.measure.probe`. The probe averages over layers
and KV heads; this module keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pqbench.engine.prefilled import Prefilled
from pqbench.measure.probe import Exact, Fidelity, ProbeLayer, Seen, read_clean
from pqbench.method import Split

AGES = ("prompt", "early", "late")


class HeadFidelity(Fidelity):
    """Figures of one method in one layer, for each step and KV head. There is one sequence, so B = 1.

    Attributes:
        edges: the first position of each age (:data:`AGES`), and the end of the last age. The ages are prompt tokens,
            tokens generated in the first half of the steps, and tokens generated in the second half.
        held: for each step ``[H]``, the share of the exact probability that the attended tokens hold.
        errors: for each step ``[H]``, the relative error of the head's output over its query group.
        layer_errors: for each step ``[]``, the relative error of the whole layer's output.
        found: for each step ``[H, ages]``, how many tokens of the exact top-k are attended, by age.
        wanted: for each step ``[H, ages]``, how many tokens the exact top-k has, by age.
    """

    def __init__(self, prompt: int, steps: int) -> None:
        super().__init__()
        self.edges = (0, prompt, prompt + steps // 2, prompt + steps)
        self.held: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.layer_errors: list[Tensor] = []
        self.found: list[Tensor] = []
        self.wanted: list[Tensor] = []

    def add(self, exact: Exact, output: Tensor, seen: Seen, split: Split | None) -> None:
        """Count one step, see :meth:`pqbench.measure.probe.Fidelity.add`."""
        self.held.append(seen.mass(exact)[0])
        off, size = (output.float() - exact.output)[0].flatten(1), exact.output[0].flatten(1)  # [H, G * D]
        self.errors.append(off.norm(dim=1) / size.norm(dim=1))
        self.layer_errors.append(off.norm() / size.norm())
        best = None if split is None else exact.best(split)[0]  # [H, k]
        if best is None or not best.shape[1]:
            return
        hit = seen.hits(best[None], exact.weights.shape[3])[0]
        ages = torch.bucketize(best, best.new_tensor(self.edges[1:-1]), right=True)  # [H, k], 0 .. len(AGES) - 1
        none = ages.new_zeros(len(best), len(AGES))
        self.found.append(none.scatter_add(1, ages, hit.long()))
        self.wanted.append(none.scatter_add(1, ages, torch.ones_like(ages)))


class Entropy(Fidelity):
    """Entropy in nats of one layer's exact attention, as a mean over the query group: ``[H]`` for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.nats: list[Tensor] = []

    def add(self, exact: Exact, output: Tensor, seen: Seen, split: Split | None) -> None:
        """Count one step, see :meth:`HeadFidelity.add`."""
        self.nats.append(torch.special.entr(exact.weights).sum(-1).mean(2)[0])


@dataclass(frozen=True)
class CleanFigures:
    """Figures of one method on one document, as means over the steps, for L full-attention layers and H KV heads.

    Attributes:
        layers: indices of the layers in the model.
        recall: ``[L, H]``, share of the exact top-k (same group rule, same k, middle tokens only) that is attended,
            over all steps together; NaN where the exact top-k is empty.
        mass: ``[L, H]``, share of the exact attention probability that the attended tokens hold.
        output_error: ``[L, H]``, ||o - o_full|| / ||o_full|| of the output of a KV head's whole query group.
        layer_error: ``[L]``, the same for all heads together. The probe of the benchmarks calls this figure output
            error.
        entropy: ``[L, H]``, entropy of the exact attention in nats.
        age_found, age_wanted: ``[ages]``, tokens of the exact top-k that are attended, and all of them, by age. Both
            are sums over layers, heads and steps.
    """

    layers: list[int]
    recall: Tensor
    mass: Tensor
    output_error: Tensor
    layer_error: Tensor
    entropy: Tensor
    age_found: Tensor
    age_wanted: Tensor


@torch.inference_mode()
def clean_figures(prefilled: Prefilled, tokens: Sequence[int], chosen: Sequence[int]) -> list[CleanFigures]:
    """Fidelity of the ``chosen`` methods (indices into the prompt's methods) over the steps that read ``tokens``.

    Method 0 of the prompt must be full attention.

    Raises:
        RuntimeError: a batch of several sequences.
        SelectionError: a method breaks its contract in one of the steps.
    """
    if len(prefilled.cohorts) != 1 or prefilled.cohorts[0].count != 1:
        raise RuntimeError("clean_figures() takes one sequence at a time")
    prompt, steps = int(prefilled.lengths[0]), len(tokens)
    splits = [partial(prefilled.methods[m].split, prompt=prompt) for m in (0, *chosen)]
    books: dict[int, list[HeadFidelity]] = {}
    entropies: dict[int, Entropy] = {}
    layers: dict[int, ProbeLayer] = {}
    for i, layer in prefilled.layers.items():
        entropies[i], books[i] = Entropy(), [HeadFidelity(prompt, steps) for _ in chosen]
        dense, cohorts = prefilled.over_one_store(i, (0, *chosen))
        layers[i] = ProbeLayer(dense, cohorts, [entropies[i], *books[i]], splits, layer.seen)
    read_clean(prefilled, layers, tokens)
    entropy = torch.stack([torch.stack(one.nats).mean(0) for one in entropies.values()]).cpu()
    return [_figures(list(layers), [books[i][n] for i in layers], entropy) for n in range(len(chosen))]


def each_alone(prefilled: Prefilled, tokens: Sequence[int], chosen: Sequence[int]) -> list[CleanFigures | Exception]:
    """:func:`clean_figures` of all methods at once. If that fails, each method is measured alone, so that only a method
    that is at fault has an error in place of its figures."""
    try:
        return list(clean_figures(prefilled, tokens, chosen))
    except Exception as error:  # noqa: BLE001 - becomes the row of the method at fault
        if len(chosen) == 1:
            return [error]
    return [found for method in chosen for found in each_alone(prefilled, tokens, [method])]


def _figures(layers: list[int], books: Sequence[HeadFidelity], entropy: Tensor) -> CleanFigures:
    """Means over the steps of one method; ``books`` holds its figures of each layer."""
    nothing = torch.zeros(1, entropy.shape[1], len(AGES))
    found = torch.stack([torch.stack(b.found).cpu().sum(0) if b.found else nothing[0] for b in books])  # [L, H, ages]
    wanted = torch.stack([torch.stack(b.wanted).cpu().sum(0) if b.wanted else nothing[0] for b in books])
    return CleanFigures(
        layers=layers,
        recall=found.sum(-1) / wanted.sum(-1),  # 0 / 0 is NaN
        mass=torch.stack([torch.stack(b.held).mean(0) for b in books]).cpu(),
        output_error=torch.stack([torch.stack(b.errors).mean(0) for b in books]).cpu(),
        layer_error=torch.stack([torch.stack(b.layer_errors).mean() for b in books]).cpu(),
        entropy=entropy,
        age_found=found.sum((0, 1)),
        age_wanted=wanted.sum((0, 1)),
    )
