"""The main job: for each sample prefill once, decode with every method that lacks it, append a record each."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.engine.cohort import Rows
from pqbench.engine.decode import Generation, decode
from pqbench.engine.prefill import Prefilled, Setting, frequencies, geometry, prefill
from pqbench.engine.rehearsal import profile
from pqbench.errors import BudgetError, ConfigError, LivenessError, ModelError
from pqbench.kernels.backend import kernels
from pqbench.measure.probe import probe
from pqbench.method import Method
from pqbench.models.devices import check_kernels
from pqbench.models.sources import LoadedModel
from pqbench.records.file import VERSION, Record, RecordFile
from pqbench.terminal import plain

log = logging.getLogger(__name__)

TAIL = 200  # tokens of a prompt's end that a record shows


@dataclass
class Job:
    """One benchmark on one model with several methods, and where their records go.

    Attributes:
        methods: by the name that results use.
        files: the record file of each method.
        chunk: prefill block in tokens, None for one shot.
        setting: where KV lives, which kernels compute and what overlaps.
        question: ``dense`` prefills it with the context, ``select`` sends it through the method token by token.
        probe_tokens: tokens of the reference answer over which fidelity is measured; 0 measures none.
        retry_failed: run samples again whose record is an error.
    """

    benchmark: Benchmark
    loaded: LoadedModel
    prompter: Prompter
    methods: Mapping[str, Method]
    files: Mapping[str, RecordFile]
    chunk: int | None = None
    question: str = "dense"
    probe_tokens: int = 8
    retry_failed: bool = False
    setting: Setting = field(default_factory=Setting)

    @property
    def dense(self) -> list[str]:
        """The methods that share a dense prefill."""
        return [name for name, method in self.methods.items() if not method.own_prefill]


@dataclass
class Summary:
    """What a run did. Seconds: of everything but compiling, of compiling kernels, of shared prefills, of the methods'
    decodes and indices, of probing."""

    measured: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    index_s: float = 0.0
    probe_s: float = 0.0


def run(job: Job) -> Summary:
    """Run every sample that lacks a record.

    Errors of one sample become records and the run goes on. Raises ConfigError before anything runs when a budget
    cannot fit the samples or a method not the model, and DeviceError when a GPU answers no more after the error of a
    sample, which is on record then; KeyboardInterrupt passes through, with what was measured kept.
    """
    summary = Summary()
    samples = list(job.benchmark.samples(job.prompter))
    check_budgets(job.methods, samples)
    check_methods(job.methods, job.loaded.model, job.setting)
    for file in job.files.values():
        file.planned = len({sample.id for sample in samples})
    errors = {name: file.outcomes() for name, file in job.files.items()}  # None: has a prediction
    done = {
        name: {i for i, error in known.items() if not (error and job.retry_failed)} for name, known in errors.items()
    }
    if any(sample.id not in done[name] for sample in samples for name in job.methods):
        summary.compile_s = kernels(job.loaded.model.device, job.setting.body).warm_up()
    began = time.perf_counter()
    what = TextColumn("{task.description}", markup=False)  # ids come from data files
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(job.benchmark.name, total=len(samples))
        for sample in samples:
            missing = [name for name in job.methods if sample.id not in done[name]]
            summary.resumed += len(job.methods) - len(missing)
            summary.failures += [
                f"{name} on {sample.id} failed before (retry_failed=true runs it again): {errors[name][sample.id]}"
                for name in job.methods
                if name not in missing and errors[name][sample.id]
            ]
            if missing:
                label = f"{job.benchmark.name} {sample.id} ({len(sample.input_ids)} tokens)"
                progress.update(bar, description=plain(label))
                _run_sample(job, sample, missing, summary)
            progress.advance(bar)
    summary.wall_s = time.perf_counter() - began
    return summary


def _run_sample(job: Job, sample: Sample, names: Sequence[str], summary: Summary) -> None:
    records: list[Record] = []
    for sharing in prefills(job, names):
        try:
            records += evaluate(job, sample, sharing, summary)
        except Exception as error:  # noqa: BLE001 - any failure of one sample becomes a row, the run goes on
            records += [failure(job, sample, name, error) for name in sharing]
        if records[-1]["status"] != "ok" and not job.setting.device_answers():
            break
    for record in records:
        job.files[record["method"]].append(record)
        if record["status"] == "ok":
            summary.measured += 1
        else:
            summary.failures.append(f"{record['method']} on {sample.id}: {record['error']}")
    if records[-1]["status"] != "ok":
        job.setting.check_device(summary.failures[-1])


def prefills(job: Job, names: Sequence[str]) -> list[list[str]]:
    """Which methods share a prefill: all that take a dense one; each of the others has its own."""
    dense = [name for name in names if name in job.dense]
    return [*([dense] if dense else []), *([name] for name in names if name not in dense)]


def evaluate(job: Job, sample: Sample, names: Sequence[str], summary: Summary) -> list[Record]:
    """Records of one sample, one per method, from one prefill."""
    model = job.loaded.model
    ids = torch.tensor([sample.input_ids], device=model.device)  # [1, S]
    held_back = sample.question_tokens if job.question == "select" else 0
    context, question = ids[:, : ids.shape[1] - held_back], ids[0, ids.shape[1] - held_back :].tolist()
    methods = [job.methods[name] for name in names]
    reserve = sample.max_new_tokens + held_back + job.probe_tokens
    prefilled = prefill(model, context, methods, None, job.chunk, reserve, job.setting)
    summary.prefill_s += prefilled.seconds
    records = []
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
            check_alive(methods[i], generation, context.shape[1])
            records.append(success(job, sample, name, generation))
        except Exception as error:  # noqa: BLE001 - the other methods of this prefill still count
            records.append(failure(job, sample, name, error))
            if not job.setting.device_answers():
                return records  # of those before, and of the one at fault; what follows could not be measured
        index = 0.0 if records[-1]["status"] != "ok" else records[-1]["index_build_s"]
        summary.decode_s += time.perf_counter() - began - (index - prefilled.observe_seconds[i])
        summary.index_s += index
    add_fidelity(job, sample, prefilled, records, summary)
    prefilled.close()
    return records


def add_fidelity(job: Job, sample: Sample, prefilled: Prefilled, records: list[Record], summary: Summary) -> None:
    """Measure fidelity over the reference answer and put it into the records of the methods that succeeded. Where a
    method made keys and values by a prefill of its own there is no full attention to compare with; and a probe knows
    no step before, with whose query it could select ahead."""
    answer = job.prompter.encode(f" {sample.references[0]}")[: job.probe_tokens] if sample.references else []
    good = [i for i, record in enumerate(records) if record["status"] == "ok" and not prefilled.methods[i].own_prefill]
    if not answer or not good or job.setting.select_ahead:
        return
    began = time.perf_counter()
    try:
        for i, fidelity in zip(good, probe(prefilled, answer, good), strict=True):
            records[i].update(fidelity.means())
    except Exception:  # noqa: BLE001 - one method's fault must not be another's: each by itself
        for i in good:
            try:
                records[i].update(probe(prefilled, answer, [i])[0].means())
            except Exception as error:  # noqa: BLE001 - as above
                records[i] = failure(job, sample, records[i]["method"], error)
    summary.probe_s += time.perf_counter() - began


def success(job: Job, sample: Sample, name: str, generation: Generation) -> Record:
    """The record of one generation, scored."""
    prediction = job.prompter.decode(generation.tokens[0].tolist())
    meters, groups = generation.meters(), generation.groups()
    steps = max(1, sum(meter.steps for meter in meters))
    layers = len(generation.cache.selective)
    hits, lookups = sum(g.store.usage.cache_hits for g in groups), sum(g.store.usage.cache_lookups for g in groups)
    record = _common(job, sample, name) | {
        "status": "ok",
        "prompt_tokens": len(sample.input_ids),
        "new_tokens": generation.tokens.shape[1],
        "prediction": prediction,
        "ttft_s": generation.ttft_s,
        "tt2t_s": generation.tt2t_s,
        "tpot_s": generation.tpot_s,
        "index_build_s": generation.index_s,
        "attended_tokens": sum(meter.attended for meter in meters) / steps,
        "kv_tokens": sum(group.store.length for group in groups) / len(groups),
        "index_bytes": sum(meter.index_bytes for meter in meters) * layers // steps,
        "index_resident_bytes": sum(group.state.resident_bytes for group in groups),
        "index_facts": groups[0].state.facts if groups else {},
        "corrected_heads": generation.corrected_heads,
        "link_bytes": sum(group.store.usage.link_bytes for group in groups) * layers // steps,
        "cache_hit_rate": hits / lookups if lookups else None,
        "device_bytes": sum(group.store.usage.device_bytes for group in groups),
        "host_bytes": sum(group.store.usage.host_bytes for group in groups),
    }
    scores = job.benchmark.score(record)
    return record | {"score": scores["score"], "scores": scores}


def failure(job: Job, sample: Sample, name: str, error: Exception) -> Record:
    """The record of a sample that gave no prediction that counts."""
    log.debug("%s failed on %s", name, sample.id, exc_info=error)
    status = "oom" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "error"
    message = " ".join(str(error).split())[:500] or type(error).__name__
    return _common(job, sample, name) | {"status": status, "error": f"{type(error).__name__}: {message}"}


def _common(job: Job, sample: Sample, name: str) -> Record:
    return {
        "version": VERSION,
        "benchmark": job.benchmark.name,
        "model": job.loaded.name,
        "task": sample.task,
        "sample_id": sample.id,
        "method": name,
        "key": job.files[name].folder.name.rsplit("-", 1)[-1],
        "budget": job.methods[name].budget_label,
        "question": job.question,
        "shared_prefill": name in job.dense and len(job.dense) > 1,
        "references": sample.references,
        "metadata": sample.metadata,
        "prompt_tail": job.prompter.decode(sample.input_ids[-TAIL:]),
        "prompt_sha256": hashlib.sha256(",".join(map(str, sample.input_ids)).encode()).hexdigest(),
    }


def check_budgets(methods: Mapping[str, Method], samples: Sequence[Sample]) -> None:
    """Raises BudgetError when a method's budget cannot be met on some sample, or exceeds every context."""
    lengths = sorted({len(sample.input_ids) for sample in samples})
    longest = max((len(s.input_ids) + s.max_new_tokens for s in samples), default=0)
    for name, method in methods.items():
        tokens = None if method.budget is None else method.budget.tokens
        if lengths and tokens is not None and tokens > longest:
            raise BudgetError(
                f"{name}: budget.tokens is {tokens}, above the longest context of this run ({longest}): "
                "lower it, or use budget.tokens=null budget.ratio=1 to attend to everything"
            )
        for length in lengths:
            try:
                method.split(length, length)
            except BudgetError as error:
                raise BudgetError(f"{name}: {error}") from error


