"""Benchmarks of pqbench, run by their ordinary command, and the figures in their records."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucheck.options import Options
from gpucheck.process import Ended, run
from gpucheck.result import Result
from pqbench.records.file import Record, read_all

LONG = ("steps", "steps_s")  # fields with a number for every step, which stay in the records


@dataclass(frozen=True)
class Measured:
    """One run of ``python -m pqbench``: how it ended, its records, and their folder."""

    ended: Ended
    records: list[Record]
    folder: Path


def measure(options: Options, label: str, overrides: Sequence[str], seconds: float) -> Measured:
    """Run ``python -m pqbench`` for at most this many seconds. Its records get a folder of their own, so that records
    of earlier runs are not used. Finished measurements count even if the run did not end."""
    name = f"{label.replace(' ', '_').replace(',', '')}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    folder = options.folder / "records" / name
    command = [sys.executable, "-W", "ignore", "-m", "pqbench", *overrides, f"results={folder}"]
    ended = run(command, seconds, options.folder / "logs" / f"{name}.log")
    return Measured(ended, read_all(folder) if folder.is_dir() else [], folder)


def report(result: Result, measured: Measured, label: str, expected: int, figures: Sequence[str], **facts: Any) -> None:
    """Add a row for every record, and one for missing records. A failed measurement is wrong; too little memory or time
    is not. ``figures`` are the fields that the summary shows."""
    for record in measured.records:
        kept = {key: value for key, value in record.items() if key not in LONG and key != "name"}
        name = f"{label}: {record['method']} {record['sample_id']}"
        wrong = record["status"] == "error"
        result.row(name, False if wrong else None, **{**kept, **facts, **derived(record)}, shown=["error", *figures])
    missing = expected - len(measured.records)
    if measured.ended.code is None:
        result.row(f"{label}: out of time", timeout=f"{measured.ended.seconds:.0f} s", records_missing=missing)
    elif missing > 0 or (measured.ended.code and not measured.records):
        result.row(
            label,
            False,
            error=f"{missing} of {expected} records are missing; exit code {measured.ended.code}: "
            f"{measured.ended.said[-1500:]}",
        )


def derived(record: Record) -> dict[str, Any]:
    """Figures in the units of the targets."""
    return {
        f"{name}_ms": record[f"{name}_s"] * 1e3 for name in ("tpot", "total") if record.get(f"{name}_s") is not None
    }


def listed(values: Iterable[object]) -> str:
    """A list in the notation of the command line."""
    return f"[{','.join(map(str, values))}]"
