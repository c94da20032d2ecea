"""Tables of fidelity records: means worked out by hand, intervals over documents, ratios to a method, and failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pqbench.records.file import VERSION, encode
from pqbench.records.kinds import TOO_SHORT
from pqbench.tables.fidelity import fidelity_sections, lines_of, multiples

ERRORS = {("oracle", 0.1): (0.1, 0.3), ("oracle", 0.2): (0.05, 0.15), ("h2o", 0.1): (0.4, 0.6), ("full", None): (0, 0)}


PIVOTS = 4  # tables of method by budget, which come first


def records(**fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": "fidelity",
            "model": "toy",
            "method": method,
            "key": f"key-{method}",
            "status": "ok",
            "document": f"sotu-{i:03}",
            "length": 4096,
            "steps": 64,
            "ratio": ratio,
            "dtype": "float32",
            "threads": 2,
            "kernels": "cpu",
            "output_error": error,
            "kl": error / 10,
            "top1_agreement": 1 - error,
            "nll": 3 + error,
            "nll_full": 3.0,
            "perplexity": 20.0 + i,
            "recall": None if ratio is None else 1 - error,
            "mass": 0.9,
            "bits_per_key": 16.0,
            "attended_tokens": 409.6,
            "bytes_per_head": 123456.0,
            "token_age": {
                "prompt": {"recall": 1 - error, "share": 1.0},
                "early": {"recall": None, "share": 0.0},
                "late": {"recall": None, "share": 0.0},
            },
            "entropy": {
                third: {"output_error": error * (j + 1), "nats": 1.0}
                for j, third in enumerate(("low", "middle", "high"))
            },
        }
        | fields
        for (method, ratio), errors in ERRORS.items()
        for i, error in enumerate(errors)
    ]


def cells(rows: list[dict[str, Any]], table: int = -2) -> dict[tuple[str, str], dict[str, str]]:
    """Cells by heading, by method and ratio."""
    section = fidelity_sections(rows)[table]
    named = [dict(zip(section.headings, row, strict=True)) for row in section.rows]
    return {(row["method"], row["ratio"]): row for row in named}


def test_means_and_their_units() -> None:
    found = cells(records())
    assert list(found) == [("full", "all"), ("oracle", "10 %"), ("h2o", "10 %"), ("oracle", "20 %")]
    row = found["oracle", "10 %"]
    assert row["output error"].startswith("0.200 [0.1")
    assert row["KL nats"].startswith("0.0200 [")
    assert row["NLL - full"].startswith("+0.2000 [")
    assert (row["n"], row["top-1 %"], row["recall"], row["mass"], row["bits/key"], row["attended"], row["KB/head"]) == (
        "2",
        "80.0",
        "0.800",
        "0.900",
        "16.0",
        "410",
        "123.5",
    )
    assert (found["full", "all"]["recall"], found["full", "all"]["x best"]) == ("-", "-")


def test_intervals_are_over_documents() -> None:
    (line,) = [line for line in lines_of(records()) if line.labels["method"] == "h2o"]
    mean = line.mean("output_error")
    assert mean is not None
    assert (mean.value, mean.low, mean.high, mean.n) == (pytest.approx(0.5), pytest.approx(0.4), pytest.approx(0.6), 2)
    assert "[" not in cells([row for row in records() if row["document"] == "sotu-000"])["h2o", "10 %"]["output error"]


def test_the_best_is_that_of_the_same_length_and_budget() -> None:
    found = cells(records())
    assert (found["oracle", "10 %"]["x best"], found["h2o", "10 %"]["x best"]) == ("1.00", "2.50")
    assert found["oracle", "20 %"]["x best"] == "1.00"
    longer = cells(records() + records(length=8192, output_error=0.01, method="other"))
    assert longer["h2o", "10 %"]["x best"] == "2.50"


def test_a_budget_at_which_nothing_was_skipped_is_marked_where_it_is_shown() -> None:
    """h2o with 20 % attended to everything, with 10 % it did not: one row, of which one cell is marked."""
    short = {"budget": f"20 % ({TOO_SHORT})", "ratio": 0.2, "output_error": 0.0}
    found = records() + [row | short for row in records() if row["method"] == "h2o"]
    for pivot in fidelity_sections(found)[:PIVOTS]:
        (row,) = [row for row in pivot.rows if row[0] == "h2o"]
        assert [TOO_SHORT in cell for cell in row] == [False, False, True]
        assert pivot.headings[1:] == ["10 %", "20 %"]
    for section in fidelity_sections(found)[PIVOTS:]:
        marked = [row for row in section.rows if any(TOO_SHORT in cell for cell in row)]
        named = [dict(zip(section.headings, row, strict=True)) for row in marked]
        assert [(row["method"], row["ratio"]) for row in named] == [("h2o", f"20 % ({TOO_SHORT})")]


def test_parts_show_ages_and_thirds() -> None:
    found = cells(records(), -1)
    assert ("full", "all") not in found
    row = found["oracle", "10 %"]
    assert (row["recall prompt"], row["recall early decoded"]) == ("0.800 (100.0 %)", "-")
    assert [row[f"error {third} entropy"] for third in ("low", "middle", "high")] == ["0.200", "0.400", "0.600"]


def test_main_figures_have_tables_of_method_by_budget() -> None:
    error, kl, agreement, recall, *_ = fidelity_sections(records() + records(length=8192, output_error=0.5))
    assert error.headings == ["method", "10 %", "20 %"]
    assert "output error at 4096 tokens by budget, 2 documents" in error.title
    assert error.rows == [
        ["oracle", "0.200 [0.100, 0.300]", "0.100 [0.050, 0.150]"],
        ["h2o", "0.500 [0.400, 0.600]", "-"],
    ]
    assert kl.rows[0][1].startswith("0.0200 [")
    assert agreement.rows[1][1].startswith("50.0 [")
    assert recall.rows[1][1].startswith("0.500 [")
    titles = [section.title for section in fidelity_sections(records() + records(length=8192))]
    assert sum("at 8192 tokens" in title for title in titles) == PIVOTS


def test_failures_are_counted_and_runs_told_apart() -> None:
    rows = records()
    rows[2] |= {"status": "oom"}
    assert cells(rows)["oracle", "20 %"]["n"] == "1 (+1 failed)"
    two = fidelity_sections(records() + records(key="other"))[-2]
    assert two.headings[:4] == ["length", "ratio", "method", "key"]
    assert len(two.rows) == 8


def test_every_model_has_its_own_tables() -> None:
    titles = [section.title for section in fidelity_sections(records() + records(model="big"))]
    assert [title.split()[2] for title in titles] == ["toy"] * (PIVOTS + 2) + ["big"] * (PIVOTS + 2)
    assert "64 teacher-forced steps (float32, 2 threads, kernels cpu)" in titles[0]
    assert fidelity_sections([]) == []


def test_multiples_pair_documents() -> None:
    error, kl, *_ = fidelity_sections(records(), "oracle")[PIVOTS:]
    assert "as a multiple of that of oracle on the same document: output error at 4096 tokens" in error.title
    # 0.4 / 0.1 and 0.6 / 0.3: the mean of the ratios is 3, that of the errors alone 2.5 times the oracle's.
    assert error.rows == [["oracle", "1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]"], ["h2o", "3.00 [2.00, 4.00]", "-"]]
    assert kl.rows[1] == ["h2o", "3.00 [2.00, 4.00]", "-"]


def test_multiples_of_nothing_are_left_out() -> None:
    rows = records()
    of_oracle = [row for row in rows if row["method"] == "oracle" and row["ratio"] == 0.1]
    of_oracle[0].update(output_error=0.0)
    of_oracle[1].update(status="error")
    found = [row for row in multiples(rows, "oracle") if row["method"] == "h2o"]
    assert [(row["document"], row["output_error"], row["kl"]) for row in found] == [
        ("sotu-000", None, pytest.approx(4.0))
    ]


def test_the_command_compares_with_a_method_and_names_those_there_are(tmp_path: Path) -> None:
    folder = tmp_path / "fidelity" / "toy" / "all-1"
    folder.mkdir(parents=True)
    rows = [row | {"version": VERSION, "sample_id": str(i)} for i, row in enumerate(records())]
    (folder / "records.jsonl").write_bytes(b"".join(map(encode, rows)))
    line = [sys.executable, "-m", "pqbench.tables", str(tmp_path), "--relative"]
    shown = subprocess.run([*line, "oracle"], capture_output=True, text=True, check=True).stdout
    assert ["h2o", "3.00 [2.00, 4.00]", "-"] in [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in shown.splitlines()
    ]
    refused = subprocess.run([*line, "oracel"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no fidelity records of 'oracel': there are oracle, h2o, full" in refused.stderr
