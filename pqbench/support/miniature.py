"""Small random models of every type in transformers, to find out whether pqbench serves a type.

The default configuration of a type is rebuilt with small sizes under the names that the type uses. Everything else,
such as the order of layer types, is not changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
_LAYERS, _HEADS, _WIDTH = 6, 4, 64

# Small sizes by the names that configurations use. A configuration takes the sizes whose names it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "dim",
            "emb_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "dim_model",
            "mamba_d_ssm",
            "lru_width",
            "attention_hidden_size",
            "target_hidden_size",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "n_inner",
            "ffn_dim",
            "ffn_hidden_size",
            "d_ff",
            "dff",
            "dim_ff",
            "d_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "dense_intermediate_size",
            "intermediate_size_mlp",
            "moe_dense_intermediate_size",
            "block_ffn_dim_multiplier",
            "ffn_embed_dim",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "global_head_dim",
            "swa_head_dim",
            "d_kv",
            "kv_channels",
            "dim_head",
            "attention_head_dim",
            "mamba_d_head",
            "mamba_head_dim",
        ),
        16,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    "sliding_window": 24,
    "attention_chunk_size": 32,
    "local_attention": 24,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_dt_rank": 8,
    "mamba_ssm_state_size": 8,
    "mamba_ngroups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "conv_kernel": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "use_mamba_kernels": False,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Further fields that single types need: sizes that must fit each other, or lists with one entry per layer.
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96},
    },
    "falcon_h1": {"mamba_n_heads": 4},
    "gemma3n_text": {
        "layer_types": _BOTH,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.0] * _LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], _LAYERS // 2]], "window_size": 24},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (_LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (_LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": (32, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"mamba_dt_rank": 8, "attention_hidden_size": 2 * _WIDTH, "attention_head_dim": 32},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * (_LAYERS // 2),
        "num_mem_blocks": 1,
        "attention_hidden_size": 2 * _WIDTH,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_query_groups": _HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """Every model type of the installed transformers that can generate text, by name."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str, **own: Any) -> PreTrainedConfig:
    """A configuration of this type with small sizes. ``own`` are fields that replace those of this module.

    Raises the errors of the configuration when the sizes do not fit each other.
    """
    default = CONFIG_MAPPING[kind]()
    fields = _small(default) | _OWN.get(kind, {}) | own
    for name, value in default.to_dict().items():
        inside = vars(default).get(name)
        if isinstance(inside, PreTrainedConfig) and name not in own:
            wanted = _VISION if "vision" in name or "audio" in name else _small(inside)
            given = fields.get(name, {}) if isinstance(value, Mapping) else {}
            names = {known: size for known, size in wanted.items() if known in vars(inside)}
            fields[name] = {"model_type": inside.model_type, **names, **_OWN.get(inside.model_type, {}), **given}
    return type(default)(**fields)


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The small sizes for those names that a configuration has. Options that are off stay off."""
    aliases = set(getattr(config, "attribute_map", {}))
    taken = set(inspect.signature(type(config).__init__).parameters) | set(config.to_dict())
    sizes = {name: size for name, size in _SIZES.items() if name in taken and name not in aliases}
    off = {
        name for name in ("sliding_window", "q_lora_rank", "attention_chunk_size") if vars(config).get(name, 0) is None
    }
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = _HEADS  # latent attention has no query groups
    return {name: size for name, size in sizes.items() if name not in off}


def small_model(kind: str, seed: int = 0, **own: Any) -> PreTrainedModel:
    """A random causal model of this type in evaluation mode. Weights are drawn from N(0, 0.2); norms are not
    changed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_config(kind, **own))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.generation_config = GenerationConfig(pad_token_id=0)  # so that no setting ends or changes a continuation
    return model.eval()
