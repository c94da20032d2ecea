"""Longest contexts, and rotary frequencies that depend on the length: results equal transformers, or are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from methods.full import Full
from methods.streaming_llm import StreamingLLM
from pqbench import Budget, generate
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError, ModelError
from pqbench.models.lengths import learned_positions, longest_context
from pqbench.models.sources import Pretrained, byte_tokenizer, reach
from pqbench.support.miniature import small_config, small_model
from tests.support import left_padded, prompt_of

NEW, SWITCH = 6, 64


def long_rope(kind: str) -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 8, "long_factor": [float(2 + i) for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH, **factors}
    own = {"original_max_position_embeddings": SWITCH} if kind == "phi3" else {}
    return small_model(kind, rope_parameters=rope, max_position_embeddings=512, **own)


def dynamic(kind: str) -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return small_model(kind, rope_parameters=rope, max_position_embeddings=SWITCH)


def truth(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return tokens[:, ids.shape[1] :]


def same_or_refused(model: PreTrainedModel, ids: Tensor, **options: Any) -> bool:
    """Whether the prompt was accepted; if so, the tokens must be those of transformers."""
    try:
        tokens = generate(model, ids, Full(), max_new_tokens=NEW, **options)
    except ConfigError as error:
        if "rotary frequencies change" in str(error):
            return False
        raise
    assert torch.equal(tokens, truth(model, ids, options.get("attention_mask"))), (ids.shape, options)
    return True


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_longrope_within_at_and_beyond_the_switch(kind: str) -> None:
    model = long_rope(kind)
    ran = [length for length in range(SWITCH - NEW - 2, SWITCH + 4) if same_or_refused(model, prompt_of(length))]
    assert ran == [n for n in range(SWITCH - NEW - 2, SWITCH + 4) if n > SWITCH or n + NEW - 1 <= SWITCH]
    assert same_or_refused(model, prompt_of(200))
    assert same_or_refused(model, prompt_of(40), chunk=7)
    assert same_or_refused(model, prompt_of(130), chunk=SWITCH + 1)
    assert not same_or_refused(model, prompt_of(130), chunk=SWITCH)
    assert not same_or_refused(model, prompt_of(130), chunk=1)
    assert same_or_refused(model, prompt_of(20))  # back again


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_longrope_of_a_padded_batch(kind: str) -> None:
    model = long_rope(kind)
    for lengths in ((20, 40), (20, 130), (70, 130)):
        ids, mask = left_padded(*(prompt_of(length, length) for length in lengths))
        assert same_or_refused(model, ids, attention_mask=mask)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_dynamic_frequencies_are_served_up_to_the_original_length(kind: str) -> None:
    model = dynamic(kind)
    assert longest_context(model.config) == SWITCH
    assert same_or_refused(model, prompt_of(SWITCH - NEW))
    assert same_or_refused(model, prompt_of(SWITCH - NEW), chunk=5)
    longer = Setting(max_length=512)
    assert not same_or_refused(model, prompt_of(SWITCH - NEW + 2), setting=longer)
    assert not same_or_refused(model, prompt_of(130), setting=longer)


@pytest.mark.parametrize("model", [long_rope("phi3"), dynamic("llama")])
def test_keys_whose_frequencies_change_are_not_renumbered(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="depend on the length"):
        generate(model, prompt_of(20), StreamingLLM(Budget(sink=4, ratio=1.0)), max_new_tokens=2)


@pytest.mark.parametrize(
    ("rope", "own", "expected"),
    [
        ({"rope_type": "default"}, 512, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 512, 2048),  # Qwen's cards
        ({"rope_type": "yarn", "factor": 4.0}, 512, 2048),
        ({"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072, 131072),  # gpt-oss
        ({"rope_type": "linear", "factor": 2.0}, 512, 1024),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            4096,
            4096,
        ),
        ({"rope_type": "dynamic", "factor": 4.0}, 512, 512),
    ],
)
def test_the_longest_context_follows_rotary_scaling(rope: dict[str, Any], own: int, expected: int) -> None:
    for kind in ("llama", "qwen3"):
        config = small_config(kind, rope_parameters={"rope_theta": 10000.0, **rope}, max_position_embeddings=own)
        assert longest_context(config) == expected


def test_a_yarn_model_runs_beyond_its_original_length_and_not_beyond_its_limit() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = small_model("qwen2", rope_parameters=rope, max_position_embeddings=64)
    assert torch.equal(generate(model, prompt_of(200), Full(), max_new_tokens=NEW), truth(model, prompt_of(200)))
    with pytest.raises(ConfigError, match="limit of 256"):
        generate(model, prompt_of(255), Full(), max_new_tokens=NEW)
    longer = generate(model, prompt_of(300), Full(), max_new_tokens=NEW, setting=Setting(max_length=400))
    assert torch.equal(longer, truth(model, prompt_of(300)))


def test_max_length_overrides_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("llama")
    assert reach(model, None) == 512
    assert reach(model, 100) == 100
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert reach(model, 700) == 700
    assert "700" in caplog.text
    assert "512" in caplog.text


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_learned_positions_end_where_their_table_ends(kind: str) -> None:
    model = small_model(kind)
    assert learned_positions(model) == longest_context(model.config) == 512
    with pytest.raises(ModelError, match="learned positions"):
        reach(model, 700)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_oss"])
def test_rotary_models_have_no_table_of_positions(kind: str) -> None:
    assert learned_positions(small_model(kind)) is None


def test_a_loaded_model_reaches_as_far_as_its_scaling(tmp_path: Any) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    model = small_model("qwen3", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert Pretrained("mine", path=str(tmp_path)).load().max_length == 2048


def test_a_model_without_a_limit_has_none() -> None:
    assert longest_context(CONFIG_MAPPING["bloom"]()) == 1 << 30
