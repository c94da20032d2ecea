"""``benchmark=latency``: time to first token, time to second token and time per output token of a whole model, and
where the time goes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.grid import whole
from pqbench.engine.decode import Generation, decode
from pqbench.engine.meter import PHASES
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.measure.base import Job, Ledger, Measured, Measurement, at_least, outcome, tracked
from pqbench.measure.checks import attended_all, check_alive, check_methods, check_split
from pqbench.measure.dense import backend_name
from pqbench.measure.machine import (
    Bandwidth,
    bandwidth,
    device_name,
    forget_peak,
    peak_device,
    peak_rss,
    spread,
    undisturbed,
)
from pqbench.measure.profile import TOKENS, phases, profile_facts, profiled, read_trace
from pqbench.measure.source import timing_tokens
from pqbench.method import Method
from pqbench.records.file import Record
from pqbench.records.kinds import LATENCY

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One measurement of a method on a prompt. The prompt is shortened to ``prompt`` tokens so that the answer fits the
    model."""

    repeat: int
    context: int
    prompt: int
    method: str

    @property
    def sample_id(self) -> str:
        """The id of its record, unique within a method's records."""
        return f"{self.context}-{self.repeat}"


@dataclass
class Latency(Measurement):
    """Greedy decoding of prose by one method at a time, each with a prefill of its own. If the package with the prose
    is missing, made-up words are used. Records name the text.

    Attributes:
        contexts: prompt lengths in tokens. Where prompt and answer together exceed the model's limit, the prompt is
            shortened to leave room for the answer. Records hold both lengths.
        new_tokens: number of tokens generated, also beyond the model's end token; at least 3.
        repeats: number of rounds; each round goes through all contexts and methods.
        warmup: number of runs of every method on the shortest prompt before the first round. Kernels are compiled in
            these runs.
        profile: run every method once more on every prompt under torch's profiler, which slows it, and record launches,
            synchronisations and times by phase. The trace is written to the folder of the records and can be opened in
            Perfetto.
        seed: seed of the prose.

    Raises:
        ConfigError: a value that cannot work; the message names the field.
    """

    name: ClassVar[str] = "latency"
    kind: ClassVar[str] = LATENCY

    contexts: Sequence[int] = (1024, 2048, 4096, 8192)
    new_tokens: int = 32
    repeats: int = 3
    warmup: int = 1
    profile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.contexts = whole("contexts", self.contexts)
        for field, least in (("new_tokens", 3), ("repeats", 1), ("warmup", 0), ("seed", 0)):
            at_least(field, getattr(self, field), least)
        if type(self.profile) is not bool:
            raise ConfigError(f"benchmark.profile is {self.profile!r}: use true or false")

    def measure(self, job: Job) -> Measured:
        """See the base class.

        Raises:
            ConfigError: a context exceeds the model's limit, or a method or budget does not fit the model.
        """
        if job.loaded is None:
            raise ConfigError("benchmark=latency needs a model")
        loaded, backend = job.loaded, kernels(job.loaded.model.device, job.setting.backend)
        backend.use_threads(torch.get_num_threads())
        ledger = Ledger(self, loaded.name, job, backend_name(backend))
        turns = self._turns(job.methods, loaded.max_length)
        self._check(job, loaded.model, turns)
        missing = [turn for turn in turns if ledger.missing(turn.method, turn.sample_id)]
        if not missing:
            return ledger.close()
        prompter = Prompter(loaded.tokenizer, loaded.max_length)
        longest, text = timing_tokens(prompter, max(turn.prompt for turn in missing), self.seed)
        roof = bandwidth(loaded.model.device)
        shortest = longest[: min(turn.prompt for turn in turns)]
        with tracked(self.name, len(missing)) as follow:
            follow("warm-up")
            warm = {name: self._warm(job, loaded.model, name, shortest) for name in {c.method: 0 for c in missing}}
            for i, turn in enumerate(missing):
                if i:
                    follow(f"{turn.prompt} tokens, {turn.method}, round {turn.repeat + 1} of {self.repeats}")
                self._record(job, ledger, turn, longest[: turn.prompt], roof, warm[turn.method], text)
        return ledger.close()

    def _turns(self, methods: Mapping[str, Method], max_length: int) -> list[Turn]:
        """Everything to measure, in order of measurement. Methods take turns."""
        longest = max_length - self.new_tokens
        if max(self.contexts) > max_length or longest < 1:
            raise ConfigError(
                f"benchmark.contexts has {max(self.contexts)} and benchmark.new_tokens is "
                f"{self.new_tokens}, but the model takes {max_length} tokens at most"
            )
        return [
            Turn(repeat, context, min(context, longest), name)
            for repeat in range(self.repeats)
            for context in self.contexts
            for name in methods
        ]

    def _check(self, job: Job, model: PreTrainedModel, turns: Sequence[Turn]) -> None:
        check_methods(job.methods, model, job.setting)
        for turn in turns:
            check_split(turn.method, job.methods[turn.method], turn.prompt)

    def _warm(self, job: Job, model: PreTrainedModel, name: str, prompt: list[int]) -> float:
        """Do the warm-up runs and return their seconds. A failure is ignored here, because it happens again later and
        is then recorded."""
        total = 0.0
        for _ in range(self.warmup):
            try:
                generation = run_once(job, model, job.methods[name], prompt, self.new_tokens)[0]
                total += generation.tt2t_s + sum(generation.steps_s[1:])
            except Exception:  # noqa: BLE001 - see the docstring
                continue
        return total

    def _record(
        self, job: Job, ledger: Ledger, turn: Turn, prompt: list[int], roof: Bandwidth, warm: float, text: str
    ) -> None:
        if job.loaded is None:
            raise RuntimeError("a latency record without a model")
        model, method = job.loaded.model, job.methods[turn.method]
        facts: Record = {
            "budget": method.budget_label,
            "beyond_budget": method.beyond_budget,
            "context": turn.context,
            "prompt_tokens": turn.prompt,
            "new_tokens": self.new_tokens,
            "repeat": turn.repeat,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name(model.device),
            "overlap": job.setting.overlap,
            "warmup_s": warm,
            "weights": job.loaded.weights,
            "text": text,
            **roof.facts(),
            **job.setting.options,
        }
        forget_peak(model.device)
        try:
            generation, prefilled = run_once(job, model, method, prompt, self.new_tokens)
            check_alive(method, generation, turn.prompt)
            figures = times(generation) | step_costs(generation, model, roof) | link_facts(generation, prefilled)
            figures |= {"peak_rss_bytes": peak_rss(), **peak_device(model.device)}
            figures["built_beside"] = prefilled.beside is not None
        except Exception as error:  # noqa: BLE001 - any failure of one measurement becomes a row, the run continues
            ledger.failed(turn.method, turn.sample_id, error, facts)
            job.setting.check_device(error)
        else:
            record = facts | figures
            if self.profile and turn.repeat == 0:
                record |= self._profile(job, turn, model, prompt, record)
            ledger.ok(turn.method, turn.sample_id, record)

    def _profile(self, job: Job, turn: Turn, model: PreTrainedModel, prompt: list[int], figures: Record) -> Record:
        """Fields of a record from one more run under the profiler, in which no parts of the work overlap. If the
        profiler fails, the failure is logged and recorded, and the measurement itself remains valid."""
        setting = replace(job.setting, overlap=False, named=True)
        apart, path = replace(job, setting=setting), job.files[turn.method].folder / f"trace-{turn.context}.json.gz"
        tokens = min(TOKENS, self.new_tokens)
        try:
            profiled(lambda: run_once(apart, model, job.methods[turn.method], prompt, tokens), path, model.device)
            return {"profile": profile_facts(phases(read_trace(path)), figures), "trace": path.name}
        except Exception as error:  # noqa: BLE001 - see the docstring
            log.warning("no profile of %s on %d tokens: %s", turn.method, turn.prompt, error)
            return {"profile_error": outcome(error)["error"]}


