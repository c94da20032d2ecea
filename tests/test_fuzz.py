"""Random configurations: valid ones are measured, keep their budget and are exact at full budget; invalid ones end in a
line.

Each test tries a few dozen configurations; ``FUZZ=1`` in the environment tries many more.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from pqbench.__main__ import main
from pqbench.config.compose import conf_folder
from pqbench.records.file import Record, read_all

CONTEXT = 256  # tokens of the prompt
NEW = 4  # tokens generated
LONGER = "FUZZ" in os.environ
MANY = settings(
    max_examples=600 if LONGER else 25,
    deadline=None,
    derandomize=not LONGER,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RUN = (
    "model=tiny",
    "benchmark=needle",
    f"benchmark.lengths=[{CONTEXT}]",
    "benchmark.depths=[50]",
    f"benchmark.max_new_tokens={NEW}",
    "threads=1",
    "probe_tokens=2",
)


def run(overrides: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[Record]]:
    """Exit code, error lines and records of the command with these overrides, in a results folder of its own."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pqbench", *RUN, f"results={folder}", *overrides])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        records = read_all(Path(folder)) if list(Path(folder).rglob("records.jsonl")) else []
    return int(str(end.value.code)), errors, records


def fields_of(path: Path) -> dict[str, Any]:
    """The fields that a yaml sets, with their values."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if not name.startswith("_") and name != "defaults"}


METHODS = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml") if not path.stem.startswith("paper_"))
BUDGETS = st.one_of(
    st.just({"budget.ratio": 1.0}),
    st.fixed_dictionaries(
        {"budget.ratio": st.sampled_from([0.1, 0.3, 0.6]), "budget.grow": st.booleans()},
        optional={"budget.sink": st.integers(0, 8), "budget.window": st.integers(1, 24)},
    ),
    st.fixed_dictionaries({"budget.tokens": st.integers(64, CONTEXT)}, optional={"budget.sink": st.integers(0, 16)}),
)
STORES = st.one_of(
    st.just({"store": "device"}),
    st.fixed_dictionaries(
        {"store": st.just("host")},
        optional={
            "store.cache_tokens": st.sampled_from([0, 32, 64]),
            "store.cache_block": st.sampled_from([8, 16]),
            "store.cache_policy": st.sampled_from(["lru", "lfu"]),
            "store.cache_per_head": st.booleans(),
            "store.background": st.booleans(),
        },
    ),
)
RUNS = st.fixed_dictionaries(
    {"kernels": st.sampled_from(["auto", "reference"])},
    optional={
        "chunk": st.sampled_from([7, 64, 300]),
        "question": st.sampled_from(["dense", "select"]),
        "overlap": st.booleans(),
    },
)


@given(method=st.sampled_from(METHODS), budget=BUDGETS, store=STORES, options=RUNS)
@MANY
def test_valid_configurations_measure_within_their_budget_and_exactly_at_full_budget(
    method: str,
    budget: Mapping[str, Any],
    store: Mapping[str, Any],
    options: Mapping[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = {**budget, **store, **options}
    overrides = [f"{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in chosen.items()]
    code, errors, records = run([f"method=[full,{method}]", *overrides], capsys)
    note(f"{method} {overrides}: {errors}")
    if code and not records:  # refused before anything ran: one line, which must not report a fault of the code
        assert len(errors) == 1
        assert "Error:" not in errors[0]
        assume(False)
    assert code == 0, errors
    assert {record["status"] for record in records} == {"ok"}
    full, ours = (next(one for one in records if one["method"] == name) for name in ("full", method))
    for record in (full, ours):
        assert math.isfinite(record["attended_tokens"])
        assert record["new_tokens"] >= 1
    if budget.get("budget.ratio") == 1.0:
        assert ours["prediction"] == full["prediction"]
    assert ours["attended_tokens"] <= full["attended_tokens"]


BAD = st.sampled_from(
    ["abc", "-1", "0", "1e9", ".nan", ".inf", "-.inf", "[1,2]", "{a: 1}", "true", "2.5", "''", "null", "99999999999"]
)
PLACES = [
    *(("model", name) for name in fields_of(conf_folder() / "model/tiny.yaml")),
    *(("benchmark", name) for name in fields_of(conf_folder() / "benchmark/needle.yaml")),
    *(("budget", name) for name in fields_of(conf_folder() / "budget/default.yaml")),
    *(("store", name) for name in fields_of(conf_folder() / "store/host.yaml")),
    *(
        (f"methods.{method}", name)
        for method in METHODS
        for name in fields_of(conf_folder() / f"method/{method}.yaml")
        if name != "budget"
    ),
    *(("", name) for name in ("chunk", "question", "probe_tokens", "threads", "kernels", "overlap", "retry_failed")),
    *(("", name) for name in ("graphs", "select_ahead", "correction")),
]
COSTLY = {("model", "hidden"), ("model", "layers"), ("model", "context"), ("benchmark", "max_new_tokens")}


@given(place=st.sampled_from(PLACES), value=BAD)
@MANY
def test_bad_values_end_in_a_line_or_measure(
    place: tuple[str, str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assume(place not in COSTLY or value not in ("1e9", "99999999999"))
    group, name = place
    method = group.partition("methods.")[2] or "pqcache"
    override = f"{group}.{name}={value}" if group else f"{name}={value}"
    more = ["store=host"] if group == "store" else []
    code, errors, records = run([f"method={method}", *more, override], capsys)
    note(f"{override}: {code} {errors}")
    assert not any(line.startswith(("Traceback", "  File")) for line in errors)
    assert not any("debug=true shows where" in line for line in errors)
    if code:
        assert errors
        assert all(len(line) < 500 for line in errors)
    else:
        assert records
        assert {record["status"] for record in records} == {"ok"}
