"""Checks before a run starts, and checks of a generation before it is counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product

from transformers import PreTrainedModel

from pqbench.benchmarks.base import Sample
from pqbench.engine.cohort import Cohort, Rows
from pqbench.engine.decode import Generation
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from pqbench.engine.shapes import frequencies, geometry
from pqbench.errors import BudgetError, ConfigError, LivenessError, ModelError
from pqbench.method import Method
from pqbench.models.devices import check_kernels

log = logging.getLogger(__name__)

ROUNDING = 1e-6  # relative error that is allowed for a sum of means over sequences and KV heads


def check_split(name: str, method: Method, length: int) -> None:
    """Raises BudgetError when a method's budget cannot be met on prompts of ``length`` tokens."""
    try:
        method.split(length, length)
    except BudgetError as error:
        raise BudgetError(f"{name}: {error}") from error


def check_budgets(methods: Mapping[str, Method], samples: Sequence[Sample]) -> None:
    """Raises BudgetError when a method's budget cannot be met on some sample, or is larger than every context."""
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
            check_split(name, method, length)


def check_methods(methods: Mapping[str, Method], model: PreTrainedModel, setting: Setting) -> None:
    """Raises ConfigError or ModelError when a method cannot work on this model, whatever the sample."""
    check_kernels(setting.backend, model.device)
    setting.check(methods, model)
    if setting.tier.offloads and (evicting := [name for name, method in methods.items() if method.evicts]):
        log.info("store=host: methods that evict (%s) keep their rows on the device", ", ".join(evicting))
    for (name, method), layer in product(methods.items(), profile(model).kinds):
        try:
            rotary = frequencies(model, [method]).get(layer)
            method.layer(geometry(model, layer, Rows(slice(None), 0, 1), 1024, rotary, setting))
        except (ConfigError, ModelError) as error:
            raise type(error)(f"{name}: {error}") from error


def attended_all(cohorts: Sequence[Cohort]) -> bool:
    """Whether every step attended to every token of its context, in all layers and cohorts, so that the figures are
    those of full attention. Where no step was decoded, that is so after a dense prefill. Waits for the device, but only
    where a method's number of tokens is known to the device alone."""
    return all(_attended_all(cohort) for cohort in cohorts)


def _attended_all(cohort: Cohort) -> bool:
    meter, seen = cohort.meter, cohort.store.seen
    if not meter.steps:
        return not cohort.method.own_prefill
    steps = list(zip(meter.counts, range(seen - meter.steps + 1, seen + 1), strict=True))
    if any(count is not None and count < context for count, context in steps):
        return False
    untold = sum(context for count, context in steps if count is None)
    return meter.ragged is None or float(meter.ragged) >= untold * (1 - ROUNDING)


def check_alive(method: Method, generation: Generation, prompt: int) -> None:
    """Raises LivenessError when a method attended to every token in every step although its budget is smaller."""
    split = method.split(prompt + 1, prompt)
    if split is None or split.total >= prompt or method.attends_all(prompt):
        return
    meters = generation.meters()
    steps = sum(meter.steps for meter in meters)
    if steps and attended_all(generation.cohorts()):
        attended = sum(meter.attended for meter in meters) / steps
        raise LivenessError(
            f"attended to {attended:.0f} tokens of a context of {prompt} with a budget of {split.total}: "
            "the method is not active"
        )