def run_once(
    job: Job, model: PreTrainedModel, method: Method, prompt: list[int], new_tokens: int
) -> tuple[Generation, Prefilled]:
    """Prefill with one method alone, decode ``new_tokens``, and end all background work."""
    gc.collect()
    ids = torch.tensor([prompt], device=model.device)
    with prefill(model, ids, [method], None, job.chunk, new_tokens, job.setting) as prefilled:
        with undisturbed():
            generation = decode(prefilled, 0, new_tokens, min_new_tokens=new_tokens, spend=True)
        generation.settle()
    return generation, prefilled


def times(generation: Generation) -> Record:
    """Times of one generation in seconds. ``tpot_s`` is the median of :attr:`Generation.usual_steps_s`.
    ``tpot_released_s`` follows PQCache's released code: (time of all n tokens - TT2T) / (n - 2)."""
    later, usual = generation.steps_s[1:], generation.usual_steps_s
    wait = max(0.0, generation.steps_s[0] - median(usual))
    return {
        "ttft_s": generation.ttft_s,
        "tt2t_s": generation.tt2t_s,
        **spread("tpot", usual),
        "tpot_released_s": sum(later) / (generation.tokens.shape[1] - 2),
        "observe_s": generation.observe_s,
        "build_s": generation.build_s,
        "index_build_s": generation.index_s,
        "pending_s": generation.pending_s,
        "wait_s": generation.pending_s + wait,  # spent on the index before steps have their usual length
        "first_wait_s": wait,
        "steps_s": [round(seconds, 9) for seconds in generation.steps_s],
    }


