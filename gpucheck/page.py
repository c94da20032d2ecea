"""``python -m gpucheck.page > docs/results/gpu.md``: a page of all recorded runs on a GPU.

It reads the results of ``make gpu-check`` and, in the folder beside them, the records of ``benchmark=latency`` and
``benchmark=attention`` that a GPU made. The page says which steps were never run. Checks on the CPU are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucheck.options import ROOT
from gpucheck.plan import STEPS, Step
from gpucheck.result import read_json
from gpucheck.summary import errors_of, figures_of
from gpucheck.targets import TARGETS
from pqbench.records.file import Record, read_all
from pqbench.tables.kinds import has_scores, sections
from pqbench.tables.section import Section
from pqbench.terminal import markdown_table

NOT_YET = "not yet run"
NOTHING = "Nothing of this has run on a GPU yet."
MACHINE = ("device", "driver", "cuda", "torch", "triton", "transformers", "python", "commit")
_MET = {True: "met", False: "missed", None: "not measured"}


@dataclass(frozen=True)
class OnGpu:
    """The results that come from a GPU: of the steps, by number, and the timing records."""

    steps: Mapping[int, dict[str, Any]]
    records: Sequence[Record]

    @classmethod
    def read(cls, results: Path) -> OnGpu:
        """Read a results folder, such as the checkout's own."""
        found = {step.number: read_json(results / "gpu" / step.file) for step in STEPS}
        steps = {number: content for number, content in found.items() if content.get("machine", {}).get("capability")}
        records = read_all(results) if results.is_dir() else []
        timed = [record for record in records if not has_scores(record)]
        return cls(steps, [record for record in timed if _of_a_gpu(record)])

    def status(self, step: Step) -> str:
        """How a step ended, in a word or two, with the numbers of right and wrong comparisons if it made any."""
        content = self.steps.get(step.number)
        if content is None:
            return NOT_YET
        right, wrong = sum(row["ok"] is True for row in content["rows"]), len(errors_of(content))
        counted = [f"{right} right"] * bool(right) + [f"{wrong} wrong"] * bool(wrong)
        return ", ".join([str(content["status"]), *counted])


def main() -> int:
    """Write the page to stdout. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpucheck.page", description="results on a GPU as markdown")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "results", help="folder of all results")
    options = parser.parse_args()
    sys.stdout.write(page(OnGpu.read(options.results)))
    return 0


def overview(found: OnGpu) -> str:
    """A table with a row for each step, and the machine above it."""
    rows = [[f"{step.number} {step.name}", step.title, found.status(step)] for step in STEPS]
    said = "\n".join(f"- {machine}" for machine in machines(found)) if found.steps else NOTHING
    return f"{said}\n\n{markdown_table(['step', 'what it finds out', 'on a GPU'], rows, 3)}"


def page(found: OnGpu) -> str:
    """The whole page."""
    lines = [
        "# Results on a GPU",
        "",
        "Made from the records by `python -m gpucheck.page > docs/results/gpu.md`; `make gpu-check` makes the records.",
        "",
        overview(found),
        "",
        "## Targets",
        "",
        *_targets(found),
    ]
    for step in STEPS:
        lines += ["", f"## Step {step.number}: {step.title}", "", *_step(found, step)]
    lines += ["", "## Seconds", "", *_seconds(found)]
    return "\n".join(lines) + "\n"


def machines(found: OnGpu) -> list[str]:
    """A line for every machine on record, with the time of its last result."""
    latest: dict[str, str] = {}
    for content in found.steps.values():
        facts = content["machine"]
        named = ", ".join(f"{name} {facts[name]}" for name in MACHINE if facts.get(name))
        latest[named] = max(latest.get(named, ""), str(content.get("finished", "")))
    return [f"{named}; {when}" for named, when in latest.items()] or [f"No GPU: {NOT_YET}."]


def _of_a_gpu(record: Record) -> bool:
    """Whether a GPU made a record: it then holds the memory of that GPU, or says that a back-end that exists only on a
    GPU was refused."""
    return record.get("cuda_peak_bytes") is not None or record["status"] == "refused"


def _targets(found: OnGpu) -> list[str]:
    """The table of targets; only runs of full size count."""
    counted = [content for content in found.steps.values() if content["machine"].get("counts")]
    if not counted:
        return [f"One H100, a model of Llama-3.1-8B's shape, bfloat16, one sequence: {NOT_YET}."]
    verdicts = [target.judge(counted) for target in TARGETS]
    rows = [[verdict.name, verdict.wanted, verdict.measured or "-", _MET[verdict.met]] for verdict in verdicts]
    return [markdown_table(["target", "wanted", "measured", ""], rows, 1)]


def _step(found: OnGpu, step: Step) -> list[str]:
    content = found.steps.get(step.number)
    if content is None:
        return [f"{NOT_YET.capitalize()}."]
    said = f": {content['message']}" if content.get("message") else ""
    lines = [f"{found.status(step)}, in {content['seconds']:.0f} s{said}"]
    wrong = [f"- {line}" for line in errors_of(content)]
    shown = [(row["name"], figures_of(row)) for row in content["rows"] if row["ok"] is None]
    figures = [f"- {name}: {text}" for name, text in shown if text]
    return lines + ([""] if wrong or figures else []) + wrong + figures


def _seconds(found: OnGpu) -> list[str]:
    """The tables of ``benchmark=attention`` and ``benchmark=latency``."""
    tables = sections(found.records)
    if not tables:
        return [f"`benchmark=latency` and `benchmark=attention`: {NOT_YET}."]
    return [line for table in tables for line in (*_table(table), "")][:-1]


def _table(section: Section) -> list[str]:
    return [f"### {section.title}", "", markdown_table(section.headings, section.rows, section.labels)]


if __name__ == "__main__":
    sys.exit(main())
