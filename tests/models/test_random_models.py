"""Models of a published shape with random weights: they have the true sizes, are made in seconds, and only serve
timings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from methods.full import Full
from pqbench import generate
from pqbench.config.compose import model_source
from pqbench.errors import ModelError
from pqbench.models.sources import Pretrained, Random, byte_tokenizer, shape_config
from pqbench.records.classes import conf_folder
from pqbench.records.file import read_all
from pqbench.support.loading import load_model
from tests.support import prompt_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 1}
TINY = {**SMALL, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 512}
# Parameters as the model cards' safetensors have them; then heads, KV heads, layers, head dimension.
CARDS = {
    "llama31_8b": (8_030_261_248, 32, 8, 32, 128),
    "qwen25_7b": (7_615_616_512, 28, 4, 28, 128),
    "mistral_7b": (7_241_732_096, 32, 8, 32, 128),
}


def fields(name: str, **options: Any) -> dict[str, Any]:
    """The yaml of a model with other values."""
    found: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"model/{name}.yaml"))
    shape = {**found["shape"], **options.pop("shape", {})}
    return {**found, "device": "cpu", **options, "shape": shape}


@pytest.mark.parametrize("name", CARDS)
def test_shapes_are_those_of_the_cards(name: str) -> None:
    parameters, heads, kv_heads, layers, width = CARDS[name]
    source = model_source(fields(name, weights="random"))
    assert isinstance(source, Pretrained)
    config = shape_config(source.shape or {}, byte_tokenizer())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.num_parameters() == parameters
    found = (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers)
    assert found == (heads, kv_heads, layers)
    assert model.model.layers[0].self_attn.head_dim == width
    assert all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    assert not config.tie_word_embeddings


def test_rotary_frequencies_are_llamas_own() -> None:
    """Llama 3.1 lowers the frequencies of long waves by its formula (low 1, high 4, factor 8, original length 8192)."""
    loaded = load_model("llama31_8b", **{**fields("llama31_8b", weights="random", shape={**TINY, "head_dim": 128})})
    base = 1 / 500000.0 ** (torch.arange(0, 128, 2).double() / 128)
    waves = 2 * torch.pi / base
    smooth = (8192 / waves - 1) / (4 - 1)
    between = (1 - smooth) * base / 8 + smooth * base
    expected = torch.where(waves > 8192, base / 8, torch.where(waves < 8192 / 4, base, between))
    assert torch.allclose(loaded.model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-5)
    assert loaded.max_length == 131_072


@pytest.mark.parametrize("name", CARDS)
def test_activations_stay_small_over_all_layers(name: str) -> None:
    shape = {**SMALL, "vocab_size": 512, "head_dim": 32}
    loaded = load_model(name, **fields(name, weights="random", shape=shape))
    assert loaded.model.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        seen = loaded.model(prompt_of(300), output_hidden_states=True)
    assert len(seen.hidden_states) == CARDS[name][3] + 1
    assert all(0 < float(state.float().std()) < 50 for state in seen.hidden_states)
    assert seen.logits.isfinite().all()
    assert float(seen.logits.float().std()) > 0.01  # tokens differ


def test_a_random_model_decodes_and_follows_its_seed() -> None:
    def made(**options: Any) -> Any:
        return model_source(fields("llama31_8b", weights="random", dtype="float32", shape=TINY, **options)).load()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = made(), made(), made(seed=1)
    assert torch.equal(torch.rand(3), expected)  # the global generator is not changed
    weights = [loaded.model.model.layers[1].mlp.up_proj.weight for loaded in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    ids = torch.tensor([first.tokenizer("Some text.").input_ids])
    assert torch.equal(
        generate(first.model, ids, Full(), max_new_tokens=6),
        first.model.generate(ids, do_sample=False, max_new_tokens=6)[:, ids.shape[1] :],
    )


def test_the_tiny_model_is_what_it_was() -> None:
    plain = Random("tiny").load()
    config = plain.model.config
    assert (config.intermediate_size, config.vocab_size) == (2 * 64, len(plain.tokenizer))
    assert (plain.weights, plain.stand_in) == ("random", False)  # its answers count as its own
    sized = Random("tiny", intermediate=96, vocab=1000).load().model.config
    assert (sized.intermediate_size, sized.vocab_size) == (96, 1000)
    # Drawn as transformers draws it from the same seed, on the CPU.
    torch.manual_seed(0)
    drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert torch.equal(drawn.lm_head.weight, plain.model.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "none"}, ["model.weights is 'none'", "pretrained or random"]),
        ({"weights": "random", "device": "auto"}, ["one device", "model.device=cpu"]),
        ({"weights": "random", "shape": {"vocab_size": 100}}, ["vocabulary of 100 is too small", "258"]),
        ({"weights": "random", "shape": {"hidden_size": 1 << 20}}, ["the weights of llama31_8b need", "GB are free"]),
    ],
)
def test_what_cannot_be_built_is_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra wraps ours, whose text is looked at
        model_source(fields("llama31_8b", **options)).load()
    assert [word for word in words if word not in str(caught.value)] == []


def test_answers_of_random_weights_are_refused() -> None:
    source = model_source(fields("llama31_8b", weights="random"))
    with pytest.raises(ModelError, match=r"lm-eval needs the model's own weights.*weights=pretrained"):
        source.check_answers("lm-eval")
    model_source(fields("llama31_8b")).check_answers("lm-eval")
    Random("tiny").check_answers("lm-eval")


def command(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The command as users type it, with the shape of a small model."""
    shape = [f"model.shape.{name}={value}" for name, value in TINY.items()]
    line = [
        sys.executable,
        "-m",
        "pqbench",
        *overrides,
        "model=llama31_8b",
        "model.weights=random",
        "model.device=cpu",
        "threads=1",
        "method=[full]",
        f"results={folder}",
        *shape,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_no_score_comes_from_random_weights(tmp_path: Path) -> None:
    names = ("needle", "fidelity", "attention_scores")
    done = command(tmp_path, "--multirun", f"benchmark={','.join(names)}")
    assert done.returncode == 1
    for name in names:
        assert f" benchmark={name} needs the model's own weights" in done.stderr
    assert done.stdout.strip() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]  # Hydra's own


def test_latency_says_that_its_weights_are_random(tmp_path: Path) -> None:
    done = command(
        tmp_path,
        "benchmark=latency",
        "benchmark.contexts=[128]",
        "benchmark.repeats=1",
        "benchmark.new_tokens=4",
        "benchmark.warmup=0",
    )
    assert done.returncode == 0, done.stderr
    [record] = read_all(tmp_path)
    assert (record["status"], record["weights"], record["model"]) == ("ok", "random", "llama31_8b")
    assert record["dtype"] == "bfloat16"
    assert "score" not in record
    assert "random weights" in " ".join(done.stdout.split())