def step_costs(generation: Generation, model: PreTrainedModel, roof: Bandwidth) -> Record:
    """Where the time of a step goes, in seconds, as means over the steps whose phases were timed. Also the bytes that a
    step reads, and the rate of reading them as a share of the bandwidth of a copy."""
    cohorts, meters = generation.cohorts(), generation.meters()
    steps, layers = len(generation.steps_s), max(1, len(generation.cache.selective))
    spent = [(meter.seconds, max(1, meter.timed)) for meter in meters]
    phases = {f"{phase}_step_s": sum(seconds[phase] / timed for seconds, timed in spent) for phase in PHASES}
    first, *later = generation.steps_s
    usual = median(generation.usual_steps_s)
    every = [min(first, usual), *later]  # without the wait for the index
    mean = fmean([every[i] for i in sorted(generation.phased)] or every)
    attended = fmean(meter.attended / max(1, meter.steps) for meter in meters)
    index_bytes = sum(meter.index_bytes for meter in meters) / steps
    known = cohorts[0].state.geometry
    kv_bytes = attended * layers * 2 * known.kv_heads * known.head_dim * model.dtype.itemsize
    weights = weight_bytes(model)
    rate = (weights + kv_bytes + index_bytes) / usual
    phases["dense_step_s"] = max(0.0, mean - sum(phases.values()))
    return {
        **(phases if generation.replays is None else {}),  # the phases of a captured step cannot be timed
        "attended_tokens": attended,
        "skipped_nothing": attended_all(cohorts),
        "weight_bytes": weights,
        "attended_bytes": kv_bytes,
        "index_bytes": index_bytes,
        "index_resident_bytes": sum(cohort.state.resident_bytes for cohort in cohorts),
        "index_facts": cohorts[0].state.facts,
        "corrected_heads": generation.corrected_heads,
        "bandwidth_gbps": rate / 1e9,
        "copy_share": rate / roof.copy,
    }


def link_facts(generation: Generation, prefilled: Prefilled) -> Record:
    """Bytes on the device, bytes on the host, bytes over the link per step, hit rate of the block cache, and the kind
    of link."""
    stores, steps = [cohort.store for cohort in generation.cohorts()], len(generation.steps_s)
    link: Any = getattr(prefilled.placement, "link", None)
    lookups = sum(store.usage.cache_lookups for store in stores)
    return {
        "device_bytes": sum(store.usage.device_bytes for store in stores),
        "host_bytes": sum(store.usage.host_bytes for store in stores),
        "to_device_bytes_step": sum(store.usage.bytes_to_device for store in stores) / steps,
        "to_host_bytes_step": sum(store.usage.bytes_to_host for store in stores) / steps,
        "link_bytes_step": sum(store.usage.link_bytes for store in stores) / steps,
        "cache_lookups": lookups,
        "cache_hit_rate": sum(store.usage.cache_hits for store in stores) / lookups if lookups else None,
        "link": None if link is None else link.label,
        "emulated": link is not None and link.emulated,
        "link_wait_s": None if link is None else link.meters.seconds_waited,
    }


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that one step reads: all weights except an input embedding that the output layer does not
    share."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    untied = head is not None and embedding.weight is not head.weight
    skipped = {id(embedding.weight)} if untied else set()
    return sum(p.nbytes for p in model.parameters() if id(p) not in skipped)  # a tied weight is listed once
