"""Records belong to weights and not to a path: other weights in the same folder make new records."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pqbench.models.sources import PackagedGGUF, Pretrained, Random, byte_tokenizer
from pqbench.models.weights import folder_fingerprint, hub_fingerprint
from pqbench.support.miniature import small_model


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder_fingerprint(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_new_weights_settings_and_templates_change_the_fingerprint(kind: str, tmp_path: Path) -> None:
    first = saved(small_model(kind, seed=1), tmp_path / "a")
    assert folder_fingerprint(tmp_path / "a") == first
    assert Pretrained("mine", path=str(tmp_path / "a")).fingerprint == first
    second = saved(small_model(kind, seed=2), tmp_path / "a")
    assert second != first  # same header and size
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    third = folder_fingerprint(tmp_path / "a")
    (tmp_path / "a/config.json").write_text((tmp_path / "a/config.json").read_text().replace("512", "256"))
    fourth = folder_fingerprint(tmp_path / "a")
    (tmp_path / "a/notes.md").write_text("nothing that runs")
    assert folder_fingerprint(tmp_path / "a") == fourth
    assert len({first, second, third, fourth}) == 4


def test_a_copy_with_its_times_is_the_same_model(tmp_path: Path) -> None:
    first = saved(small_model("llama"), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert folder_fingerprint(tmp_path / "b") == first
    weights = tmp_path / "b/model.safetensors"
    os.utime(weights, (1, 1))
    assert folder_fingerprint(tmp_path / "b") != first


def test_a_cut_file_has_a_fingerprint_and_an_unknown_name_has_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert folder_fingerprint(tmp_path)
    assert hub_fingerprint("no-such-owner/no-such-model", reachable=False) is None
    assert hub_fingerprint("/no/such/folder", reachable=False) is None
    assert Random("tiny").fingerprint is None
    assert PackagedGGUF("x", package="p", file="f", version="1").fingerprint is None


def test_a_cached_snapshot_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--name"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub_fingerprint("owner/name", reachable=False) == commit[:16]
