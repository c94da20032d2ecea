"""Makes records like those of runs, and the settings behind their keys, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from plots.data import with_settings
from pqbench.tables.summaries import frame

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("latency", "attention", "attention_scores", "fidelity")
Row = dict[str, Any]
Settings = dict[str, Any]


class Results:
    """A results folder in memory: rows and, by key, the settings of their runs."""

    def __init__(self, benchmark: str, /, **settings: Any) -> None:
        self.benchmark, self.common = benchmark, settings
        self.kind = benchmark if benchmark in KINDS else "scores"
        self.rows: list[Row] = []
        self.known: dict[str, tuple[Settings, Settings]] = {}

    def run(self, method: str, target: str, rows: list[Row], options: Settings | None = None, **settings: Any) -> None:
        """Add one run: ``target`` is a yaml of conf/method/, ``options`` are its fields, and each row holds the fields
        of a sample.

        The settings of the run name the class of that yaml in a module that no longer exists. As in a real
        ``config.yaml``, each method has a code fingerprint of its own.
        """
        key = f"{len(self.known):012x}"
        node = yaml.safe_load((ROOT / f"conf/method/{target}.yaml").read_text(encoding="utf-8"))
        own = {"_target_": f"gone.place.{node['_target_'].split('.')[-1]}", **(options or {})}
        self.known[key] = (
            {"benchmark": {}, **self.common, **settings, "method": own, "code": target},
            {"processor": "Test CPU"},
        )
        for i, row in enumerate(rows):
            common = {
                "kind": self.kind,
                "benchmark": self.benchmark,
                "model": "toy",
                "task": "t",
                "sample_id": f"s{i}",
                "method": method,
                "key": key,
                "budget": "10 %",
                "question": "dense",
                "status": "ok",
            }
            self.rows.append(common | row)

    @property
    def table(self) -> pd.DataFrame:
        """The table as ``python -m plots`` passes it to a figure."""
        return with_settings(frame(self.rows), self.known)


def texts(figure: Any) -> str:
    """All text outside the panels: title and footer."""
    return "\n".join(text.get_text() for text in [*figure.texts, *([figure._suptitle] if figure._suptitle else [])])
