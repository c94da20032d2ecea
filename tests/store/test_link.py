"""Links: transfers run beside the caller, in order, are counted and take the modelled time; poison shows early
reads."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqbench.errors import ConfigError
from pqbench.kernels.buffers import gather_rows
from pqbench.store.link import emulated as link_emulated
from pqbench.store.link.base import Copy, Direction, Link, OrderingError, poison, poisoned
from pqbench.store.link.cuda import CudaLink
from pqbench.store.link.emulated import PRESETS, Clock, EmulatedLink, Speed, speed
from pqbench.store.link.local import LocalLink

PATIENCE = 30.0  # seconds after which a test gives up
LINKS = [LocalLink, lambda debug=False: EmulatedLink(PRESETS["pcie4"], debug)]


@dataclass(frozen=True)
class HeldCopy(Copy):
    """A copy that reports its start, and continues only when the test allows it."""

    started: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    log: list[str] = field(default_factory=list)

    def run(self) -> None:
        self.started.set()
        assert self.go_on.wait(PATIENCE)
        super().run()
        self.log.append("held")


@dataclass(frozen=True)
class LoggedCopy(Copy):
    """A copy that notes when it runs, or fails."""

    log: list[str] = field(default_factory=list)
    error: str | None = None

    def run(self) -> None:
        if self.error:
            raise OSError(self.error)
        super().run()
        self.log.append("logged")


def test_a_transfer_runs_beside_the_caller() -> None:
    with LocalLink() as link:
        copy = HeldCopy(torch.ones(3), torch.zeros(3))
        transfer = link.submit([copy], Direction.TO_HOST)
        assert copy.started.wait(PATIENCE)  # it has begun, and the caller is here
        assert not transfer.done
        assert torch.equal(copy.target, torch.zeros(3))
        copy.go_on.set()
        transfer.wait()
        assert transfer.done
        assert torch.equal(copy.target, torch.ones(3))


def test_one_direction_keeps_its_order_and_does_not_hold_up_the_other() -> None:
    with LocalLink() as link:
        log: list[str] = []
        held = HeldCopy(torch.ones(3), torch.zeros(3), log=log)
        first = link.submit([held], Direction.TO_HOST)
        second = link.submit([LoggedCopy(torch.ones(3), torch.zeros(3), log=log)], Direction.TO_HOST)
        assert held.started.wait(PATIENCE)
        other = link.submit([LoggedCopy(torch.ones(3), torch.zeros(3))], Direction.TO_DEVICE)
        other.wait()
        assert (first.done, second.done, log) == (False, False, [])
        held.go_on.set()
        second.wait()
        assert first.done
        assert log == ["held", "logged"]


def test_a_wait_runs_what_nobody_has_begun() -> None:
    with LocalLink() as link:
        target = torch.zeros(3)
        link.submit([Copy(torch.ones(3), target)], Direction.TO_HOST, urgent=True).wait()
        assert torch.equal(target, torch.ones(3))


@pytest.mark.parametrize("make", LINKS)
def test_a_failure_reaches_whoever_waits_and_nobody_else(make: Any) -> None:
    with make() as link:
        broken = link.submit([LoggedCopy(torch.ones(3), torch.zeros(3), error="unplugged")], Direction.TO_HOST)
        target = torch.zeros(3)
        link.to_host(torch.ones(3), target).wait()
        assert torch.equal(target, torch.ones(3))
        with pytest.raises(OSError, match="unplugged"):
            broken.wait()


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 12)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    st.booleans(),
    st.integers(0, 999),
)
def test_gather_brings_the_rows_asked_for(
    shape: tuple[int, int, int, int], dtype: torch.dtype, strided: bool, seed: int
) -> None:
    batch, heads, size, count = shape
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 200, (batch, heads, size, 2, 4), generator=generator).to(dtype)
    rows = torch.randint(0, size, (batch, heads, count), generator=generator)
    target = torch.zeros(batch, heads, count, 2, 8 if strided else 4, dtype=dtype)[..., :4]
    for debug in (False, True):
        with LocalLink(debug) as link:
            link.gather(source, rows, target.zero_()).wait()
            assert torch.equal(target, gather_rows(source, rows))
            assert (link.meters.to_device, link.meters.to_host) == (target.numel() * target.element_size(), 0)


def test_bytes_and_waits_are_counted() -> None:
    with LocalLink() as link:
        link.to_host(torch.ones(5), torch.zeros(5)).wait()
        link.to_device(torch.ones(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)).wait()
        assert (link.meters.to_host, link.meters.to_device) == (20, 2)
        waited = link.meters.seconds_waited
        held = HeldCopy(torch.ones(3), torch.zeros(3))
        transfer = link.submit([held], Direction.TO_HOST)
        assert held.started.wait(PATIENCE)
        threading.Timer(0.02, held.go_on.set).start()
        transfer.wait()
        assert link.meters.seconds_waited - waited > 0


def test_threads_end_with_their_link() -> None:
    before = threading.active_count()
    link = LocalLink()
    link.to_host(torch.ones(5), torch.zeros(5)).wait()
    threads = [t for t in threading.enumerate() if t.name.startswith("link")]
    assert threads
    link.close()
    dropped = LocalLink()
    dropped.to_device(torch.ones(5), torch.zeros(5)).wait()
    threads = [t for t in threading.enumerate() if t.name.startswith("link")]
    del dropped
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
    assert threading.active_count() <= before


def test_an_emulated_transfer_takes_its_time_without_burning_any() -> None:
    with EmulatedLink(Speed("slow", 1e7, 0.01)) as link:
        source, target = torch.ones(250_000), torch.zeros(250_000)  # 1 MB: 0.1 s
        began, burned = time.perf_counter(), time.process_time()
        transfer = link.to_host(source, target)
        assert not transfer.done
        transfer.wait()
        assert time.perf_counter() - began >= 0.11
        assert time.process_time() - burned < 0.055
        assert transfer.done
        assert torch.equal(source, target)
        assert link.meters.seconds_waited > 0.05


def test_emulated_transfers_of_one_direction_queue() -> None:
    with EmulatedLink(Speed("slow", 1e9, 0.01)) as link:
        began = time.perf_counter()
        transfers = [link.to_device(torch.ones(1), torch.zeros(1)) for _ in range(8)]
        transfers[-1].wait()
        assert time.perf_counter() - began >= 0.08
        assert all(transfer.done for transfer in transfers)


class FakeTime:
    """A clock that advances only in sleeps, which always take 60 us too long."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + 60e-6


