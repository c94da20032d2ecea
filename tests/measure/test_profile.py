"""Profiles: the sums by phase of a trace that was written by hand, and of the trace of a real run on the CPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.full import Full
from methods.pqcache import PQCache
from pqbench.engine.clock import PREFIX, HostClock, NamedClock, Spans, clock_of
from pqbench.errors import ConfigError
from pqbench.measure import latency
from pqbench.measure.latency import Latency
from pqbench.measure.profile import REST, phases, profile_facts, read_trace
from pqbench.method import Budget, Method
from pqbench.models.sources import LoadedModel
from pqbench.tables.kinds import sections
from tests.measure.conftest import Run

SMALL: dict[str, Any] = {"contexts": [160], "new_tokens": 6, "repeats": 2, "warmup": 0, "profile": True}
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQCache(Budget(ratio=0.5), m=2, b=4)}


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def span(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return event("user_annotation", PREFIX + name, ts, dur, tid)


def test_a_trace_is_summed_by_phase() -> None:
    """Times are in microseconds. A first step does not count; then there are two steps of two layers each."""
    events = [span("prefill", 0, 100), span("observe", 10, 20)]
    events.append(event("cuda_runtime", "cudaLaunchKernel", 15, 1, correlation=1))
    events.append(event("kernel", "k", 500, 7, 99, correlation=1))  # in "observe", whenever the device gets to it
    for number, start in enumerate((1000.0, 2000.0, 3000.0)):
        events.append(span("step", start, 100))
        for layer in (10.0, 50.0):
            at = start + layer
            events += [span("select", at, 10), span("attend", at + 20, 6)]
            events += [
                event("cpu_op", "aten::outer", at + 1, 5),
                event("cpu_op", "aten::inner", at + 2, 1),
                event("cuda_driver", "cuLaunchKernelEx", at + 3, 1, correlation=10 * number + layer),
                event("kernel", "k", at + 30, 4, 99, correlation=10 * number + layer),
                event("cuda_runtime", "cudaStreamSynchronize", at + 21, 2),
            ]
        copy = 1000 + number
        events += [
            event("cuda_runtime", "cudaMemcpyAsync", start + 90, 1, correlation=copy),
            event("gpu_memcpy", "Memcpy HtoD", start + 95, 3, 99, correlation=copy, bytes=2048),
        ]
    found = phases(events)
    assert set(found) == {"prefill", "observe", "select", "attend", REST}
    assert found["prefill"].host_s == pytest.approx(80e-6)
    assert (found["observe"].host_s, found["observe"].launches) == (pytest.approx(20e-6), 1)
    assert found["observe"].device_s == pytest.approx(7e-6)
    select, attend, rest = found["select"], found["attend"], found[REST]
    assert (select.launches, select.operations, select.synchronisations) == (2, 2, 0)
    assert (select.host_s, select.device_s) == (pytest.approx(20e-6), pytest.approx(8e-6))
    assert (attend.launches, attend.synchronisations, attend.host_s) == (0, 2, pytest.approx(12e-6))
    assert (rest.host_s, rest.copied_bytes, rest.launches) == (pytest.approx(68e-6), 2048, 0)


def test_other_threads_belong_to_no_phase() -> None:
    events = [span("step", 0, 100), span("step", 200, 100), event("cpu_op", "aten::add", 210, 1, tid=2)]
    assert phases(events)[REST].operations == 0


def test_bytes_are_held_against_the_bandwidth_of_memory() -> None:
    events = [span("step", 0, 100), span("step", 200, 100), span("select", 210, 5), span("fetch", 220, 5)]
    figures = {"index_bytes": 10**9, "weight_bytes": 0, "link_bytes_step": 10**6, "copy_bandwidth_gbps": 100.0}
    facts = profile_facts(phases(events), figures)
    assert list(facts) == ["select", "fetch", REST]
    assert facts["select"]["memory_s"] == pytest.approx(0.01)
    assert (facts["fetch"]["bytes"], "memory_s" in facts["fetch"]) == (10**6, False)


def test_without_a_profiler_phases_bear_no_names() -> None:
    assert type(clock_of(torch.device("cpu")).spans("select")) is Spans
    named = clock_of(torch.device("cpu"), named=True)
    assert isinstance(named, NamedClock)
    assert all(named.samples(step) for step in range(5))
    with named.spans("select") as _:
        pass
    assert isinstance(HostClock().mark(), float)


def test_a_profiled_run_has_its_phases_and_a_trace(measure: Run, loaded: LoadedModel, tmp_path: Path) -> None:
    done, records = measure(Latency(**SMALL), METHODS, loaded)
    assert (done.measured, done.failures) == (4, [])
    assert ["profile" in record for record in records] == [True, False] * 2  # once for every method and prompt
    for record in (records[0], records[2]):
        found = record["profile"]
        assert list(found) == ["prefill", "observe", "index", "select", "fetch", "attend", "append", REST]
        assert all(phase["launches"] == phase["synchronisations"] == 0 for phase in found.values())
        [path] = [path for path in tmp_path.rglob(record["trace"]) if record["method"] in path.parent.name]
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [e for e in events if e.get("name") == f"{PREFIX}step"]
        assert len(steps) == 5
        spent = sum(e["dur"] for e in sorted(steps, key=lambda e: e["ts"])[1:]) / 4 / 1e6
        parts = sum(found[name]["host_s"] for name in ("select", "fetch", "attend", "append", REST))
        assert parts == pytest.approx(spent, rel=1e-6)  # nothing is counted twice, nothing is lost
        layers = [e for e in events if e.get("name") == f"{PREFIX}attend"]
        assert len(layers) == 5 * 2
    assert records[2]["profile"]["index"]["host_s"] > 0
    assert records[2]["profile"]["select"]["bytes"] == records[2]["index_bytes"]
    [table] = [section for section in sections(records) if "profiler" in section.title]
    assert len(table.rows) == 2 * 8


def test_a_profile_that_fails_costs_no_measurement(
    measure: Run, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(latency, "profiled", broken)
    done, records = measure(Latency(**{**SMALL, "repeats": 1}), METHODS, loaded)
    assert (done.measured, done.failures) == (2, [])
    assert {record["profile_error"] for record in records} == {"RuntimeError: no profiler here"}


def test_profile_is_yes_or_no() -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.profile is 3: use true or false"):
        Latency(profile=3)  # type: ignore[arg-type]


def test_traces_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [span("step", 0, 1)]}).encode()))
    assert read_trace(path) == [span("step", 0, 1)]
