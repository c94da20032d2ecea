"""One page about all results: what was wrong, which targets were met, and where the details are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucheck.plan import STEPS
from gpucheck.result import read_json
from gpucheck.targets import TARGETS, Verdict

_MARK = {True: "met", False: "missed", None: "not measured"}


@dataclass(frozen=True)
class Summary:
    """The page as text and as JSON; ``wrong`` holds a line for every fault."""

    text: str
    content: dict[str, Any]
    wrong: list[str]


def summarise(folder: Path) -> Summary:
    """Sum up the results in ``folder``, those of earlier runs included."""
    results = [content for step in STEPS if (content := read_json(folder / step.file))]
    machine = results[0]["machine"] if results else {}
    wrong = [line for content in results for line in errors_of(content)]
    counted = [target.judge(results) for target in TARGETS] if machine.get("counts") else []
    lines = [
        "# gpu-check",
        "",
        _machine(machine),
        "",
        "| step | what | status | seconds | |",
        "|---|---|---|---|---|",
        *(_table_row(content) for content in results),
        "",
        *_wrong(wrong),
        *_targets(counted, machine),
        *_figures(results),
    ]
    content = {
        "machine": machine,
        "wrong": wrong,
        "targets": [verdict.facts() for verdict in counted],
        "steps": [{key: value for key, value in c.items() if key not in ("rows", "machine")} for c in results],
    }
    return Summary("\n".join(lines).rstrip() + "\n", content, wrong)


def errors_of(content: Mapping[str, Any]) -> list[str]:
    """The faults in one result. If a step only measures, it is not a fault that it ran out of time. In a run whose
    figures do not count it is one, since the only purpose of such a run is that every step finishes."""
    label = f"step {content['step']} {content['name']}"
    found = [
        f"{label}: {row['name']}: {row.get('error') or figures_of(row)}"
        for row in content["rows"]
        if row["ok"] is False
    ]
    wrong = {"failed"}
    if not content["machine"].get("counts", True):
        wrong |= {"timeout", "skipped"}
    elif next(step.proves for step in STEPS if step.number == content["step"]):
        wrong |= {"timeout"}
    if not found and content["status"] in wrong:
        found.append(f"{label}: {content['message']}")
    return found


def line_of(content: Mapping[str, Any]) -> str:
    """One result in one line."""
    right = sum(row["ok"] is True for row in content["rows"])
    counts = f"{right} right, {len(errors_of(content))} wrong, {sum(r['ok'] is None for r in content['rows'])} figures"
    note = _cell(content["message"])[:300]
    return f"step {content['step']} {content['name']}: {content['status']} in {content['seconds']:.0f} s; {counts}" + (
        f"; {note}" if note else ""
    )


def _machine(machine: Mapping[str, Any]) -> str:
    shown = ("device", "driver", "cuda", "torch", "triton", "transformers", "python", "cores", "commit")
    return ", ".join(f"{name} {machine[name]}" for name in shown if machine.get(name)) or "no machine on record"


def _table_row(content: Mapping[str, Any]) -> str:
    return (
        f"| {content['step']} | {content['title']} | {content['status']} | {content['seconds']:.0f} | "
        f"{_cell(content['message'])[:200]} |"
    )


def _wrong(wrong: Sequence[str]) -> list[str]:
    return ["Nothing was wrong.", ""] if not wrong else ["## Wrong", "", *(f"- {_cell(line)}" for line in wrong), ""]


def _targets(verdicts: Sequence[Verdict], machine: Mapping[str, Any]) -> list[str]:
    if not verdicts:
        return [f"Targets are for a GPU at full size, and say nothing of {machine.get('device', 'this machine')}.", ""]
    rows = [f"| {v.name} | {v.wanted} | {v.measured or '-'} | {_MARK[v.met]} |" for v in verdicts]
    return ["## Targets", "", "| | wanted | measured | |", "|---|---|---|---|", *rows, ""]


def _figures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of every step, a line each."""
    lines = []
    for content in results:
        rows = [row for row in content["rows"] if row["ok"] is None and figures_of(row)]
        if rows:
            lines += [f"## Step {content['step']}: {content['title']}", ""]
            lines += [f"- {_cell(row['name'])}: {figures_of(row)}" for row in rows] + [""]
    return lines


def figures_of(row: Mapping[str, Any]) -> str:
    """The figures of a row that the summary shows: those named in ``shown``, otherwise all that are short."""
    named = row.get("shown")
    hidden = {"name", "ok", "shown", "traceback", "facts"}
    pairs = [(key, row[key]) for key in (named or [key for key in row if key not in hidden]) if key in row]
    return _cell(", ".join(f"{key} {_number(value)}" for key, value in pairs if value is not None))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "/")
