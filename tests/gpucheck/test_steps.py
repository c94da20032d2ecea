"""The comparisons of the steps notice the faults that they look for."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpucheck.options import Options
from gpucheck.plan import STEPS
from gpucheck.process import Running
from gpucheck.result import Result
from gpucheck.steps import kernels, stores, tokens
from methods.full import Full
from pqbench.engine.setting import Setting
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import GuardedTransfer
from pqbench.store.tiers import HostTier

CPU = torch.device("cpu")
TINY = Options("cpu", "tiny")


DIES = """
import json, os, sys
for number in range(int(sys.argv[1]), 4):
    if number == 1:
        os._exit(7)
    with open(sys.argv[2], "a") as lines:
        lines.write(json.dumps({"name": f"check {number}", "ok": number != 2}) + "\\n")
    if number == 2:
        break
"""


def test_a_comparison_that_ends_its_process_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comparison dies silently; another is wrong and makes the device unusable, so that its process stops."""

    def start(self: kernels.Worker) -> None:
        self._started = self._done
        self._lines = tmp_path / f"lines-{self._done}"
        command = [sys.executable, "-c", DIES, str(self._done), str(self._lines)]
        self._process = Running(command, tmp_path / "log")

    monkeypatch.setattr(kernels, "share_of", lambda *_: [(f"check {i}", 1) for i in range(4)])
    monkeypatch.setattr(kernels, "label", lambda name, *_: name)
    monkeypatch.setattr(kernels.Worker, "_start", start)
    result = Result(STEPS[1], tmp_path)
    worker = kernels.Worker("cpu", "0/1", tmp_path / "any")
    while worker.going_on(result):
        time.sleep(0.05)
    assert worker.end(result) == []
    assert [(row["name"], row["ok"]) for row in result.rows] == [
        ("check 0", True),
        ("check 1", False),
        ("check 2", False),
        ("check 3", True),
    ]
    assert "exit code 7" in result.rows[1]["error"]


def test_a_host_store_that_is_right_passes() -> None:
    found = stores.compared(HostTier(margin=4, debug=True), CPU, torch.float32, 400, 16)
    assert found["ok"] is True


def test_a_wait_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedTransfer, "_finish", lambda self: self._unwaited.discard(self))
    found = stores.compared(HostTier(margin=4, debug=True), CPU, torch.float32, 400, 16)
    assert found["ok"] is False
    assert found["wrong_selections"] > 0


def test_a_row_of_another_token_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = HostStore.fetch

    def shifted(self: HostStore, indices: Tensor | None, *more: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return fetch(self, indices if indices is None else (indices - 1).clamp(min=0), *more)

    monkeypatch.setattr(HostStore, "fetch", shifted)
    found = stores.compared(HostTier(), CPU, torch.float32, 400, 16)
    assert (found["wrong_selections"], found["wrong_contexts"]) == (stores.STEPS, 0)


def test_other_tokens_over_a_tier_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tokens.made(TINY, torch.float32), torch.arange(1, 41)[None]
    result = Result(STEPS[3], tmp_path)
    tokens._tiers(result, model, ids, "full", Full(), False)
    assert [row["ok"] for row in result.rows] == [True, True, True]
    assert len(set(tokens.generate(model, ids, Full(), max_new_tokens=20)[0].tolist())) > 5  # tokens that say something
    fetch = HostStore.fetch

    def halved(self: HostStore, *given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values, rows = fetch(self, *given)
        return keys, values / 2, rows

    monkeypatch.setattr(HostStore, "fetch", halved)
    result.rows.clear()
    tokens._tiers(result, model, ids, "full", Full(), False)
    assert [row["ok"] for row in result.rows] == [True, False, False]


def test_forced_logits_are_those_of_transformers() -> None:
    model, ids = tokens.made(TINY, torch.float32), torch.arange(1, 41)[None]
    following = torch.tensor([[3, 1, 4, 1, 5]])
    got = tokens.forced(model, ids, Full(), Setting(backend="reference"), following)
    with torch.inference_mode():
        expected = model(torch.cat([ids, following], 1)).logits[0, -following.shape[1] :]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