def check_methods(methods: Mapping[str, Method], model: PreTrainedModel, setting: Setting) -> None:
    """Raises ConfigError or ModelError when a method cannot work on this model, whatever the sample."""
    check_kernels(setting.body, model.device)
    setting.check(methods, model)
    if setting.tier.offloads and (evicting := [name for name, method in methods.items() if method.evicts]):
        log.info("store=host, methods that evict (%s): the rows they keep lie on the device", ", ".join(evicting))
    for (name, method), layer in product(methods.items(), profile(model).kinds):
        try:
            rotary = frequencies(model, [method]).get(layer)
            method.layer(geometry(model, layer, Rows(slice(None), 0, 1), 1024, rotary, setting))
        except (ConfigError, ModelError) as error:
            raise type(error)(f"{name}: {error}") from error


def check_alive(method: Method, generation: Generation, prompt: int) -> None:
    """Raises LivenessError when a method attended to every token in every step although its budget said fewer."""
    meters = generation.meters()
    steps = sum(meter.steps for meter in meters)
    split = method.split(prompt + 1, prompt)
    if not steps or split is None or split.total >= prompt or method.attends_all(prompt):
        return
    attended = sum(meter.attended for meter in meters) / steps
    if attended >= prompt:
        raise LivenessError(
            f"attended to {attended:.0f} tokens of a context of {prompt} with a budget of {split.total}: "
            "the method is not active"
        )
