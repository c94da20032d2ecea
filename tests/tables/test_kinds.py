"""Tables choose records by their kind; the kind of old records is recognised by their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pqbench.engine.setting import Setting
from pqbench.measure.base import Job
from pqbench.measure.layer.scores import SHARES, AttentionScores
from pqbench.records.file import VERSION, Record, RecordFile, encode
from pqbench.records.kinds import kind_of
from pqbench.support.loading import load_model
from pqbench.tables.command import main
from pqbench.tables.document import run_table
from pqbench.tables.kinds import sections


def bare(**fields: Any) -> Record:
    named = {"sample_id": "a", "status": "ok", "model": "toy", "method": "full", "key": "k"}
    return {"version": VERSION, **named, **fields}


OLD: dict[str, dict[str, Any]] = {
    "scores": {"benchmark": "mine", "task": "t", "prediction": "x", "references": ["x"], "score": 100.0},
    "latency": {"context": 1024, "repeat": 0, "prompt_tokens": 1024, "new_tokens": 32},
    "attention": {"geometry": "tiny", "kernel": "cpu", "context": 128, "dtype": "float32"},
    "attention_scores": {"context": 128, "layer": 0, "budget": "all"},
    "fidelity": {"document": "sotu-001", "ratio": None, "steps": 4, "length": 128, "layer": [0, 1], "context": 3},
}


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("name", ["latency", "needle", "mine", 3, None])
def test_an_old_record_is_known_by_its_fields_whatever_its_benchmark_is_called(kind: str, name: object) -> None:
    for status in ("ok", "error"):
        assert kind_of(bare(**OLD[kind]) | {"benchmark": name, "status": status}) == kind


def test_the_kind_that_a_record_carries_counts() -> None:
    assert kind_of(bare(**OLD["latency"], kind="scores")) == "scores"
    assert kind_of(bare(**OLD["latency"], kind=3)) == "latency"


def test_every_measurement_writes_its_kind_into_its_records(tmp_path: Path) -> None:
    measurement = AttentionScores([96], queries=8)
    files = {"full": RecordFile.create(tmp_path, "attention_scores", "tiny", "full", {})}
    measurement.measure(Job(load_model("tiny"), {}, files, Setting(backend="reference")))
    records = files["full"].read()
    assert {record["kind"] for record in records} == {"attention_scores"}
    stripped = [{name: value for name, value in record.items() if name != "kind"} for record in records]
    assert {kind_of(record) for record in stripped} == {"attention_scores"}


def spread(layer: int, mass: float, **fields: Any) -> Record:
    facts = {"context": 128, "layer": layer, "mass": [[mass] * len(SHARES)] * 2, "mass_shares": list(SHARES)}
    return bare(benchmark="attention_scores", task="attention_scores", budget="all", **facts) | fields


def test_sorted_attention_has_a_table_of_its_own_and_none_of_dashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "attention_scores/toy/full-1"
    folder.mkdir(parents=True)
    lines = [spread(layer, mass, sample_id=f"128-{layer}") for layer, mass in enumerate((0.2, 0.4))]
    (folder / "records.jsonl").write_bytes(b"".join(map(encode, lines)))
    assert main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    text = capsys.readouterr().out
    assert text.count("###") == 1
    assert "scores, mean" not in text
    assert "costs" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 128")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["128", "2", *["0.300"] * len(SHARES)]
    assert (tmp_path / "t.csv").read_text().count("\n") == 3


def test_a_kind_without_a_table_is_said_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert sections([bare(kind="energy", benchmark="latency")]) == []
    assert caplog.messages == ["1 record(s) of the kind 'energy' have no table"]


def test_a_run_prints_the_tables_of_its_kind() -> None:
    assert run_table([spread(0, 0.2), spread(1, 0.4)]).row_count == 1
    assert run_table([bare(**OLD["scores"])]).row_count == 1
    assert run_table([]).row_count == 0
