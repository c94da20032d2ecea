"""``benchmark=attention_scores``: how exact attention is spread over tokens, from the heaviest token to the
lightest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.grid import whole
from pqbench.engine.prefill import prefill
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.measure.base import Job, Ledger, Measured, Measurement, at_least, tracked
from pqbench.measure.dense import backend_name
from pqbench.measure.machine import device_name
from pqbench.measure.source import prose_tokens
from pqbench.method import Geometry, LayerState, Method
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record
from pqbench.records.kinds import ATTENTION_SCORES, DENSE

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # shares of heaviest tokens whose probability is recorded


@dataclass
class AttentionScores(Measurement):
    """Sorted attention probabilities of the last queries of a prompt of prose, per layer and KV head.

    The probabilities of every query are sorted from large to small. A record holds, for one layer, their mean over
    queries and query heads at each of the ``ranks``, and the share of the probability that the heaviest tokens hold.
    The records describe full attention and do not depend on any method (PQCache's figure 6).

    Attributes:
        contexts: prompt lengths in tokens.
        queries: number of queries at the end of the prompt that are used; with a prefill in blocks, at most those of
            the last block.
        seed: seed of the prose.

    Raises:
        ConfigError: a value that cannot work; the message names the field.
    """

    name: ClassVar[str] = "attention_scores"
    kind: ClassVar[str] = ATTENTION_SCORES
    needs_answers: ClassVar[bool] = True
    further: ClassVar[tuple[str, ...]] = (DENSE,)

    contexts: Sequence[int] = (2048,)
    queries: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        self.contexts = whole("contexts", self.contexts)
        at_least("queries", self.queries, 1)
        at_least("seed", self.seed, 0)
        if self.queries >= min(self.contexts):
            raise ConfigError(
                f"benchmark.queries is {self.queries}, all of a context of {min(self.contexts)}: lower it"
            )

    def measure(self, job: Job) -> Measured:
        """See the base class.

        Raises:
            ConfigError: a context exceeds the model's limit.
        """
        if job.loaded is None:
            raise ConfigError("benchmark=attention_scores needs a model")
        loaded = job.loaded
        if max(self.contexts) > loaded.max_length:
            raise ConfigError(
                f"benchmark.contexts has {max(self.contexts)}, but the model takes {loaded.max_length} tokens at most"
            )
        backend = kernels(loaded.model.device, job.setting.backend)
        ledger = Ledger(self, loaded.name, job, backend_name(backend))
        missing = [context for context in self.contexts if ledger.missing(DENSE, f"{context}-0")]
        prompter = Prompter(loaded.tokenizer, loaded.max_length)
        with tracked(self.name, len(missing)) as follow:
            for context in missing:
                follow(f"{context} tokens")
                self._measure_context(job, loaded, ledger, prose_tokens(prompter, context, self.seed))
        return ledger.close()

    def _measure_context(self, job: Job, loaded: LoadedModel, ledger: Ledger, tokens: Sequence[int]) -> None:
        """Record every layer on one prompt, or one failure. A context counts as measured once layer 0 has a record, so
        layer 0 is recorded last."""
        facts = {
            "budget": "all",
            "context": len(tokens),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": device_name(loaded.model.device),
        }
        setting = Setting(overlap=False, backend=job.setting.backend)
        try:
            ids = torch.tensor([tokens], device=loaded.model.device)
            with prefill(loaded.model, ids, [_Sorting(self.queries)], None, job.chunk, 1, setting) as prefilled:
                states: dict[int, Any] = {layer: prefilled.observer(0, layer, 0).state for layer in prefilled.layers}
        except Exception as error:  # noqa: BLE001 - the failure of one context becomes a row, the run goes on
            first = next(iter(profile(loaded.model).layers), 0)
            ledger.failed(DENSE, f"{len(tokens)}-0", error, facts | {"layer": first})
            job.setting.check_device(error)
            return
        for number, (layer, state) in reversed(list(enumerate(states.items()))):
            ledger.ok(DENSE, f"{len(tokens)}-{number}", facts | {"layer": layer} | state.figures)


def ranks_up_to(count: int) -> list[int]:
    """Ranks from 1 to ``count``: first 1, 2, 3, ..., then evenly spaced on a logarithmic scale, about eight per
    doubling."""
    return sorted(
        {round(2 ** (step / 4)) for step in range(4 * count.bit_length()) if round(2 ** (step / 4)) <= count} | {count}
    )


def sorted_scores(q: Tensor, keys: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Mean sorted probabilities ``[B, H, S - n + 1]``, and the mass of the heaviest :data:`SHARES` ``[B, H, shares]``.

    q ``[B, H, G, n, D]`` are the queries at the last n of S positions, keys ``[B, H, S, D]``; each query sees the keys
    up to its own position.
    """
    count, total = q.shape[3], keys.shape[2]
    most = total - count + 1  # ranks that exist for every query
    curve = torch.zeros(*q.shape[:2], most, device=q.device)
    mass = torch.zeros(*q.shape[:2], len(SHARES), device=q.device)
    for i in range(count):
        seen = most + i
        logits = torch.einsum("bhgd,bhsd->bhgs", q[:, :, :, i].float(), keys[:, :, :seen].float()) * scaling
        ordered = logits.softmax(-1).sort(-1, descending=True).values
        curve += ordered[..., :most].mean(2)
        held = ordered.cumsum(-1)
        mass += torch.stack([held[..., max(1, round(share * seen)) - 1] for share in SHARES], -1).mean(2)
    return curve / count, mass / count


@dataclass(frozen=True)
class _Sorting(Method):
    """Full attention that sorts the probabilities of the last queries of the prefill."""

    queries: int = 64

    def layer(self, geometry: Geometry) -> LayerState:
        return _SortingState(self, geometry)


class _SortingState(LayerState):
    def __init__(self, method: _Sorting, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.figures: Record = {}

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if keys.shape[2] < self.geometry.prompt:
            return
        last = q[:, :, :, -self.method.queries :]
        curve, mass = sorted_scores(last, keys, self.geometry.scaling)
        ranks = ranks_up_to(curve.shape[2])
        chosen = curve[0, :, [rank - 1 for rank in ranks]]  # one sequence
        self.figures = {
            "ranks": ranks,
            "probabilities": chosen.tolist(),
            "mass": mass[0].tolist(),
            "mass_shares": list(SHARES),
            "queries": last.shape[3],
        }
