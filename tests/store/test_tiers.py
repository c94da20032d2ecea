"""Tiers: where they place rows, and what they refuse in one line before memory is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from methods.pqcache import PQCache
from pqbench import generate
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError, RoomError
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.method import Budget
from pqbench.store.device import DeviceStore
from pqbench.store.host.rows import page_locked
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import OrderingError
from pqbench.store.tiers import DeviceTier, HostTier, Need, Tier
from tests.support import prompt_of, tiny_model

CPU = torch.device("cpu")
TIERS: list[Tier] = [
    DeviceTier(),
    HostTier(),
    HostTier(background=False),
    HostTier("pcie5", cache_tokens=32, cache_block=8),
    HostTier("local", 32, 8, "lru", 2, True, True, True),
    HostTier("20GB/s+5us", debug=True, margin=2),
]


def rows(count: int) -> torch.Tensor:
    """Random rows ``[1, 2, count, 4]``."""
    return torch.randn(1, 2, count, 4, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_serves_the_same_rows(tier: Tier) -> None:
    keys, values = rows(130), -rows(130)
    tier.check(130, 64)
    placement = tier.open(CPU)
    prompt = placement.prompt(GrowingBuffer(keys[:, :, :100]), GrowingBuffer(values[:, :, :100]))
    budget = Budget(sink=4, ratio=0.3, minimum=8)
    for split in (lambda n: budget.resolve(n, 100), None, lambda _: None):
        store = prompt.store(split)
        for at in range(100, 130):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            indices = torch.randint(0, at + 1, (1, 2, 11))
            got, _, chosen = store.fetch(indices)
            assert chosen is not None
            assert torch.equal(gather_rows(got, chosen), gather_rows(keys, indices))
        everything, _, chosen = store.fetch(None)
        assert chosen is None
        assert torch.equal(everything, keys)
        assert store.device == CPU
        store.settle()
    placement.close()


def test_a_tier_makes_the_store_it_describes() -> None:
    def store(tier: Tier) -> Any:
        return tier.open(CPU).prompt(GrowingBuffer(rows(100)), GrowingBuffer(rows(100))).store(None)

    assert type(store(DeviceTier())) is DeviceStore
    assert type(store(HostTier())) is HostStore
    cached = store(HostTier(cache_tokens=20, cache_block=8))
    assert cached._holdings.cache.rows * cached._holdings.row_bytes == 2 * 16 * 2 * 4 * 4  # two blocks for two heads
    assert HostTier().open(CPU).link.label == "local"
    assert not HostTier().open(CPU).link.emulated
    assert HostTier("pcie3").open(CPU).link.label == "emulated PCIe 3.0 x16"
    assert HostTier("pcie3").open(CPU).link.emulated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "pcie9"}, "there is no link 'pcie9': use local, cuda, pcie3, pcie4, pcie5"),
        ({"cache_block": 0}, "cache_block is 0: a block has at least 1 token"),
        ({"cache_tokens": -1}, "cache_tokens is -1: use 0"),
        ({"cache_tokens": 100}, "less than one block of 128"),
        ({"cache_policy": "fifo"}, "cache_policy is 'fifo': use lfu or lru"),
        ({"cache_admit": 0}, "cache_admit is 0"),
        ({"margin": 1}, "margin is 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        HostTier(**options)
    assert "\n" not in str(error.value)


def test_too_little_memory_is_noticed_before_it_is_taken() -> None:
    free = psutil.virtual_memory().available
    with pytest.raises(ConfigError, match=r"1000000 tokens of KV need 9313225\.7 GiB .* and [\d.]+ GiB are available"):
        HostTier().check(1_000_000, 10**10)
    HostTier().check(1, free // 4)


def test_too_little_memory_of_a_device_is_said_with_the_bytes_and_the_way_out() -> None:
    card = Need(torch.device("cuda"), layers=32, free=10 << 30)
    row = 32 * 2 * 8 * 128 * 2  # bytes
    DeviceTier().check(65536, row, card)
    with pytest.raises(ConfigError, match=r"131072 tokens of KV need 16\.0 GiB .* and 10\.0 GiB .* store=host"):
        DeviceTier().check(131072, row, card)
    with pytest.raises(ConfigError, match=r"need 12\.0 GiB .* on cuda, .* and 10\.0 GiB are free: use a shorter"):
        HostTier().check(12 << 17, row, card)  # two copies of one layer
    with pytest.raises(RoomError, match=r"8\.0 GiB of memory on cuda, their prefill 3\.0 GiB, and 10\.0 GiB are free"):
        DeviceTier().check(65536, row, replace(card, working=3 << 30))
    with pytest.raises(RoomError, match=r"on cpu, their prefill 0\.0 GiB, and [\d.]+ GiB are free: use a shorter"):
        DeviceTier().check(1 << 40, row, Need(CPU, 1, 1 << 30))


def test_a_long_prompt_fits_a_host_tier_whose_device_holds_two_copies_of_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300000 tokens of an 8B model in half precision are 37 GiB, of which a GPU with 60 GiB sees one layer at a time.
    Taken for one layer they would be 73 GiB there, so nothing may guess the number of layers."""
    plenty = psutil.virtual_memory()._replace(available=512 << 30)
    monkeypatch.setattr("pqbench.store.tiers.psutil.virtual_memory", lambda: plenty)
    row = 32 * 2 * 8 * 128 * 2  # bytes
    HostTier().check(300_000, row, Need(torch.device("cuda"), layers=32, free=60 << 30, reserve=32))
    needless: Any = Need
    with pytest.raises(TypeError, match="layers"):
        needless(torch.device("cuda"), free=60 << 30, reserve=32)


