"""Memory is looked at before a prefill: what cannot fit is a row with the status oom, and the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from methods.full import Full
from pqbench.__main__ import main
from pqbench.engine.layers import Shape
from pqbench.engine.prefill import prefill
from pqbench.engine.rehearsal import Profile
from pqbench.engine.shapes import PromptShape, needs, working_bytes
from pqbench.errors import RoomError
from pqbench.records.file import read_all
from tests.support import prompt_of, tiny_model


def test_cells_that_do_not_fit_are_recorded_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has memory for a prompt of 256 tokens, and none for one of 3000."""
    lengths = "benchmark.lengths=[256,3000]"
    small = ["model=tiny", "method=[full,h2o]", lengths, "benchmark.depths=[50]", "benchmark.max_new_tokens=3"]
    monkeypatch.setattr(sys, "argv", ["pqbench", *small, "threads=1", f"results={tmp_path}"])
    plenty = psutil.virtual_memory()
    monkeypatch.setattr("pqbench.store.tiers.psutil.virtual_memory", lambda: plenty._replace(available=5 << 20))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    statuses = sorted((row["method"], row["status"]) for row in read_all(tmp_path))
    assert statuses == [("full", "ok"), ("full", "oom"), ("h2o", "ok"), ("h2o", "oom")]
    [line] = {row["error"] for row in read_all(tmp_path) if row["status"] == "oom"}
    assert "are free: use a shorter context" in line
    assert "chunk=1024" in line


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_take_less_than_one_shot(batch: int) -> None:
    model = tiny_model("llama")
    shape = PromptShape.of(torch.ones(batch, 4096, dtype=torch.bool))
    whole, blocks = (working_bytes(model, shape, block) for block in (4096, 256))
    assert blocks < whole
    assert working_bytes(model, shape, 1 << 20) == whole  # a block is never longer than the prompt
    padded = PromptShape.of(torch.arange(4096)[None] >= torch.tensor([0, 7])[:batch, None])
    assert batch == 1 or working_bytes(model, padded, 4096) > whole


def test_each_device_needs_room_for_its_own_layers() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    free = {first: 5000, second: 7000}.__getitem__
    wide = {i: Shape(8, 4, 128, 1.0, first) for i in range(3)}
    narrow = {3: Shape(2, 4, 64, 1.0, second)}
    found = [(numbers, need.device, need.layers) for numbers, need in needs(Profile(wide | narrow), 16, 1000, free)]
    assert found == [(3 * 2 * 8 * 128, first, 3), (2 * 2 * 64, second, 1)]
    for _, need in needs(Profile(wide | narrow), 16, 1000, free):
        assert (need.reserve, need.working) == (16, 1000)


def test_nothing_runs_when_it_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, none = tiny_model("llama"), psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr("pqbench.store.tiers.psutil.virtual_memory", lambda: none)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(RoomError, match=r"130 tokens of KV need 0\.0 GiB of memory on cpu"):
        prefill(model, prompt_of(130), [Full()], reserve=0)