def test_oversleeping_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime()
    monkeypatch.setattr(link_emulated, "time", fake)
    clock = Clock(Speed("x", 1e9, 50e-6))
    began = fake.now
    for _ in range(200):
        end = clock.book(Direction.TO_DEVICE, 50_000)  # 100 us
        clock.sleep_until(end, fake.now, fake.now)
        assert fake.now >= end
        fake.now += 30e-6  # computing
    elapsed = fake.now - began
    assert 200 * 100e-6 <= elapsed <= 200 * 130e-6 + 61e-6


def test_directions_have_queues_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_emulated, "time", FakeTime())
    clock = Clock(Speed("x", 1e9, 1e-3))
    ends = [clock.book(direction, 0) for direction in (*Direction, *Direction)]
    assert ends == pytest.approx([1000.001, 1000.001, 1000.002, 1000.002])


def test_speeds_by_name_and_by_number() -> None:
    assert PRESETS["pcie4"].seconds(24_600_000) == pytest.approx(1e-3 + 10e-6)
    assert speed("pcie3") is PRESETS["pcie3"]
    assert (speed("20GB/s").bandwidth, speed("20 GB/s").latency) == (20e9, pytest.approx(10e-6))
    assert speed("0.5GB/s + 2.5us").latency == pytest.approx(2.5e-6)
    assert EmulatedLink(PRESETS["pcie4"]).label == "emulated PCIe 4.0 x16"
    for name in ("pcie9", "0GB/s", "fast", ""):
        with pytest.raises(ConfigError, match="pcie3, pcie4, pcie5"):
            speed(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_cuda_link_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r"no CUDA device is available here: use store.link=local") as error:
        CudaLink(torch.device("cuda"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", LINKS)
def test_poison_shows_a_read_before_the_wait(make: Any) -> None:
    with make(debug=True) as link:
        source, target = torch.ones(2, 3), torch.zeros(2, 3)
        transfer = link.to_device(source, target)
        assert poisoned(target)
        assert not transfer.done
        transfer.wait()
        transfer.wait()
        assert torch.equal(target, source)


@pytest.mark.parametrize("make", LINKS)
def test_poison_catches_a_source_that_is_overwritten_too_early(make: Any) -> None:
    link: Link = make(debug=True)
    source, target = torch.ones(2, 3), torch.zeros(2, 3)
    transfer = link.to_host(source, target, "new rows")
    source[0, 0] = 2
    with pytest.raises(OrderingError, match="new rows to host: the source was overwritten"):
        transfer.wait()
    link.close()


def test_poison_catches_a_target_that_is_written_too_early() -> None:
    link = LocalLink(debug=True)
    for target in (torch.zeros(3), torch.zeros(3, dtype=torch.uint8)):
        transfer = link.to_device(torch.ones(3).to(target.dtype), target, "blocks")
        target[1] = 5
        with pytest.raises(OrderingError, match="blocks to device: the target was written to"):
            transfer.wait()
    link.close()


def test_a_debugged_gather_checks_only_the_rows_it_reads() -> None:
    link = LocalLink(debug=True)
    source, target = torch.arange(8.0).view(1, 1, 8, 1), torch.zeros(1, 1, 2, 1)
    transfer = link.gather(source, torch.tensor([[[1, 6]]]), target)
    source[0, 0, 3] = -1
    transfer.wait()
    assert target.flatten().tolist() == [1, 6]
    transfer = link.gather(source, torch.tensor([[[1, 6]]]), target)
    source[0, 0, 6] = -1
    with pytest.raises(OrderingError):
        transfer.wait()
    link.close()


def test_a_transfer_nobody_waits_for_is_reported() -> None:
    link = LocalLink(debug=True)
    link.to_host(torch.ones(3), torch.zeros(3), "new rows")
    link.to_host(torch.ones(3), torch.zeros(3), "blocks").wait()
    with pytest.raises(OrderingError, match="1 transfers were never waited for: new rows to host"):
        link.close()
    link.close()


def test_every_transfer_nobody_waits_for_is_counted_though_nobody_holds_it() -> None:
    link = LocalLink(debug=True)
    for _ in range(20):
        link.to_host(torch.ones(3), torch.zeros(3), "rows")
        link.to_host(torch.ones(3), torch.zeros(3), "blocks").wait()
    with pytest.raises(OrderingError, match="20 transfers were never waited for: rows to host"):
        link.close()
    link.close()


def test_an_error_is_not_hidden_by_the_transfers_it_left_behind() -> None:
    def fail() -> None:
        with LocalLink(debug=True) as link:
            link.to_host(torch.ones(3), torch.zeros(3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_poison_is_what_poisoned_looks_for() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        rows = torch.zeros(4, dtype=dtype)
        assert not poisoned(rows)
        assert poisoned(poison(rows))


def test_links_work_inside_inference_mode_and_out() -> None:
    with torch.inference_mode():
        target, source = torch.zeros(3), torch.ones(3)
    with LocalLink() as link:
        link.to_device(source, target).wait()
        link.gather(torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2)).wait()
    assert target.tolist() == [1, 1, 1]