def test_page_locked_memory_is_counted_as_it_is_taken() -> None:
    need = Need(torch.device("cuda"), layers=4, free=0, reserve=3)
    assert need.page_locked(1024 + 3, 4 * 512) == 4 * (1024 * 512 + 4 * 512)  # powers of two are taken as they are
    assert need.page_locked(1025 + 3, 4 * 512) == 4 * (2048 * 512 + 4 * 512)
    assert Need(torch.device("cuda"), layers=1, free=0).page_locked(100, 3) == 512
    free = psutil.virtual_memory().available
    with pytest.raises(ConfigError, match=r"page-locked host memory \(taken in powers of two\)"):
        HostTier().check(3, free // 2, Need(torch.device("cuda"), layers=1 << 10, free=10 << 30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver that gives it")
def test_page_locked_memory_that_the_driver_refuses_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"GiB of page-locked host memory cannot be had \(.+\): use a") as error:
        page_locked((2, 3), torch.float32)
    assert "\n" not in str(error.value)


def test_a_cache_larger_than_the_context_holds_the_context(caplog: pytest.LogCaptureFixture) -> None:
    """A note says this once, and the cache takes no more memory than the context."""
    caplog.set_level("INFO", "pqbench")
    tier = HostTier(cache_tokens=4096, cache_block=128)
    for tokens in (5000, 1000, 500):
        tier.check(tokens, 100)
    (note,) = caplog.messages
    assert note.startswith("store.cache_tokens is 4096, more than a context of 1000 tokens")
    held = {tokens: tier.cache_for(tokens) for tokens in (5000, 1000, 100)}
    assert {tokens: cache.tokens for tokens, cache in held.items() if cache} == {5000: 4096, 1000: 1000, 100: 128}
    assert HostTier().cache_for(1000) is None


@pytest.mark.parametrize("prompt", [20, 60])
def test_tokens_are_the_same_with_a_cache_larger_than_the_context(prompt: int) -> None:
    model, method = tiny_model("llama"), PQCache(Budget(sink=4, tokens=16), b=2)
    plain, cached = (Setting(HostTier("local", cache_tokens=tokens, cache_block=8)) for tokens in (0, 4096))
    ids = prompt_of(prompt)
    expected = generate(model, ids, method, max_new_tokens=12, setting=plain)
    assert torch.equal(generate(model, ids, method, max_new_tokens=12, setting=cached), expected)


def test_links_serve_the_device_they_are_made_for() -> None:
    with pytest.raises(ConfigError, match=r"store.link=local serves models on the CPU, not on cuda"):
        HostTier("local").open(torch.device("cuda"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"no CUDA device is available here: use store.link=local"):
            HostTier("cuda").open(CPU)


def test_a_debugged_placement_reports_what_nobody_waited_for() -> None:
    placement = HostTier(debug=True).open(CPU)
    placement.prompt(GrowingBuffer(rows(10)), GrowingBuffer(rows(10)))
    with pytest.raises(OrderingError, match="prompt rows to host"):
        placement.close()
