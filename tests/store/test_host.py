"""The host store against the device store, bit for bit, while contexts grow, rings wrap and blocks enter and leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pqbench.kernels.buffers import gather_rows
from pqbench.method import Budget, Split
from pqbench.store.host.cached import CachedFinder
from pqbench.store.host.outbox import Outbox
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import OrderingError
from pqbench.store.link.emulated import PRESETS, EmulatedLink
from pqbench.store.link.local import LocalLink
from tests.store.support import (
    BATCH,
    BUDGET,
    CACHES,
    HEADS,
    PROMPT,
    ROW,
    STEPS,
    WIDTH,
    fetched,
    open_store,
    run,
    selections,
    split_of,
    tokens,
)


@pytest.mark.parametrize("cache", CACHES)
def test_arranged_rows_are_found_at_their_new_places(cache: str) -> None:
    keys, values = tokens(PROMPT + STEPS)
    generator = torch.Generator().manual_seed(4)
    order = torch.rand(BATCH, HEADS, PROMPT, generator=generator).argsort(2)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link, cache)
        assert torch.equal(store.keys(3, 40), keys[:, :, 3:40])  # reading before does no harm
        assert store.arrange(order) is store
        placed = [torch.cat([gather_rows(each, order), each[:, :, PROMPT:]], 2) for each in (keys, values)]
        later = torch.arange(PROMPT, PROMPT + STEPS).expand(BATCH, HEADS, -1)
        for step, indices in enumerate(selections()):
            at = PROMPT + step
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            whole = torch.arange(at + 1).expand(BATCH, HEADS, -1) if indices is None else indices
            for got, rows in zip(fetched(store, indices), placed, strict=True):
                assert torch.equal(got, gather_rows(rows, whole)), step
        assert torch.equal(store.positions, torch.cat([order, later], 2))
        with pytest.raises(RuntimeError, match="after the first step"):
            store.arrange(order)
        store.settle()
        assert torch.equal(store.stored_keys(), placed[0])


@pytest.mark.parametrize("cache", CACHES)
def test_rows_are_those_of_a_device_store(cache: str) -> None:
    keys, values = tokens(PROMPT + STEPS)
    meters = []
    for overlap, debug in ((True, False), (False, False), (True, True)):
        with LocalLink(debug) as link:  # with debug: all memory begins as NaN, buffers in flight are NaN
            meters.append(run(open_store(keys, values, link, cache, overlap), keys, values))
    assert meters[0] == meters[1] == meters[2]  # waiting for everything at once changes nothing, hits included
    hits, lookups = meters[0][-1][2:]
    assert (hits > 0) == (lookups > 0) == (cache != "none")
    assert hits < lookups or cache == "none"


def test_rows_are_the_same_over_a_slow_link() -> None:
    keys, values = tokens(PROMPT + STEPS)
    with EmulatedLink(PRESETS["pcie3"]) as link, LocalLink() as local:
        slow = run(open_store(keys, values, link, "lfu"), keys, values)
        assert slow == run(open_store(keys, values, local, "lfu"), keys, values)
        assert link.meters.to_host == local.meters.to_host == keys.nbytes + values.nbytes


def test_layers_hold_the_same_tokens_one_step_after_the_other() -> None:
    layers = [tokens(PROMPT + STEPS, seed) for seed in range(3)]
    scratch = Scratch()
    with LocalLink(debug=True) as link:
        stores = [open_store(*layer, link, "lfu", scratch=scratch) for layer in layers]
        for step, indices in enumerate(selections(80)):
            at = PROMPT + step
            for store, (keys, values) in zip(stores, layers, strict=True):
                store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
                everything = keys[:, :, : at + 1]
                got, _ = fetched(store, indices)
                assert torch.equal(got, everything if indices is None else gather_rows(everything, indices))
            assert len({store.length for store in stores}) == 1
        for store, (keys, values) in zip(stores, layers, strict=True):
            store.settle()
            host = store._holdings.host.pieces(0, PROMPT + 80)  # row r on the host is token r, in every layer
            rows = torch.cat([piece.rows for piece in host], 2)
            assert torch.equal(rows, torch.stack([keys, values], 3)[:, :, : PROMPT + 80])


@pytest.mark.parametrize("cache", ["lfu", "per_head"])
def test_a_second_prompt_is_served_as_if_it_were_the_first(cache: str) -> None:
    first, second = tokens(PROMPT + STEPS, 0), tokens(PROMPT + STEPS, 5)
    with LocalLink(debug=True) as link:
        run(open_store(*first, link, cache), *first)
        after = run(open_store(*second, link, cache), *second, seed=3)
    with LocalLink(debug=True) as link:
        alone = run(open_store(*second, link, cache), *second, seed=3)
    assert after == alone
    assert after[0][2] == 0  # no hits in the first step
    assert after[0][3] > 0


def test_several_methods_share_one_prompt_and_leave_it_as_it_is() -> None:
    keys, values = tokens(PROMPT + STEPS)
    with LocalLink(debug=True) as link:
        prompt = HostPrompt.offload(link, keys[:, :, :PROMPT], values[:, :, :PROMPT])
        prompt.wait()
        before = prompt.rows.clone()
        for _ in range(2):
            run(HostStore(prompt, split_of, 12), keys, values)
        assert torch.equal(prompt.rows, before)


def test_bytes_are_those_of_the_rows_that_moved() -> None:
    keys, values = tokens(PROMPT + 40)
    with LocalLink() as link:
        store = open_store(keys, values, link, split=lambda _: Split(8, 20, 10))
        assert (store.usage.link_bytes, store.usage.device_bytes, store.usage.host_bytes) == (
            0,
            0,
            BATCH * HEADS * PROMPT * ROW,
        )
        for at in range(PROMPT, PROMPT + 40):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        assert store.usage.opening_bytes == BATCH * HEADS * (8 + 20) * ROW
        assert store.usage.bytes_to_host == BATCH * HEADS * 36 * ROW  # six batches of margin / 2
        indices = torch.tensor([7, 8, 30, PROMPT + 39, 100]).expand(BATCH, HEADS, -1)
        store.fetch(indices)
        assert store.usage.bytes_to_device == BATCH * HEADS * 3 * ROW  # position 7 is a sink, the newest is in the ring
        ragged = torch.stack([indices, indices]).flatten()[: BATCH * HEADS * 2].view(BATCH, HEADS, 2)
        before, on_host = store.usage.bytes_to_device, int(((ragged >= 8) & (ragged < PROMPT + 7)).sum())
        store.fetch(ragged)
        assert store.usage.bytes_to_device - before == on_host * ROW  # heads need not miss equally many rows
        before = store.usage.bytes_to_device
        store.fetch(None)
        assert store.usage.bytes_to_device - before == BATCH * HEADS * (PROMPT + 40 - 8 - 32) * ROW
        assert store.usage.link_bytes == store.usage.bytes_to_device + store.usage.bytes_to_host


def test_the_row_that_leaves_the_window_is_read_without_the_link() -> None:
    keys, values = tokens(PROMPT + STEPS)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link)
        moved = None
        for at in range(PROMPT, PROMPT + STEPS):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            moved = store.usage.bytes_to_device if moved is None else moved
            left = at + 1 - BUDGET.resolve(at + 1, PROMPT).window - 1
            assert torch.equal(store.keys(left, left + 1), keys[:, :, left : left + 1])
            assert torch.equal(store.values(left, left + 2), values[:, :, left : left + 2])
        assert store.usage.bytes_to_device == moved
        assert torch.equal(store.keys(3, 60), keys[:, :, 3:60])
        assert store.usage.bytes_to_device == moved + BATCH * HEADS * (60 - 8) * ROW // 2  # keys alone, sinks not
        assert store.keys(5, 5).shape == (BATCH, HEADS, 0, WIDTH)
        store.settle()


def test_stored_keys_move_nothing_to_the_device() -> None:
    keys, values = tokens(PROMPT + 70)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link)
        assert torch.equal(store.stored_keys(3, 90), keys[:, :, 3:90])
        assert store.stored_keys(3, 90).data_ptr() == store._holdings.host._chunks[0].rows[:, :, 3:].data_ptr()
        for at in range(PROMPT, PROMPT + 70):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        assert torch.equal(store.stored_keys(3), keys[:, :, 3:])
        assert store.stored_keys(4, 4).shape == (BATCH, HEADS, 0, WIDTH)
        assert store.usage.bytes_to_device == 0
        store.settle()


def test_what_an_evicting_method_keeps_lies_on_the_device() -> None:
    keys, values = tokens(PROMPT + 60)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link)
        for at in range(PROMPT, PROMPT + 60):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        with pytest.raises(RuntimeError, match=r"keep\(\)"):
            store.drop(torch.zeros(BATCH, HEADS, 1, dtype=torch.long))
        indices = torch.randint(0, PROMPT + 60, (BATCH, HEADS, 25))
        kept = store.keep(indices)
        assert torch.equal(kept.positions, indices)
        assert torch.equal(kept.keys(), gather_rows(keys, indices))
        assert torch.equal(kept.values(), gather_rows(values, indices))
        assert (kept.seen, kept.length, kept.usage.host_bytes, kept.usage.link_bytes) == (PROMPT + 60, 25, 0, 0)
        assert kept.usage.opening_bytes == kept.usage.device_bytes == BATCH * HEADS * 25 * ROW
        kept.append(keys[:, :, :1], values[:, :, :1])
        kept.drop(torch.zeros(BATCH, HEADS, 1, dtype=torch.long))
        assert int(kept.positions[0, 0].max()) == PROMPT + 60
        store.settle()


def test_short_prompts_whose_sinks_are_still_growing() -> None:
    budget = Budget(sink=32, ratio=0.5, minimum=16 + 32)
    keys, values = tokens(140)
    for prompt in (1, 2, 31, 40):
        with LocalLink(debug=True) as link:
            store = open_store(keys, values, link, "lfu", prompt=prompt, split=lambda n: budget.resolve(n, 1))
            for at in range(prompt, 140):
                store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
                indices = torch.randint(0, at + 1, (BATCH, HEADS, 9))
                assert torch.equal(fetched(store, indices)[1], gather_rows(values, indices))
            moved = store.usage.bytes_to_device
            sinks = torch.arange(32).expand(BATCH, HEADS, -1)
            assert torch.equal(fetched(store, sinks)[0], keys[:, :, :32])
            assert store.usage.bytes_to_device == moved
            store.settle()


def test_several_tokens_at_once_and_no_budget() -> None:
    keys, values = tokens(PROMPT + 90)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link, split=lambda _: None)
        for at in range(PROMPT, PROMPT + 90, 30):
            store.append(keys[:, :, at : at + 30], values[:, :, at : at + 30])
            got = fetched(store, None)
            assert torch.equal(got[0], keys[:, :, : at + 30])
            assert torch.equal(got[1], values[:, :, : at + 30])
        store.settle()


def test_an_index_crosses_the_link_on_request() -> None:
    keys, values = tokens(PROMPT)
    codes = torch.randint(0, 255, (BATCH, HEADS, 50, 4), dtype=torch.uint8)
    with LocalLink(debug=True) as link:
        store = open_store(keys, values, link)
        arrival = store.bring(codes[:, :, :40])
        assert torch.equal(arrival.wait(), codes[:, :, :40])
        assert store.usage.bytes_to_device == codes[:, :, :40].nbytes
        store.bring(codes)  # asked for, and never used
        store.bring(codes)
        store.settle()


def test_a_prompt_can_arrive_in_blocks() -> None:
    keys, values = tokens(PROMPT)
    with LocalLink(debug=True) as link:
        prompt = HostPrompt(PROMPT, keys, link)
        for start in range(0, PROMPT, 40):
            prompt.extend(keys[:, :, start : start + 40], values[:, :, start : start + 40])
        assert torch.equal(HostStore(prompt, split_of).stored_keys(), keys)
        assert prompt.nbytes == link.meters.to_host == 2 * keys.nbytes
        with pytest.raises(ValueError, match="does not fit"):
            prompt.extend(keys[:, :, :1], values[:, :, :1])


class Impatient(Outbox):
    """An outbox that treats tokens as copied to the host at once."""

    def land(self, stop: int) -> None:
        self._landed = self.sent


def never_lands(store: HostStore) -> None:
    """Make a store read host rows and overwrite ring slots without waiting for the copies."""
    held = store._holdings
    held.outbox = Impatient(held.host, held.pool, store.length, held.traffic)


def never_arrives(store: HostStore) -> None:
    """Make a store use blocks before they have arrived."""
    finder = store._finder
    assert isinstance(finder, CachedFinder)

    def arrive() -> None:
        finder._entering = []

    finder.arrive = arrive  # type: ignore[method-assign]


def decode(store: HostStore, keys: Tensor, values: Tensor) -> None:
    """Decode and check until a row is wrong."""
    for step, indices in enumerate(selections()):
        at = PROMPT + step
        store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        got, _ = fetched(store, indices)
        everything = keys[:, :, : at + 1]
        assert torch.equal(got, everything if indices is None else gather_rows(everything, indices))


@pytest.mark.parametrize(("spoil", "cache"), [(never_lands, "none"), (never_arrives, "lfu")])
def test_a_store_that_forgets_to_wait_is_caught_every_time(spoil: Callable[[HostStore], None], cache: str) -> None:
    keys, values = tokens(PROMPT + STEPS)
    link = LocalLink(debug=True)
    store = open_store(keys, values, link, cache)
    spoil(store)
    with pytest.raises((AssertionError, OrderingError)):
        decode(store, keys, values)
    with pytest.raises(OrderingError, match="never waited for"):
        link.close()
