"""One document at one length: a prefill, a clean pass, and a decode with every method and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench.engine.prefill import Prefilled, prefill
from pqbench.measure.base import Ledger, TimingJob
from pqbench.measure.fidelity.clean import CleanFigures, each_alone
from pqbench.measure.fidelity.documents import Document
from pqbench.measure.fidelity.forced import Dense, Drift, dense_logits, read_abreast
from pqbench.measure.fidelity.record import clean_facts, cost_facts, drift_facts
from pqbench.measure.machine import device_name
from pqbench.measure.scored import check_alive
from pqbench.method import Method
from pqbench.records.file import Record

_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True)
class Variant:
    """A method with one of the budgets; ``ratio`` is None for a method that has none."""

    name: str
    method: Method
    ratio: float | None

    @property
    def label(self) -> str:
        """For messages and the progress bar."""
        return self.name if self.ratio is None else f"{self.name}, {100 * self.ratio:g} %"


@dataclass(frozen=True)
class Cell:
    """Variants to measure on one document at one length; ``prompt`` tokens of it leave room for the steps."""

    document: Document
    length: int
    prompt: int
    variants: Sequence[Variant]

    def sample_id(self, variant: Variant) -> str:
        """``<document>-<length>-<ratio>``: unique within a method's records."""
        ratio = "all" if variant.ratio is None else f"{variant.ratio:g}"
        return f"{self.document.name}-{self.length}-{ratio}"


@dataclass
class CellRun:
    """A cell being measured. ``together`` variants at most share a prefill, all of them where it is None; ``abreast``
    of those at most decode in one batch."""

    cell: Cell
    job: TimingJob
    model: PreTrainedModel
    ledger: Ledger
    steps: int
    together: int | None
    abreast: int

    def measure(self) -> Iterator[Variant]:
        """Measure and record every variant. Each is announced before its work begins, the first before the prefill."""
        variants = self.cell.variants
        size = self.together or len(variants)
        for start in range(0, len(variants), size):
            yield from self._batch(variants[start : start + size])

    def _batch(self, variants: Sequence[Variant]) -> Iterator[Variant]:
        """Variants that share a prefill."""
        yield variants[0]
        prompt, ids = self.cell.prompt, self.cell.document.ids
        tokens = ids[prompt : prompt + self.steps]
        methods = [Dense(), *(variant.method for variant in variants)]
        context = torch.tensor([ids[:prompt]], device=self.model.device)
        try:
            prefilled = prefill(self.model, context, methods, None, self.job.chunk, self.steps, self.job.setting)
            full = dense_logits(prefilled, tokens)
            clean = each_alone(prefilled, tokens, range(1, len(methods)))
        except Exception as error:  # noqa: BLE001 - any failure of one document becomes rows, the run goes on
            for variant in variants:
                self._failed(variant, error)
            self.job.setting.check_device(error)
            return
        for start in range(0, len(variants), self.abreast):
            places = range(len(variants))[start : start + self.abreast]
            yield from (variants[i] for i in places if i)
            self._read(prefilled, places, [variants[i] for i in places], [clean[i] for i in places], full)
        prefilled.close()

    def _read(
        self,
        prefilled: Prefilled,
        places: Sequence[int],
        variants: Sequence[Variant],
        clean: Sequence[CleanFigures | Exception],
        full: Tensor,
    ) -> None:
        """Decode with several methods of the prompt, and record that with their clean figures, or what went wrong."""
        prompt, ids = self.cell.prompt, self.cell.document.ids
        tokens, targets = ids[prompt : prompt + self.steps], ids[prompt + 1 : prompt + self.steps + 1]
        drifts = [Drift(full, targets) for _ in variants]
        # Method 0 of the prompt is full attention.
        outcomes = read_abreast(prefilled, [i + 1 for i in places], tokens, [drift.add for drift in drifts])
        for variant, figures, drift, generation in zip(variants, clean, drifts, outcomes, strict=True):
            try:
                facts = clean_facts(_sound(figures))
                check_alive(variant.method, _sound(generation), prompt)
                facts |= drift_facts(drift) | cost_facts(_sound(generation), prompt)
            except Exception as error:  # noqa: BLE001 - the other variants of this prefill still count
                self._failed(variant, error)
                self.job.setting.check_device(error)
            else:
                self.ledger.ok(variant.name, self.cell.sample_id(variant), self._facts(variant) | facts)

    def _failed(self, variant: Variant, error: Exception) -> None:
        self.ledger.failed(variant.name, self.cell.sample_id(variant), error, self._facts(variant))

    def _facts(self, variant: Variant) -> Record:
        """What was measured, whatever came of it."""
        return {
            "document": self.cell.document.name,
            "length": self.cell.length,
            "prompt_tokens": self.cell.prompt,
            "steps": self.steps,
            "ratio": variant.ratio,
            "budget": variant.method.budget_label,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": device_name(self.model.device),
        }


def _sound(outcome: _Outcome | Exception) -> _Outcome:
    """What was measured; raises what went wrong instead."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
