"""Predictions for the sample browser: as many as fit on the page, with some of every task."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from plots.report.load import Loaded
from plots.report.text import clip, facts, inert, name
from pqbench.records.file import Record
from pqbench.tables.kinds import has_scores

BYTES = 6_000_000  # of the embedded text
PREDICTION, REFERENCE, REFERENCES = 1200, 300, 5  # characters, characters, how many
PROMPT = 600  # characters from its end


@dataclass
class Sample:
    """One prompt and the answers of the runs."""

    place: tuple[str, str, str]  # benchmark, model, task
    sample: str
    references: list[Any]
    metadata: Any
    tail: str = ""  # the end of the prompt, from the first record that holds it
    answers: list[tuple[int, Record]] = field(default_factory=list)  # run, record


@dataclass(frozen=True)
class Browser:
    """The embedded data: JSON that is safe inside a script element, and how many of all samples it holds."""

    data: Markup
    samples: int
    of_samples: int
    answers: int
    of_answers: int


def browser(loaded: Loaded, limit: int = BYTES) -> Browser:
    """Samples that have a prediction or an error, taken in turn from every benchmark, model and task, up to
    ``limit``."""
    runs, samples = _collect(loaded)
    whole = sum(len(sample.answers) for sample in samples)
    labels = htmlsafe_json_dumps([_run(names) for names in runs], ensure_ascii=False)
    size, parts, answers = len(labels.encode()), [], 0
    for sample in _turns(samples):
        part = htmlsafe_json_dumps(_entry(sample), ensure_ascii=False, separators=(",", ":"))
        size += len(part.encode()) + 1
        if size > limit:
            break
        parts.append(part)
        answers += len(sample.answers)
    data = Markup('{"runs":%s,"samples":[%s]}') % (labels, Markup(",").join(parts))
    return Browser(data, len(parts), len(samples), answers, whole)


def _collect(loaded: Loaded) -> tuple[list[tuple[str, ...]], list[Sample]]:
    runs: dict[tuple[str, ...], int] = {}
    samples: dict[tuple[str, ...], Sample] = {}
    for record in loaded.records:
        said = isinstance(record.get("prediction"), str) or record["status"] != "ok"
        if not has_scores(record) or not said:
            continue
        benchmark, model, task = (name(record.get(key, "-")) for key in ("benchmark", "model", "task"))
        names = (benchmark, model, *(name(record.get(key, "-")) for key in ("method", "budget", "question", "key")))
        references = record.get("references")
        listed = references if isinstance(references, list) else [] if references is None else [references]
        # Prompts of other settings may have the same id; their references tell them apart.
        identity = (benchmark, model, task, record["sample_id"], repr(listed))
        sample = samples.setdefault(identity, Sample((benchmark, model, task), record["sample_id"], listed, {}))
        sample.metadata = sample.metadata or record.get("metadata")
        sample.tail = sample.tail or str(record.get("prompt_tail") or "")
        sample.answers.append((runs.setdefault(names, len(runs)), record))
    return list(runs), list(samples.values())


def _turns(samples: list[Sample]) -> Iterator[Sample]:
    groups: dict[tuple[str, str, str], deque[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.place, deque()).append(sample)
    waiting = deque(groups.values())
    while waiting:
        group = waiting.popleft()
        yield group.popleft()
        if group:
            waiting.append(group)


def _run(names: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(("benchmark", "model", "method", "budget", "question", "key"), names, strict=True))


def _entry(sample: Sample) -> dict[str, Any]:
    benchmark, model, task = sample.place
    references = [_cut(reference, REFERENCE) for reference in sample.references[:REFERENCES]]
    known = facts(sample.metadata) if isinstance(sample.metadata, dict) else {}
    return {
        "benchmark": benchmark,
        "model": model,
        "task": task,
        "id": name(sample.sample),
        "references": references,
        "prompt": inert(sample.tail[-PROMPT:]),
        "more": max(0, len(sample.references) - REFERENCES),
        "facts": dict(list(known.items())[:12]),
        "answers": [{"run": run} | _answer(record) for run, record in sample.answers],
    }


def _answer(record: Record) -> dict[str, Any]:
    """An answer as JSON; its names are short because every record has one."""
    text = record.get("prediction") if record["status"] == "ok" else record.get("error")
    known = {key: record.get(key) for key in ("score", "prompt_tokens", "new_tokens")}
    figures = {key: value for key, value in known.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {"status": name(record["status"])} | figures | _cut(text if text is not None else "", PREDICTION)


def _cut(text: object, limit: int) -> dict[str, Any]:
    clipped = clip(text, limit)
    return {"text": clipped.text} | ({"cut": clipped.cut} if clipped.cut else {})
