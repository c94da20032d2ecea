"""The store counts the keys that a selection reads, regardless of the method's own declaration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from methods.oracle import Oracle
from pqbench.engine.cohort import Cohort, Rows
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import case

BUDGET = Budget(sink=3, window=6, tokens=20)
BATCH, HEADS, WIDTH, PROMPT, STEPS = 2, 2, 16, 60, 3
KEY = BATCH * HEADS * WIDTH * 4  # bytes of one token's keys, float32
TIERS = {"device": DeviceTier(), "host": HostTier(), "cached": HostTier(cache_tokens=16, cache_block=4)}


def every_key(kv: KV) -> Tensor:
    return kv.keys()


def stored_keys(kv: KV) -> Tensor:
    return kv.stored_keys(0, kv.length - 5)


def some_keys(kv: KV) -> Tensor:
    return kv.keys_at(torch.arange(7).expand(BATCH, HEADS, -1))


READS: dict[str, tuple[Callable[[KV], Tensor], Callable[[int], int]]] = {
    "keys": (every_key, lambda length: length),
    "stored_keys": (stored_keys, lambda length: length - 5),
    "keys_at": (some_keys, lambda _: 7),
}


@dataclass(frozen=True)
class Silent(Method):
    """Reads keys in every step and declares nothing."""

    read: Callable[[KV], Tensor] = every_key
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return SilentState(self, geometry)


class SilentState(LayerState):
    """Attends to the newest tokens, after it has read some keys."""

    def __init__(self, method: Silent, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def append(self, kv: KV) -> None:
        self.method.read(kv)  # updating an index does not count as reading it

    def select(self, q: Tensor, kv: KV) -> Selection:
        self.method.read(kv)
        rows = torch.arange(kv.length - 4, kv.length)
        return Selection(rows.expand(BATCH, HEADS, -1))


def decoded(method: Method, tier: Tier) -> Cohort:
    """Decode a few steps with one layer."""
    data = case(PROMPT, STEPS, batch=BATCH, heads=HEADS, width=WIDTH)
    keys, values = (GrowingBuffer(part[:, :, :PROMPT]) for part in (data.keys, data.values))
    placement = tier.open(torch.device("cpu"))
    store = placement.prompt(keys, values).store(lambda length: method.split(length, PROMPT))
    state = method.layer(data.geometry)
    state.finish_prefill(store)
    cohort = Cohort(Rows(slice(None), 0, BATCH), store, state, method)
    for step in range(STEPS):
        at = PROMPT + step
        cohort.append(data.keys[:, :, at : at + 1], data.values[:, :, at : at + 1])
        cohort.attend(data.q[:, :, :, at])
    store.settle()
    placement.close()
    return cohort


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", READS)
def test_keys_that_a_selection_reads_are_counted_though_nothing_was_declared(kind: str, tier: str) -> None:
    read, tokens = READS[kind]
    cohort = decoded(Silent(read), TIERS[tier])
    lengths = range(PROMPT + 1, PROMPT + STEPS + 1)
    assert cohort.meter.index_bytes == sum(tokens(length) for length in lengths) * KEY


@pytest.mark.parametrize("tier", TIERS)
def test_what_the_oracle_reads_is_counted_once(tier: str) -> None:
    cohort = decoded(Oracle(BUDGET), TIERS[tier])
    assert cohort.meter.index_bytes == sum(range(PROMPT + 1, PROMPT + STEPS + 1)) * KEY
