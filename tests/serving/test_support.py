"""The table of model types: results of single types, faults that affect only their own row, and the page itself."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch

from pqbench.support import trial as support
from pqbench.support.miniature import causal_types, small_model
from pqbench.support.trial import COMMON, Outcome, page, tried

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("kind", "result", "note"),
    [
        ("olmo2", "exact", ""),
        ("gpt2", "exact", "streaming_llm"),
        ("deepseek_v2", "exact", ""),
        ("vaultgemma", "refused", "soft-capping"),
        ("rwkv", "refused", "attention interface"),
    ],
)
def test_outcomes_of_types(kind: str, result: str, note: str) -> None:
    (outcome,) = tried([kind])
    assert (outcome.kind, outcome.result) == (kind, result)
    assert note in outcome.note
    assert not outcome.fault


def faulty(kind: str) -> Outcome:
    """The behaviour of faulty types."""
    if kind == "crash":
        os.kill(os.getpid(), 9)  # as hard an end as any
    if kind == "slow":
        time.sleep(600)
    return Outcome(kind, "exact")


def test_a_crash_and_a_delay_are_rows() -> None:
    found = {one.kind: one for one in tried(["crash", "slow", "fine"], jobs=3, seconds=15, find=faulty)}
    assert [found[kind].result for kind in ("crash", "slow", "fine")] == ["crash", "error", "exact"]
    assert "-9" in found["crash"].note
    assert found["crash"].fault
    assert "1 crash, 1 error, 1 exact" in page(list(found.values()))


def test_other_tokens_are_noticed() -> None:
    model = small_model("llama")
    alone = {length: support.truth(model, support.ids_of(length)) for length in (1, 20)}
    together = support.truth(model, *support.batch())
    method = support.methods()["full"]
    assert support.differences(model, method, alone, together) == []
    alone[20] = alone[20].roll(1)
    assert support.differences(model, method, alone, together.roll(1)) == [
        "prompt of 20",
        "blocks of 16",
        "padded batch",
    ]


def test_small_models_follow_their_seed() -> None:
    first, again, other = (next(small_model("qwen3", seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_page_lists_every_type_and_no_fault() -> None:
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", text, flags=re.M)
    assert [kind for kind, _ in rows] == causal_types()
    assert {result for _, result in rows} <= {"exact", "refused", "not tried"}
    assert set(COMMON) <= {kind for kind, _ in rows}
