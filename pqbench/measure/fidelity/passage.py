"""One document at one length: a prefill, a clean pass, and a decode with every method and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench.engine.dense import Dense
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.measure.base import Job, Ledger
from pqbench.measure.checks import check_alive
from pqbench.measure.fidelity.clean import CleanFigures, each_alone
from pqbench.measure.fidelity.documents import Document
from pqbench.measure.fidelity.forced import Drift, dense_logits, read_in_one_batch
from pqbench.measure.fidelity.record import clean_facts, cost_facts, drift_facts
from pqbench.measure.machine import device_name
from pqbench.method import Method
from pqbench.records.file import Record

_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True)
class Variant:
    """A method with one of the budgets of the run; ``ratio`` is None for a method without a budget."""

    name: str
    method: Method
    ratio: float | None

    @property
    def label(self) -> str:
        """Its name in messages and in the progress bar."""
        return self.name if self.ratio is None else f"{self.name}, {100 * self.ratio:g} %"


@dataclass(frozen=True)
class Passage:
    """The variants to measure on one document at one length. The prompt is shortened to ``prompt`` tokens so that the
    steps fit the model."""

    document: Document
    length: int
    prompt: int
    variants: Sequence[Variant]

    def sample_id(self, variant: Variant) -> str:
        """``<document>-<length>-<ratio>``: unique within a method's records."""
        ratio = "all" if variant.ratio is None else f"{variant.ratio:g}"
        return f"{self.document.name}-{self.length}-{ratio}"


@dataclass
class PassageRun:
    """A passage being measured.

    Attributes:
        variants_per_prefill: the largest number of variants that share a prefill; None for all of them.
        variants_per_batch: the largest number of these that decode in one batch.
    """

    passage: Passage
    job: Job
    model: PreTrainedModel
    ledger: Ledger
    steps: int
    variants_per_prefill: int | None
    variants_per_batch: int

    def measure(self) -> Iterator[Variant]:
        """Measure and record every variant. Each variant is yielded before its work begins, and the first variant
        before the prefill."""
        variants = self.passage.variants
        size = self.variants_per_prefill or len(variants)
        for start in range(0, len(variants), size):
            yield from self._batch(variants[start : start + size])

    def _batch(self, variants: Sequence[Variant]) -> Iterator[Variant]:
        """Measure the variants that share a prefill."""
        yield variants[0]
        prompt, ids = self.passage.prompt, self.passage.document.ids
        tokens = ids[prompt : prompt + self.steps]
        methods = [Dense(), *(variant.method for variant in variants)]
        context = torch.tensor([ids[:prompt]], device=self.model.device)
        with ExitStack() as opened:
            try:
                made = prefill(self.model, context, methods, None, self.job.chunk, self.steps, self.job.setting)
                prefilled = opened.enter_context(made)
                full = dense_logits(prefilled, tokens)
                clean = each_alone(prefilled, tokens, range(1, len(methods)))
            except Exception as error:  # noqa: BLE001 - any failure of one document becomes rows, the run continues
                for variant in variants:
                    self._failed(variant, error)
                self.job.setting.check_device(error)
                return
            for start in range(0, len(variants), self.variants_per_batch):
                places = range(len(variants))[start : start + self.variants_per_batch]
                yield from (variants[i] for i in places if i)
                self._read(prefilled, places, [variants[i] for i in places], [clean[i] for i in places], full)

    def _read(
        self,
        prefilled: Prefilled,
        places: Sequence[int],
        variants: Sequence[Variant],
        clean: Sequence[CleanFigures | Exception],
        full: Tensor,
    ) -> None:
        """Decode with several methods of the prompt, and record the figures or the failure of each."""
        prompt, ids = self.passage.prompt, self.passage.document.ids
        tokens, targets = ids[prompt : prompt + self.steps], ids[prompt + 1 : prompt + self.steps + 1]
        drifts = [Drift(full, targets) for _ in variants]
        # Method 0 of the prompt is full attention.
        outcomes = read_in_one_batch(prefilled, [i + 1 for i in places], tokens, [drift.add for drift in drifts])
        for variant, figures, drift, generation in zip(variants, clean, drifts, outcomes, strict=True):
            try:
                facts = clean_facts(_sound(figures))
                check_alive(variant.method, _sound(generation), prompt)
                facts |= drift_facts(drift) | cost_facts(_sound(generation), prompt)
            except Exception as error:  # noqa: BLE001 - the other variants of this prefill still count
                self._failed(variant, error)
                self.job.setting.check_device(error)
            else:
                self.ledger.ok(variant.name, self.passage.sample_id(variant), self._facts(variant) | facts)

    def _failed(self, variant: Variant, error: Exception) -> None:
        self.ledger.failed(variant.name, self.passage.sample_id(variant), error, self._facts(variant))

    def _facts(self, variant: Variant) -> Record:
        """The fields of a record that are known before the measurement, so that failures have them too."""
        return {
            "document": self.passage.document.name,
            "length": self.passage.length,
            "prompt_tokens": self.passage.prompt,
            "steps": self.steps,
            "ratio": variant.ratio,
            "budget": variant.method.budget_label,
            "beyond_budget": variant.method.beyond_budget,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": device_name(self.model.device),
        }


def _sound(outcome: _Outcome | Exception) -> _Outcome:
    """The outcome of a measurement. Raises the outcome if it is an error."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
