"""The only contact with transformers' attention dispatch: one attention function, one mask function, no model names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pqbench.errors import ModelError
from pqbench.kernels import reference

if TYPE_CHECKING:
    from pqbench.cache import LayeredCache

NAME = "pqbench"
_UNSUPPORTED = {"softcap": "logit soft-capping", "s_aux": "attention sinks learned by the model"}


def attention_forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, kv: LayeredCache | None = None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Registered under :data:`NAME`. ``kv`` is the cache that the loop passes through ``model(..., kv=cache)``; its
    layer answers the call. Layers that are not ours (sliding windows), and calls without ``kv``, get plain SDPA.

    Raises:
        ModelError: the layer asks for something that no method here would honour.
    """
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ModelError(f"layer {module.layer_idx} uses {meaning} ({name}), which pqbench does not support")
    layer = None if kv is None else kv.selective.get(int(module.layer_idx))  # type: ignore[arg-type]
    if layer is None:
        if mask is None and 1 < q.shape[2] < k.shape[2]:
            return causal_block(q, k, v, scaling), None
        output, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)
        return output, None
    factor = q.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attention(module, q, k, v, mask, factor), None


def dense_prefill(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Exact causal attention of a prompt block: ``[B, n, Hq, D]``."""
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        return causal_block(q, k, v, scaling)
    output: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)[0]
    return output


def causal_block(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of a block of queries ``[B, Hq, n, D]`` at the end of keys ``[B, H, S, D]``: ``[B, n, Hq, D]``.

    Torch's ``is_causal`` lets the first query see the first key, and a mask ``[n, S]`` keeps flash attention from
    serving the call; this bias says the same without either.
    """
    bias: Any = _lower_right(q.shape[2], k.shape[2])
    output = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
def _lower_right(count: int, total: int) -> Tensor:
    """The bias of a block; every layer asks for the same one."""
    return causal_lower_right(count, total)


def block_mask(**options: Any) -> Tensor | None:
    """The mask that transformers gives its SDPA layers; none where on a GPU it would say nothing but "causal", which
    :func:`causal_block` knows. ``options`` are those of :func:`transformers.masking_utils.sdpa_mask`."""
    causal = options.get("attention_mask") is None and options.get("local_size") is None
    on_gpu = torch.device(options.get("device", "cpu")).type == "cuda"
    if causal and on_gpu and options.get("allow_is_causal_skip", True):
        return None
    mask: Tensor | None = sdpa_mask(**options)
    return mask


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through :func:`attention_forward`; the former implementation returns on exit, also
    after an exception."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, block_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ModelError(f"{type(model).__name__} does not let its attention be replaced: use a model that follows the "
                         "attention interface of transformers")  # fmt: skip
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def rotary_frequencies(model: PreTrainedModel, layer: int, layer_type: str) -> Tensor:
    """Rotary frequencies ``[D_rotary / 2]`` of a layer, checked against the model's own rotation.

    Raises:
        ModelError: the model has no rotary embedding, or one that depends on the length or pairs other dimensions.
    """
    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    frequencies = getattr(rotary, f"{layer_type}_inv_freq", None)
    if frequencies is None:
        frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        raise ModelError(f"{type(model).__name__} has no rotary position embedding, which this method renumbers")
    _check_rotation(model, decoder.layers[layer], frequencies)
    return frequencies  # type: ignore[no-any-return]


def _check_rotation(model: PreTrainedModel, layer: nn.Module, frequencies: Tensor) -> None:
    """Our rotation must equal the one the model's modelling file applies, else renumbered keys would be wrong."""
    own = getattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb", None)
    width = 2 * frequencies.shape[0]
    x = torch.linspace(-1, 1, 3 * width, device=frequencies.device).view(1, 1, 3, width)
    positions = torch.tensor([0, 7, 1000], device=frequencies.device)
    angles = (positions[:, None] * frequencies.float()).repeat(1, 2)[None]  # [1, 3, width]
    theirs = None if own is None else own(x, x, angles.cos(), angles.sin())[1]
    if theirs is None or not torch.allclose(reference.rotate(x, positions, frequencies), theirs, atol=1e-4):
        raise ModelError(f"{type(model).__name__} rotates keys in a way this method cannot renumber")
