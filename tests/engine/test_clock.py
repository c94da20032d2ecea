"""Spans of device time: nothing waits before a sum is read, and only few events are pending however long the run."""

from __future__ import annotations

import time

import pytest
import torch

from pqbench.engine.clock import SAMPLED, EventClock, HostClock, Spans, clock_of, streams_of
from tests.engine.streams import Streams

CPU = torch.device("cpu")


def test_nothing_waits_before_a_sum_is_read() -> None:
    streams = Streams()
    spans = Spans(EventClock(streams, CPU))
    for _ in range(10):
        with spans:
            streams.event(timed=True).record(streams.current(CPU))  # something takes a millisecond
    assert not [entry for entry in streams.log if entry[0] == "synchronises"]
    assert spans.total == pytest.approx(10 * 2e-3)
    assert [entry for entry in streams.log if entry[0] == "synchronises"]


def test_spans_are_listed_in_order() -> None:
    streams = Streams()
    spans = Spans(EventClock(streams, CPU), listed=True)
    for count in range(100):
        with spans:
            for _ in range(count):
                streams.event(timed=True).record(streams.current(CPU))
    assert spans.each == pytest.approx([(count + 1) * 1e-3 for count in range(100)])
    assert spans.each == spans.each
    assert spans.total == pytest.approx(sum(spans.each))


def test_a_long_run_keeps_few_events_and_never_waits() -> None:
    streams = Streams(lag=40)  # the device is 20 spans behind
    spans = Spans(EventClock(streams, CPU))
    for _ in range(100_000):
        with spans:
            pass
    assert streams.made <= 200
    assert spans.total == pytest.approx(100.0)


def test_a_device_that_is_far_behind_is_not_waited_for() -> None:
    streams = Streams()  # it has passed nothing
    spans = Spans(EventClock(streams, CPU))
    for _ in range(1000):
        with spans:
            pass
    assert not [entry for entry in streams.log if entry[0] == "synchronises"]
    assert spans.total == pytest.approx(1.0)


def test_the_hosts_clock_is_the_wall_clock() -> None:
    spans = Spans(HostClock(), listed=True)
    for seconds in (0.02, 0.05):
        with spans:
            time.sleep(seconds)
    assert spans.each[0] >= 0.02
    assert spans.each[1] >= 0.05
    assert spans.total == sum(spans.each)


def test_a_span_ends_where_its_work_fails() -> None:
    spans = Spans(HostClock(), listed=True)
    with pytest.raises(ValueError, match="broken"), spans:
        raise ValueError("broken")
    assert len(spans.each) == 1


def test_every_step_is_sampled_on_the_host_and_few_where_that_takes_time() -> None:
    assert all(HostClock().samples(step) for step in range(20))
    clock = EventClock(Streams(), CPU)
    assert [step for step in range(40) if clock.samples(step)] == [1 + SAMPLED * i for i in range(5)]
    assert all(EventClock(Streams(), CPU, every=1).samples(step) for step in range(20))


def test_a_device_without_streams_has_the_hosts_clock() -> None:
    assert streams_of(CPU) is None
    assert isinstance(clock_of(CPU), HostClock)
    given = Streams()
    assert streams_of(CPU, given) is given
    assert isinstance(clock_of(CPU, given), EventClock)
