"""One document at one length: a prefill, a clean pass, and a decode with every method and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pqbench.fidelity.clean import CleanFigures, each_alone
from pqbench.fidelity.documents import Document
from pqbench.fidelity.forced import Dense, Drift, dense_logits, read
from pqbench.fidelity.record import clean_facts, cost_facts, drift_facts
from pqbench.method import Method
from pqbench.prompt import Prefilled, prefill
from pqbench.records import Record
from pqbench.run import check_alive
from pqbench.timing.base import Ledger, TimingJob
from pqbench.timing.machine import device_name


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
    """A cell being measured. ``together`` variants at most share a prefill, all of them where it is None."""

    cell: Cell
    job: TimingJob
    model: PreTrainedModel
    ledger: Ledger
    steps: int
    together: int | None

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
        tokens, targets = ids[prompt : prompt + self.steps], ids[prompt + 1 : prompt + self.steps + 1]
        methods = [Dense(), *(variant.method for variant in variants)]
        context = torch.tensor([ids[:prompt]], device=self.model.device)
        try:
            prefilled = prefill(self.model, context, methods, None, self.job.chunk, self.steps, self.job.setting)
            full = dense_logits(prefilled, tokens)
            clean = each_alone(prefilled, tokens, range(1, len(methods)))
        except Exception as error:  # noqa: BLE001 - any failure of one document becomes rows, the run goes on
            for variant in variants:
                self._failed(variant, error)
            return
        for i, (variant, figures) in enumerate(zip(variants, clean, strict=True)):
            if i:
                yield variant
            self._record(prefilled, i + 1, variant, figures, Drift(full, targets), tokens)
        prefilled.close()

    def _record(
        self, prefilled: Prefilled, index: int, variant: Variant, figures: CleanFigures | Exception, drift: Drift,
        tokens: Sequence[int],
    ) -> None:  # fmt: skip
        """Decode with method ``index`` of the prompt; record that with its clean figures, or what went wrong."""
        try:
            if isinstance(figures, Exception):
                raise figures
            generation = read(prefilled, index, tokens, drift.add)
            check_alive(variant.method, generation, self.cell.prompt)
            facts = clean_facts(figures) | drift_facts(drift) | cost_facts(generation, self.cell.prompt)
        except Exception as error:  # noqa: BLE001 - the other variants of this prefill still count
            self._failed(variant, error)
        else:
            self.ledger.ok(variant.name, self.cell.sample_id(variant), self._facts(variant) | facts)

    def _failed(self, variant: Variant, error: Exception) -> None:
        self.ledger.failed(variant.name, self.cell.sample_id(variant), error, self._facts(variant))

    def _facts(self, variant: Variant) -> Record:
        """What was measured, whatever came of it."""
        budget: Any = getattr(variant.method, "budget", None)
        return {
            "document": self.cell.document.name, "length": self.cell.length, "prompt_tokens": self.cell.prompt,
            "steps": self.steps, "ratio": variant.ratio, "budget": "all" if budget is None else budget.label,
            "dtype": str(self.model.dtype).removeprefix("torch."), "device": device_name(self.model.device),
        }  # fmt: skip
