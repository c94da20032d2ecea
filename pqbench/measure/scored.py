"""The scores of a benchmark: each sample is prefilled once, and every method that lacks a record decodes from this
prefill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.engine.decode import Generation, decode
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.measure.base import COMPILING, Job, Ledger, Measured, Measurement, tracked
from pqbench.measure.checks import attended_all, check_alive, check_budgets, check_methods
from pqbench.measure.dense import backend_name
from pqbench.measure.probe import probe
from pqbench.models.sources import LoadedModel
from pqbench.records.claims import tell_of_waiting
from pqbench.records.file import Record
from pqbench.records.kinds import SCORES

TAIL = 200  # number of tokens at the end of a prompt that a record shows
WAIT_S = 0.5  # seconds between two looks at the samples that other processes are measuring
COMPILED_S = 5  # seconds of compiling from which on they are reported; below, the kernels came from the cache


@dataclass
class Scored(Measurement):
    """Answers the samples of a benchmark with every method and scores the answers.

    Methods with a dense prefill share one prefill of each sample. Methods with a prefill of their own run it for
    themselves.

    Attributes:
        benchmark: yields the samples and scores the predictions.
        question: ``dense`` prefills the question together with the context; with ``select`` the method reads it token
            by token.
        probe_tokens: number of tokens of the reference answer over which fidelity is measured; 0 for no measurement.
        chat: whether prompts are put into the tokenizer's chat template, if it has one.
        chat_options: variables that the chat template understands.
    """

    kind: ClassVar[str] = SCORES
    needs_answers: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    benchmark: Benchmark
    question: str = "dense"
    probe_tokens: int = 8
    chat: bool = True
    chat_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.benchmark.name

    def prompter(self, loaded: LoadedModel) -> Prompter:
        """The object that makes prompts for a model."""
        return Prompter(loaded.tokenizer, loaded.max_length, self.chat, self.chat_options)

    def measure(self, job: Job) -> Measured:
        """See the base class.

        Raises:
            ConfigError: a budget does not fit the samples, or a method does not fit the model. In this case nothing was
                run.
        """
        if job.loaded is None:
            raise ConfigError(f"benchmark={self.name} needs a model")
        loaded, prompter = job.loaded, self.prompter(job.loaded)
        samples = list(self.benchmark.samples(prompter))
        check_budgets(job.methods, samples)
        check_methods(job.methods, loaded.model, job.setting)
        backend = kernels(loaded.model.device, job.setting.backend)
        ledger = Ledger(self, loaded.name, job, backend_name(backend))
        wanted = [(sample, [name for name in job.methods if ledger.missing(name, sample.id)]) for sample in samples]
        work = [(sample, names) for sample, names in wanted if names]
        if work:
            ledger.done.seconds[COMPILING] = backend.warm_up()
        with tracked(self.name, len(work)) as follow:
            told: set[str] = set()
            while work:
                busy: list[tuple[Sample, list[str]]] = []
                for sample, names in work:
                    with ledger.claim(sample.id, names) as (mine, others):
                        if mine:
                            follow(f"{sample.id} ({len(sample.input_ids)} tokens)")
                            SampleRun(self, job, loaded, prompter, ledger, sample).measure(mine)
                    busy += [(sample, others)] if others else []
                if len(busy) == len(work):  # other processes are measuring all that is left
                    tell_of_waiting([sample.id for sample, _ in busy], told)
                    time.sleep(WAIT_S)
                work = busy
        return ledger.close()

    def footer(self, done: Measured, results: str) -> str:
        """The text below the table: records, seconds of the run and its parts, and how the figures were measured."""
        lines, spent = [f"{done.counts}; records in {results}/"], done.seconds
        if spent[COMPILING] > COMPILED_S:
            lines.append(f"kernels were compiled first, in {spent[COMPILING]:.0f} s that no figure includes")
        if done.measured:
            own = spent["prefill"] + spent["decode"] + spent["index"]
            lines.append(
                f"wall {done.wall_s:.1f} s = {done.wall_s / own:.2f} x (shared prefills {spent['prefill']:.1f} s + "
                f"decodes {spent['decode']:.1f} s + the methods' own indices {spent['index']:.1f} s); "
                f"fidelity probes {spent['probe']:.1f} s"
            )
        lines.append(
            f"{torch.get_num_threads()} threads; one prefill serves all methods, so TTFT is that prefill plus the "
            "time in which the method observes it; mass, recall and error: teacher-forced on the reference answer, "
            "clean inputs"
        )
        return "\n".join(lines)


@dataclass
class Answer:
    """The outcome of one method on one sample: the fields of its record, or the error."""

    name: str
    facts: Record = field(default_factory=dict)
    error: Exception | None = None


@dataclass
class SampleRun:
    """The measurement of one sample with the methods that lack a record of it."""

    scored: Scored
    job: Job
    loaded: LoadedModel
    prompter: Prompter
    ledger: Ledger
    sample: Sample

    def measure(self, names: Sequence[str]) -> None:
        """Measure the sample with the methods ``names`` and record every outcome.

        Raises:
            DataError: a record cannot be written.
            DeviceError: the accelerator no longer answers after a failure. The failure has been recorded; methods that
                could not be measured any more have no record.
        """
        answers: list[Answer] = []
        for sharing in self._prefills(names):
            try:
                answers += self._evaluate(sharing)
            except Exception as error:  # noqa: BLE001 - any failure of one sample becomes a row, the run continues
                answers += [Answer(name, error=error) for name in sharing]
            if answers[-1].error is not None and not self.job.setting.device_answers():
                break
        for answer in answers:
            facts = self._facts(answer.name)
            if answer.error is None:
                self.ledger.ok(answer.name, self.sample.id, facts | answer.facts)
            else:
                self.ledger.failed(answer.name, self.sample.id, answer.error, facts)
        if answers[-1].error is not None:
            self.job.setting.check_device(self.ledger.done.failures[-1])

    def _prefills(self, names: Sequence[str]) -> list[list[str]]:
        """The groups of methods that share a prefill. All methods with a dense prefill form one group; each of the
        others forms a group of its own."""
        dense = [name for name in names if not self.job.methods[name].own_prefill]
        return [*([dense] if dense else []), *([name] for name in names if name not in dense)]

    def _evaluate(self, names: Sequence[str]) -> list[Answer]:
        """The answers of the methods ``names`` from one prefill. If the device stops answering, the list ends with the
        method at fault."""
        sample, job, seconds = self.sample, self.job, self.ledger.done.seconds
        model, methods = self.loaded.model, [job.methods[name] for name in names]
        ids = torch.tensor([sample.input_ids], device=model.device)  # [1, S]
        held_back = sample.question_tokens if self.scored.question == "select" else 0
        prompt = ids.shape[1] - held_back
        question = ids[0, prompt:].tolist()
        reserve = sample.max_new_tokens + held_back + self.scored.probe_tokens
        with prefill(model, ids[:, :prompt], methods, None, job.chunk, reserve, job.setting) as prefilled:
            seconds["prefill"] += prefilled.seconds
            return self._decoded(prefilled, names, question)

    def _decoded(self, prefilled: Prefilled, names: Sequence[str], question: Sequence[int]) -> list[Answer]:
        """The answers of the methods ``names`` of a prefilled prompt, see :meth:`_evaluate`."""
        sample, seconds = self.sample, self.ledger.done.seconds
        answers = []
        for i, name in enumerate(names):
            began = time.perf_counter()
            try:
                generation = decode(
                    prefilled,
                    i,
                    sample.max_new_tokens,
                    sample.min_new_tokens,
                    question=question,
                    extra_ends=sample.end_tokens,
                )
                generation.settle()
                check_alive(prefilled.methods[i], generation, len(sample.input_ids) - len(question))
                answers.append(Answer(name, self._success(name, generation)))
            except Exception as error:  # noqa: BLE001 - the other methods of this prefill still count
                answers.append(Answer(name, error=error))
                if not self.job.setting.device_answers():
                    return answers
            index = answers[-1].facts.get("index_build_s", 0.0)
            seconds["decode"] += time.perf_counter() - began - (index - prefilled.observe_seconds[i])
            seconds["index"] += index
        self._add_fidelity(prefilled, answers)
        return answers

    def _add_fidelity(self, prefilled: Prefilled, answers: list[Answer]) -> None:
        """Measure fidelity over the reference answer, for the methods that succeeded.

        A method with a prefill of its own is not measured: it computed other keys and values, so there is no full
        attention to compare with. With selection ahead nothing is measured, because the probe has no previous step
        whose query could be used.
        """
        references, prompter = self.sample.references, self.prompter
        tokens = prompter.encode(f" {references[0]}")[: self.scored.probe_tokens] if references else []
        good = [i for i, answer in enumerate(answers) if answer.error is None and not prefilled.methods[i].own_prefill]
        if not tokens or not good or self.job.setting.select_ahead:
            return
        began = time.perf_counter()
        try:
            for i, fidelity in zip(good, probe(prefilled, tokens, good), strict=True):
                answers[i].facts |= fidelity.means()
        except Exception:  # noqa: BLE001 - one method's error must not affect others: each is probed alone
            for i in good:
                try:
                    answers[i].facts |= probe(prefilled, tokens, [i])[0].means()
                except Exception as error:  # noqa: BLE001 - the method at fault
                    answers[i].error = error
        self.ledger.done.seconds["probe"] += time.perf_counter() - began

    def _success(self, name: str, generation: Generation) -> Record:
        """The fields of a record that describe one generation, and its scores."""
        facts = {
            "prompt_tokens": len(self.sample.input_ids),
            "prediction": self.prompter.decode(generation.tokens[0].tolist()),
            **generation_facts(generation),
        }
        scores = self.scored.benchmark.score({**self._facts(name), "status": "ok", **facts})
        return facts | {"score": scores["score"], "scores": scores}

    def _facts(self, name: str) -> Record:
        """The fields of a record that describe the sample, whatever the outcome."""
        sample = self.sample
        dense = [known for known, method in self.job.methods.items() if not method.own_prefill]
        return {
            "task": sample.task,
            "budget": self.job.methods[name].budget_label,
            "beyond_budget": self.job.methods[name].beyond_budget,
            "question": self.scored.question,
            "shared_prefill": name in dense and len(dense) > 1,
            "references": sample.references,
            "metadata": sample.metadata,
            "prompt_tail": self.prompter.decode(sample.input_ids[-TAIL:]),
            "prompt_sha256": hashlib.sha256(",".join(map(str, sample.input_ids)).encode()).hexdigest(),
        }


def generation_facts(generation: Generation) -> Record:
    """Tokens, times in seconds, and bytes of one generation. Bytes of the index and bytes over the link are given per
    step."""
    meters, cohorts = generation.meters(), generation.cohorts()
    steps = max(1, sum(meter.steps for meter in meters))
    layers = len(generation.cache.selective)
    hits = sum(cohort.store.usage.cache_hits for cohort in cohorts)
    lookups = sum(cohort.store.usage.cache_lookups for cohort in cohorts)
    return {
        "new_tokens": generation.tokens.shape[1],
        "ttft_s": generation.ttft_s,
        "tt2t_s": generation.tt2t_s,
        "tpot_s": generation.tpot_s,
        "index_build_s": generation.index_s,
        "attended_tokens": sum(meter.attended for meter in meters) / steps,
        "skipped_nothing": attended_all(cohorts),
        "kv_tokens": sum(cohort.store.length for cohort in cohorts) / len(cohorts),
        "index_bytes": sum(meter.index_bytes for meter in meters) * layers // steps,
        "index_resident_bytes": sum(cohort.state.resident_bytes for cohort in cohorts),
        "index_facts": cohorts[0].state.facts if cohorts else {},
        "corrected_heads": generation.corrected_heads,
        "link_bytes": sum(cohort.store.usage.link_bytes for cohort in cohorts) * layers // steps,
        "cache_hit_rate": hits / lookups if lookups else None,
        "device_bytes": sum(cohort.store.usage.device_bytes for cohort in cohorts),
        "host_bytes": sum(cohort.store.usage.host_bytes for cohort in cohorts),
    }
