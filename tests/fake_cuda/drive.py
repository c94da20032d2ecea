"""Decodes step by step on the fake device, with one layer of a real shape and a method of the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pqbench.engine.setting import Setting
from pqbench.measure.geometries import shape_of
from pqbench.measure.layer.turns import Layer, Subject
from pqbench.measure.source import synthetic
from pqbench.method import Method
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.fake_cuda.device import CUDA, fake_device
from tests.fake_cuda.tally import ROOT, Counts, Tally

METHODS = tuple(sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml")))
TIERS: Mapping[str, Tier] = MappingProxyType(
    {"device": DeviceTier(), "host": HostTier(), "host, cached": HostTier(cache_tokens=2048)}
)
STEPS = 80  # of a decode: tokens leave for the host every 32, are encoded every 16, and the first chunk of rows is full
FIRST = 3  # steps in which kernels may be compiled


def method_of(name: str, ratio: float | None = None, **fields: Any) -> Method:
    """The method of conf/method/NAME.yaml with a budget of 1024 tokens, or of a share of the context."""
    text = OmegaConf.load(Path(ROOT, "conf/method", f"{name}.yaml"))
    ratio = 0.1 if ratio is None and "budget.ratio" in str(OmegaConf.to_container(text)) else ratio
    budget = {"_target_": "pqbench.method.Budget", "tokens": None if ratio else 1024, "ratio": ratio}
    config = OmegaConf.create({"budget": budget, "method": OmegaConf.merge(text, fields)})
    method: Method = instantiate(config.method)
    return method


@dataclass
class Decode:
    """The counts of decoding with one layer.

    Attributes:
        building: counts while the index was built.
        steps: counts of every step.
        late: kernels that would have been compiled after the first steps, with the step of that launch.
        host_work: operations on large host tensors in the steps.
    """

    tally: Tally
    building: Counts
    steps: list[Counts] = field(default_factory=list)
    late: dict[str, int] = field(default_factory=dict)
    host_work: dict[str, int] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """The number of kernels in an ordinary step: the most frequent number."""
        return Counter(step.launches for step in self.steps[FIRST:]).most_common(1)[0][0]

    def all(self, *kinds: str, without: tuple[str, ...] = ()) -> int:
        """The number of events of these kinds in all steps, except in files whose paths begin with one of
        ``without``."""
        return sum(step.of(*kinds, without=without) for step in self.steps)

    def listed(self, *kinds: str) -> str:
        """The lines of code of these events, over all steps."""
        every = Counts()
        for step in self.steps:
            every.events.update(step.events)
        return every.listed(*kinds)


def decode_layer(
    patch: pytest.MonkeyPatch,
    method: Method,
    tier: Tier,
    context: int = 4096,
    backend: str = "auto",
    steps: int = STEPS,
) -> Decode:
    """Build the index over ``context`` tokens of a Llama-3.1-8B layer in bfloat16 and decode ``steps`` tokens."""
    with fake_device(patch) as device:
        tally, shape = device.tally, shape_of("llama31_8b")
        with tally.part():
            layer = Layer(
                shape, torch.bfloat16, context, steps, synthetic(shape, 0), CUDA, Setting(tier, backend=backend)
            )
        tally.faults.clear()  # of how rows are made up; test_benchmarks.py has these
        subject = Subject("subject", "gpu", "budget", method)
        with tally.part() as building:
            cohort = subject.build(layer)
        decode, before = Decode(tally, building), dict(tally.host_work)
        known: dict[str, int] = {}
        for number in range(steps):
            key, value, q = layer.token(number)
            with tally.part() as counts:
                cohort.state.prefetch(cohort.store)
                cohort.append(key, value)
                output = cohort.attend(q)
            assert output.shape == q.shape
            assert output.device == CUDA
            assert output.dtype == q.dtype
            decode.steps.append(counts)
            now = {name: len(keys) for name, keys in tally.keys.items()}
            if number >= FIRST:
                decode.late |= {name: number for name, keys in now.items() if keys != known.get(name, 0)}
            known = now
        decode.host_work = {what: size for what, size in tally.host_work.items() if what not in before}
        subject.close()
    return decode
