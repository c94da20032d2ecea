"""The block cache and its policies against plain dicts."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels import cpu, reference
from pqbench.kernels.backend import kernels
from pqbench.kernels.reference.blocks import Residency
from pqbench.store.host.blocks import BlockCache, CacheOptions

CPU = torch.device("cpu")
BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
STEPS = st.lists(st.lists(st.integers(0, 11), unique=True, max_size=9), max_size=25)


class Model:
    """The simplest implementation of the policies: a dict of counts and times of promotion."""

    def __init__(self, capacity: int, lfu: bool) -> None:
        self.capacity, self.lfu, self.clock = capacity, lfu, 0
        self.counts: dict[int, int] = {}
        self.times: dict[int, int] = {}

    def step(self, blocks: list[int]) -> None:
        """One step."""
        wanted = blocks[: self.capacity]
        for block in wanted:
            if block not in self.counts:
                while len(self.counts) >= self.capacity:
                    victim = min(
                        (b for b in self.counts if b not in wanted),
                        key=lambda b: (self.counts[b] if self.lfu else 0, self.times[b]),
                    )
                    del self.counts[victim], self.times[victim]
                self.counts[block] = 0
                self.times[block] = self.clock  # protected by being wanted; set below
        for block in reversed(wanted):
            self.clock += 1
            self.counts[block] += 1
            self.times[block] = self.clock


def stepped(
    backend: ModuleType, residency: Residency, blocks: list[int], lfu: bool, admit: int = 99
) -> list[tuple[int, int]]:
    """One step of one owner that requests blocks in this order. Returns which block entered which slot."""
    counts = torch.zeros_like(residency.where)
    for rank, block in enumerate(blocks):
        counts[0, block] = 50 - rank
    tally = torch.zeros(1, dtype=torch.int64)
    moves = backend.admit_blocks(counts, counts.shape[1], admit, lfu, residency, tally)[0].tolist()
    entered = [(block, slot) for block, slot in moves if block >= 0]
    assert int(tally) == len(entered)
    assert int(counts.sum()) == 0
    return entered


def empty(capacity: int, blocks: int = 12) -> Residency:
    """A cache for a context of this many blocks."""
    return Residency.empty(1, capacity, CPU)._replace(where=torch.full((1, blocks), -1))


@BACKENDS
@pytest.mark.parametrize("lfu", [True, False])
@given(capacity=st.integers(1, 6), steps=STEPS)
def test_policies_hold_what_the_model_holds(
    backend: ModuleType, lfu: bool, capacity: int, steps: list[list[int]]
) -> None:
    residency, model = empty(capacity), Model(capacity, lfu)
    slots: dict[int, int] = {}  # slot -> block, from the moves alone
    for blocks in steps:
        before = set(model.counts)
        entered = stepped(backend, residency, blocks, lfu)
        model.step(blocks)
        for block, slot in entered:
            assert slots.get(slot) not in blocks[:capacity]  # blocks of one step do not evict each other
            slots[slot] = block
        assert {block for block, _ in entered} == set(model.counts) - before
        assert set(slots.values()) == set(model.counts)
        assert set(blocks[:capacity]) <= set(slots.values())
        assert {slot: int(block) for slot, block in enumerate(residency.held[0]) if block >= 0} == slots
        assert {int(s): b for b, s in enumerate(residency.where[0]) if s >= 0} == slots
        if lfu:
            assert {block: int(residency.uses[0, slot]) for slot, block in slots.items()} == model.counts


@BACKENDS
def test_lfu_keeps_what_is_asked_for_often_and_lru_what_was_asked_for_last(backend: ModuleType) -> None:
    for lfu, gone in ((True, 2), (False, 1)):
        residency = empty(2)
        for blocks in ([1], [1], [2]):
            stepped(backend, residency, blocks, lfu)
        slot = int(residency.where[0, gone])
        assert stepped(backend, residency, [3], lfu) == [(3, slot)]
        assert int(residency.where[0, gone]) == -1


@BACKENDS
def test_among_equals_the_one_promoted_longest_ago_leaves(backend: ModuleType) -> None:
    residency = empty(3)
    stepped(backend, residency, [1, 2, 3], True)  # 1 is wanted most and promoted last
    assert stepped(backend, residency, [4], True) == [(4, 2)]  # where 3 was
    assert stepped(backend, residency, [5], True) == [(5, 1)]


def owner_of(cache: BlockCache, head: int, heads: int, length: int) -> int:
    """The owner of each head, with ``heads`` counted over all sequences."""
    return head // (heads // len(cache.table(length)))


def asked(
    cache: BlockCache, rows: list[tuple[int, int]], length: int, on_host: int, heads: int
) -> list[tuple[int, int]]:
    """One step that requests (head, position). Returns the admitted blocks as (first head, block start)."""
    counts = torch.zeros_like(cache.table(length))
    for head, position in rows:
        counts[owner_of(cache, head, heads, length), position // cache.options.block] += 1
    moves = cache.step(counts, on_host // cache.options.block, torch.zeros(1, dtype=torch.int64))
    return [(a.first, a.start) for a in cache.admissions(moves)]


def located(cache: BlockCache, head: int, positions: list[int], length: int, heads: int) -> Tensor:
    """Cache rows of some positions of a head, negative where absent."""
    slots, size = cache.table(length)[owner_of(cache, head, heads, length)], cache.options.block
    return torch.tensor([int(slots[position // size]) * size + position % size for position in positions])


def test_the_most_wanted_blocks_enter_and_only_complete_ones() -> None:
    cache = BlockCache(CacheOptions(tokens=8, block=4, admit=2), 1, 2, CPU, kernels(CPU))
    rows = [(0, 13), (1, 12), (0, 14), (0, 4), (1, 5), (1, 8)]  # block 3 three times, 1 twice, 2 once
    assert asked(cache, rows, 16, 15, 2) == [(0, 4), (0, 8)]  # of block 3 one token is missing on the host
    assert asked(cache, rows, 16, 16, 2) == [(0, 12)]  # 3 and 1 are the most wanted, 1 is there
    assert (located(cache, 0, [8, 9], 16, 2) < 0).all()
    for head in (0, 1):
        found = located(cache, head, [4, 5, 6, 7, 12, 15], 16, 2)
        assert sorted({int(row) // 4 for row in found}) == [0, 1]
        assert [int(row) % 4 for row in found] == [0, 1, 2, 3, 0, 3]


def test_ties_go_to_the_earlier_block() -> None:
    cache = BlockCache(CacheOptions(tokens=40, block=4, admit=2), 1, 1, CPU, kernels(CPU))
    assert asked(cache, [(0, 21), (0, 9), (0, 2), (0, 17)], 24, 24, 1) == [(0, 0), (0, 8)]


def test_sequences_do_not_share_blocks_and_heads_do_unless_told_otherwise() -> None:
    shared = BlockCache(CacheOptions(tokens=8, block=4), 2, 3, CPU, kernels(CPU))
    assert asked(shared, [(0, 1), (2, 6), (4, 9)], 12, 12, 6) == [(0, 0), (0, 4), (3, 8)]
    assert (located(shared, 1, [0, 5], 12, 6) >= 0).all()
    assert (located(shared, 3, [0, 5], 12, 6) < 0).all()
    own = BlockCache(CacheOptions(tokens=8, block=4, per_head=True), 2, 3, CPU, kernels(CPU))
    assert asked(own, [(0, 1), (2, 6), (4, 9)], 12, 12, 6) == [(0, 0), (2, 4), (4, 8)]
    assert (located(own, 1, [0, 5], 12, 6) < 0).all()
    assert located(own, 4, [9], 12, 6).tolist() == [1]
    assert own.rows == shared.rows == 8


@pytest.mark.parametrize("per_head", [True, False])
@given(data=st.data(), policy=st.sampled_from(["lfu", "lru"]))
def test_the_table_follows_the_policy_as_the_context_grows(per_head: bool, data: st.DataObject, policy: str) -> None:
    size, batch, heads = 3, 2, 2
    cache = BlockCache(CacheOptions(7, size, policy, 3, per_head), batch, heads, CPU, kernels(CPU))
    capacity, length = 2, 5
    owners = batch * heads if per_head else batch
    models = [Model(capacity, policy == "lfu") for _ in range(owners)]
    for _ in range(data.draw(st.integers(1, 12))):
        length += data.draw(st.integers(0, 7))
        rows = data.draw(
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, length - 1)), min_size=1, max_size=30, unique=True)
        )
        on_host = data.draw(st.integers(0, length))
        asked(cache, rows, length, on_host, batch * heads)
        for owner, model in enumerate(models):
            mine = [p // size for h, p in rows if (h if per_head else h // heads) == owner]
            hits = Counter(block for block in mine if (block + 1) * size <= on_host)
            model.step(sorted(hits, key=lambda block: (-hits[block], block))[:3])
        for head in range(batch * heads):
            resident = models[head if per_head else head // heads].counts
            found = located(cache, head, list(range(length)), length, batch * heads)
            assert {p // size for p in range(length) if found[p] >= 0} == {b for b in resident if b * size < length}
            held = [int(row) for row in found if row >= 0]
            assert len(set(held)) == len(held)
            assert all(row < cache.rows for row in held)
