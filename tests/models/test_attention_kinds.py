"""Architectures whose attention differs from Llama's: they give the tokens of transformers, or a refusal with its
reason."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.pqcache import PQCache
from methods.snapkv import SnapKV
from methods.streaming_llm import StreamingLLM
from pqbench import Budget, Method, generate
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from pqbench.errors import ModelError
from pqbench.store.tiers import HostTier
from pqbench.support.miniature import small_model
from tests.support import left_padded, prompt_of

NEW = 8
WHOLE = Budget(sink=4, ratio=1.0)
FULL_BUDGET: dict[str, Method] = {
    "full": Full(),
    "pqcache": PQCache(WHOLE, m=2, b=3),
    "h2o": H2O(WHOLE),
    "snapkv": SnapKV(WHOLE),
}


@lru_cache
def small(kind: str) -> PreTrainedModel:
    return small_model(kind)


def truth(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return tokens[:, ids.shape[1] :]


def assert_exact(model: PreTrainedModel, chosen: dict[str, Method]) -> None:
    """Check that every method gives the tokens of transformers for short and long prompts, in blocks, and in a padded
    batch."""
    ids, mask = left_padded(prompt_of(20, 1), prompt_of(3, 2), prompt_of(41, 3))
    long, right, padded = prompt_of(130), truth(model, prompt_of(130)), truth(model, ids, mask)
    short = {length: truth(model, prompt_of(length)) for length in (1, 3)}
    for name, method in chosen.items():
        assert torch.equal(generate(model, long, method, max_new_tokens=NEW), right), name
        assert torch.equal(generate(model, long, method, max_new_tokens=NEW, chunk=16), right), name
        assert torch.equal(generate(model, ids, method, mask, NEW), padded), name
        for length, tokens in short.items():
            assert torch.equal(generate(model, prompt_of(length), method, max_new_tokens=NEW), tokens), (name, length)


@pytest.mark.parametrize(
    "kind",
    [
        "minicpm3",  # latent attention: the cache holds latents, attention gets what they expand to
        "youtu",
        "opt",  # scales its queries itself and calls attention with scaling=1
        "whisper",
        "biogpt",
        "gpt_neox",  # other names and layouts of layers and projections
        "gpt_bigcode",
        "bigbird_pegasus",  # its modules say that they are not causal
        "dbrx",  # a configuration inside the configuration, without an attention of its own
        "exaone4",  # some layers have no rotary embedding
    ],
)
def test_the_same_tokens_as_transformers(kind: str) -> None:
    assert_exact(small(kind), FULL_BUDGET)


@pytest.mark.parametrize("kind", ["minicpm3", "youtu"])
def test_latent_attention_on_the_host_and_under_small_budgets(kind: str) -> None:
    model, ids = small(kind), prompt_of(130)
    shape = profile(model).layers[0]
    assert (shape.kv_heads, shape.group, shape.head_dim) == (4, 1, 32)  # keys of 16 + 16, values of 16
    assert torch.equal(generate(model, ids, Full(), max_new_tokens=NEW, setting=Setting(HostTier())), truth(model, ids))
    little = Budget(sink=4, window=8, tokens=24, ratio=None)
    ours = [
        generate(model, ids, PQCache(little, m=2, b=3), max_new_tokens=NEW, setting=Setting(tier))
        for tier in (HostTier(), HostTier(cache_tokens=32, cache_block=8))
    ]
    assert torch.equal(*ours)
    assert not torch.equal(ours[0], truth(model, ids))


def test_the_scaling_of_the_call_is_used_not_the_modules() -> None:
    for kind in ("opt", "whisper"):
        model = small(kind)
        scaling = {shape.scaling for shape in profile(model).layers.values()}
        assert scaling == {1.0}
        assert model.get_decoder().layers[0].self_attn.scaling == 16**-0.5


def kept(model: PreTrainedModel, ids: Tensor, sink: int, total: int) -> Tensor:
    """Greedy tokens if every decoded token sees the first ``sink`` and the latest tokens, together ``total``, by a mask
    over the cache of transformers. This equals StreamingLLM in a model without positions."""
    tokens = ids
    past = None
    for _ in range(NEW):
        length = tokens.shape[1]
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
        mask[..., sink : length - (total - sink)] = False
        with torch.no_grad():
            if past is None:
                output = model(tokens, use_cache=True)
            else:
                output = model(tokens[:, -1:], attention_mask=mask, past_key_values=past, use_cache=True)
        past = output.past_key_values
        tokens = torch.cat([tokens, output.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, ids.shape[1] :]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("smollm3", {"no_rope_layers": [0] * 6}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),  # rotary: the mask alone differs
    ],
)
def test_layers_without_rotary_are_not_turned(kind: str, own: dict[str, Any]) -> None:
    model = small_model(kind, **own)
    ids = prompt_of(70)
    streaming = StreamingLLM(Budget(sink=4, window=8, tokens=24, ratio=None), sink=4)
    ours = generate(model, ids, streaming, max_new_tokens=NEW)
    if "no_rope_layers" in own:
        assert torch.equal(ours, kept(model, ids, 4, 24))
        blocks = InfLLM(Budget(sink=4, window=8, ratio=1.0), block_size=8, representatives=2)
        assert torch.equal(generate(model, ids, blocks, max_new_tokens=NEW), truth(model, ids))
    else:
        assert not torch.equal(ours, kept(model, ids, 4, 24))


@pytest.mark.parametrize(
    ("kind", "own", "reason"),
    [
        ("gemma3n_text", {}, "share"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
            "share",
        ),
        ("mistral", {}, "sliding"),
        ("ministral", {"layer_types": ["sliding_attention"] * 6}, "sliding"),
        ("xglm", {}, "attention interface"),
        ("bloom", {}, "attention interface"),
        ("mpt", {}, "attention interface"),
        ("mamba", {}, "mamba"),
        ("jamba", {}, "linear_attention"),
        ("vaultgemma", {}, "soft-capping"),
        ("deepseek_v32", {}, "indexed_attention"),
    ],
)
def test_refused_in_one_line_that_names_type_and_reason(kind: str, own: dict[str, Any], reason: str) -> None:
    model = small_model(kind, **own)
    before = model.config._attn_implementation
    with pytest.raises(ModelError) as caught:
        generate(model, prompt_of(5), Full(), max_new_tokens=2)
    text = str(caught.value)
    assert text.startswith(f"{model.config.model_type} is not supported: ")
    assert reason in text
    assert "\n" not in text
    assert "object has no attribute" not in text
    assert model.config._attn_implementation == before


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = small("gemma4_text")
    ids = prompt_of(20)
    assert torch.equal(generate(model, ids, Full(), max_new_tokens=NEW), truth(model, ids))
    refused = small_model("vaultgemma")
    before = truth(refused, ids)
    with pytest.raises(ModelError):
        generate(refused, ids, Full())
    assert torch.equal(truth(refused, ids), before)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "glm4"])
def test_methods_that_renumber_refuse_what_they_cannot_renumber(kind: str) -> None:
    with pytest.raises(ModelError, match="renumber"):
        generate(small(kind), prompt_of(5), StreamingLLM(WHOLE), max_new_tokens=2)
