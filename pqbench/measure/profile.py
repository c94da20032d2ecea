"""What a torch profiler recorded of a run, phase by phase: launches, synchronisations, and time on the host and on the
device.

The phases are spans of :class:`pqbench.engine.clock.NamedClock`. A decode step consists of the phases select, fetch,
attend and append of every layer, and of the rest of the model. The phases before the decode steps are the prefill, the
method's observation of it, and building its index.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from pqbench.engine.clock import PREFIX
from pqbench.records.file import Record

STEP = "step"
REST = "rest of the model"
ONCE = ("prefill", "observe", "index")  # phases that happen once in a run; all others happen in every step
ORDER = (*ONCE, "select", "fetch", "attend", "append", REST)
TOKENS = 6  # generated in a profiled run, which leaves enough steps after the untypical first one
_RUNTIME = ("cuda_runtime", "cuda_driver")
_LAUNCHES = ("LaunchKernel", "GraphLaunch")
_WAITING_COPY = "cudaMemcpy"  # compared as a whole name, because cudaMemcpyAsync does not wait
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Event = Mapping[str, Any]
Result = TypeVar("Result")


@dataclass
class Phase:
    """Sums over one phase: operations that torch ran, launches, calls that waited for the device, seconds that the host
    spent in it, seconds that the device worked on what was launched in it, and bytes that crossed the link."""

    operations: float = 0.0
    launches: float = 0.0
    synchronisations: float = 0.0
    host_s: float = 0.0
    device_s: float = 0.0
    copied_bytes: float = 0.0

    def over(self, count: int) -> Phase:
        """The mean, if the sums are over ``count`` phases."""
        return Phase(**{name: value / count for name, value in asdict(self).items()})


def profiled(run: Callable[[], Result], path: Path, device: torch.device) -> Result:
    """Run something under the profiler and write its trace as gzipped JSON, which Perfetto and chrome://tracing can
    open."""
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        result = run()
        if on_gpu:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    return result


def read_trace(path: Path) -> list[Event]:
    """The events of a trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def phases(events: Sequence[Event]) -> dict[str, Phase]:
    """The sums of each phase by its name. Phases in :data:`ONCE` are given as they were. All others are means per step,
    without the first step if there are more. What a step does outside its phases is counted as :data:`REST`. If one
    phase lies inside another, its time counts only for the inner phase."""
    spans = [Span.of(event) for event in events if _named(event)]
    steps = sorted((span for span in spans if span.name == STEP), key=lambda span: span.began)
    first = steps[1].began if len(steps) > 1 else float("-inf")  # start of the steps that are counted
    kept = [span for span in spans if span.name in ONCE or span.began >= first]
    found: dict[str, Phase] = defaultdict(Phase)
    nesting = Nesting(kept)
    for span in kept:
        found[span.name].host_s += nesting.own_seconds(span)
    device = _by_correlation(events)
    covered: dict[Any, float] = defaultdict(lambda: float("-inf"))  # by thread, the end of the last operation counted
    for event in sorted(events, key=lambda event: float(event.get("ts", 0.0))):
        inside = nesting.innermost(event.get("tid"), float(event.get("ts", 0.0)))
        if inside is not None:
            _count(found[inside.name], event, device, covered)
    count = max(1, len(steps) - 1)
    named = {REST if name == STEP else name: phase for name, phase in found.items()}
    return {name: phase if name in ONCE else phase.over(count) for name, phase in named.items()}


def profile_facts(found: Mapping[str, Phase], figures: Record) -> dict[str, Record]:
    """The phases for a record. If the ``figures`` of the same record say how many bytes a phase reads or moves, these
    bytes are added. For phases that do not use the link, the fewest seconds that memory needs for the bytes are added
    too."""
    known = {"select": "index_bytes", "attend": "attended_bytes", REST: "weight_bytes", "fetch": "link_bytes_step"}
    facts: dict[str, Record] = {}
    for name in sorted(found, key=ORDER.index):
        facts[name] = {field: round(value, 9) for field, value in asdict(found[name]).items()}
        size = figures.get(known.get(name, ""))
        if size:
            facts[name]["bytes"] = size
            if name != "fetch":  # fetched bytes cross the link
                facts[name]["memory_s"] = size / (1e9 * figures["copy_bandwidth_gbps"])
    return facts


@dataclass(frozen=True)
class Span:
    """A named span of one thread, in microseconds."""

    name: str
    thread: Any
    began: float
    ended: float

    @classmethod
    def of(cls, event: Event) -> Span:
        """The span of an event of a trace."""
        name, began = str(event["name"]).removeprefix(PREFIX), float(event["ts"])
        return cls(name, event.get("tid"), began, began + float(event.get("dur", 0.0)))


class Nesting:
    """How the spans of each thread are nested."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._inner: dict[Any, list[tuple[float, Span | None]]] = {}  # by thread: when the innermost span changes
        self._children: dict[int, float] = defaultdict(float)
        by_thread: dict[Any, list[Span]] = defaultdict(list)
        for span in spans:
            by_thread[span.thread].append(span)
        for thread, listed in by_thread.items():
            self._inner[thread] = self._changes(sorted(listed, key=lambda span: (span.began, -span.ended)))

    def innermost(self, thread: Any, moment: float) -> Span | None:
        """The innermost span of a thread at a moment; None outside all spans."""
        changes = self._inner.get(thread, [])
        place = bisect_right(changes, moment, key=lambda change: change[0])
        return changes[place - 1][1] if place else None

    def own_seconds(self, span: Span) -> float:
        """Seconds of a span without those of the spans inside it."""
        return (span.ended - span.began - self._children[id(span)]) / 1e6

    def _changes(self, listed: Sequence[Span]) -> list[tuple[float, Span | None]]:
        changes: list[tuple[float, Span | None]] = []
        open_: list[Span] = []
        for span in [*listed, None]:
            while open_ and (span is None or open_[-1].ended <= span.began):
                ended = open_.pop()
                changes.append((ended.ended, open_[-1] if open_ else None))
            if span is not None:
                if open_:
                    self._children[id(open_[-1])] += span.ended - span.began
                open_.append(span)
                changes.append((span.began, span))
        return changes


def _named(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and str(event.get("name", "")).startswith(PREFIX)


def _by_correlation(events: Iterable[Event]) -> dict[Any, list[Event]]:
    """The events on the device, by the number of the call that launched them."""
    found: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _DEVICE:
            found[event.get("args", {}).get("correlation")].append(event)
    return found


def _count(phase: Phase, event: Event, device: Mapping[Any, list[Event]], covered: dict[Any, float]) -> None:
    """Add one event of the host to the phase in which it lies."""
    category, name = event.get("cat"), str(event.get("name", ""))
    if category == "cpu_op":
        began, thread = float(event["ts"]), event.get("tid")
        if began >= covered[thread]:  # otherwise the operation is part of another one
            covered[thread] = began + float(event.get("dur", 0.0))
            phase.operations += 1
    elif category in _RUNTIME:
        phase.launches += any(part in name for part in _LAUNCHES)
        phase.synchronisations += "Synchronize" in name or name == _WAITING_COPY
        for work in device.get(event.get("args", {}).get("correlation"), []):
            phase.device_s += float(work.get("dur", 0.0)) / 1e6
            if work.get("cat") == "gpu_memcpy" and "DtoD" not in str(work.get("name", "")):
                phase.copied_bytes += float(work.get("args", {}).get("bytes", 0))
