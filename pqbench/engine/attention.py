"""The only contact with transformers' attention dispatch: one attention and one mask function for all models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pqbench.errors import ModelError

NAME = "pqbench"


class Layers(Protocol):
    """What attention needs of a cache; see :class:`pqbench.engine.layers.LayeredCache`."""

    def begin(self) -> None:
        """A forward pass starts."""

    def answering(self) -> Any:
        """The layer that answers the current attention call."""

    def end(self) -> None:
        """A forward pass is over."""


_RUNNING: ContextVar[Layers | None] = ContextVar("cache of the forward pass at work", default=None)
# Names of further tensors that a call of attention may contain: positions do not change its result, and ``s_aux`` holds
# the model's learned sinks, which attention does use.
_IGNORED = frozenset({"position_ids", "cache_position", "s_aux"})


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of all layers, registered under :data:`NAME`, with the parameter names of transformers. The layer
    whose cache entry the model updated last answers the call. The scaling is always that of the call. Sliding layers,
    which are not ours, get plain SDPA. All layers are treated as causal, whatever their modules say, because some
    modules leave causality to the mask and the mask is None when it would express nothing but causality.

    Where keys and values differ in width (latent attention), both are padded with zeros to the larger width. This
    changes no product and no sum. The output is then cut to the width of the values.

    Raises:
        ModelError: the call needs a feature that pqbench does not support, or it comes from outside a forward pass of
            pqbench.
    """
    cache, sinks = _RUNNING.get(), kwargs.get("s_aux")
    check_call(kwargs)
    if cache is None:
        raise ModelError("it calls attention outside of a forward pass of pqbench")
    layer = cache.answering()
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not hasattr(layer, "attention"):
        return dense_attention(module, query, key, value, attention_mask, factor, sinks), None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ModelError("its attention adds a bias of its own to the scores (a mask of numbers, as in ALiBi)")
    layer.sinks = sinks
    width, value_width = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (_widened(rows, width) for rows in (query, key, value))
    return layer.attention(module, query, key, value, attention_mask, factor)[..., :value_width], None


def check_call(options: dict[str, Any]) -> None:
    """Raises ModelError when an argument of an attention call changes the result in a way that no kernel here
    supports."""
    if options.get("softcap") is not None:
        raise ModelError("its attention uses logit soft-capping (softcap), which pqbench does not support")
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in _IGNORED:
            raise ModelError(f"its attention is called with {name}, which pqbench does not support")


def _widened(rows: Tensor, width: int) -> Tensor:
    """Rows ``[..., D]`` padded with zeros to ``width``; the same tensor when no padding is needed."""
    return rows if rows.shape[-1] == width else functional.pad(rows, (0, width - rows.shape[-1]))


def dense_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention of a block, ``[B, n, Hq, D]``. The queries q ``[B, Hq, n, D]`` belong to the last n of the S
    tokens of k and v ``[B, H, S, D]``. ``sinks`` ``[Hq]`` are logits that take part in each head's softmax and have no
    value.

    A sink becomes one more key in front of the others. Queries get one more dimension that holds the sink; the other
    keys are zero in that dimension, and the new key is zero in all other dimensions. The sink itself therefore needs no
    mask.
    """
    square = sinks is not None and mask is None and q.shape[2] == k.shape[2]
    if sinks is not None:
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = _with_sink_key(q, k, v, scaling, sinks, dummy_query=square)
        mask = None if mask is None else functional.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        return causal_block(q, k, v, scaling)
    output: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=True)[0]
    return output[:, 1:] if square else output


def _with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, sinks: Tensor, dummy_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with the sink as key 0. ``dummy_query`` also puts a query in front, so that there are as many queries
    as keys and the causal mask stays implied. Eight dimensions are added, although one would do, to keep rows aligned
    for fast kernels."""
    batch, heads, count, _ = q.shape
    logit = sinks.to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, count, 1)
    q = torch.cat([q, logit, q.new_zeros(batch, heads, count, 7)], dim=-1)
    k, v = functional.pad(k, (0, 8, 1, 0)), functional.pad(v, (0, 0, 1, 0))
    k[:, :, 0, -8] = 1 / scaling
    return (functional.pad(q, (0, 0, 1, 0)) if dummy_query else q), k, v


def forward(model: PreTrainedModel, ids: Tensor, cache: Layers, mask: Tensor | None, positions: Tensor) -> Tensor:
    """Call the model once. Returns the logits ``[B, V]`` after the last token. ``mask`` is None when there is no
    padding.

    Raises:
        ModelError: some layer computed attention elsewhere, or did not use its cache.
    """
    known = _parameters(type(model).forward)
    options = {"position_ids": positions, "logits_to_keep": 1}
    cache.begin()
    token = _RUNNING.set(cache)
    try:
        output = model(
            ids,
            attention_mask=None if mask is None else mask.long(),
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in known},
        )
    finally:
        _RUNNING.reset(token)
    cache.end()
    logits: Tensor = output.logits[:, -1]
    return logits


@lru_cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters that a model's forward pass takes."""
    return frozenset(inspect.signature(forward).parameters)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass takes the positions of its tokens. Other models count positions by
    themselves."""
    return "position_ids" in _parameters(type(model).forward)


def causal_block(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of a block of queries ``[B, Hq, n, D]`` at the end of keys ``[B, H, S, D]``: ``[B, n, Hq, D]``.

    Torch's ``is_causal`` would align the first query with the first key, and a mask ``[n, S]`` would rule out flash
    attention. The bias that is used here aligns the last query with the last key and allows flash attention.
    """
    bias: Any = _lower_right(q.shape[2], k.shape[2])
    output = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
def _lower_right(count: int, total: int) -> Tensor:
    """The causal bias of a block, which is the same for every layer."""
    return causal_lower_right(count, total)


def block_mask(**options: Any) -> Tensor | None:
    """The mask that transformers gives its SDPA layers. On a GPU the mask is None when it would express nothing but
    causality, which :func:`causal_block` applies by itself. ``options`` are those of
    :func:`transformers.masking_utils.sdpa_mask`."""
    causal = options.get("attention_mask") is None and options.get("local_size") is None
    on_gpu = torch.device(options.get("device", "cpu")).type == "cuda"
    if causal and on_gpu and options.get("allow_is_causal_skip", True):
        return None
    mask: Tensor | None = sdpa_mask(**options)
    return mask


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through :func:`attention_forward`. The former implementation is restored on exit,
    also after an exception. Raises ModelError when the model does not use transformers' attention interface."""
    before = _implementations(model.config)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, block_mask)
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        model.set_attn_implementation(before)
        raise ModelError(_fixed(model)) from error
    if model.config._attn_implementation != NAME:
        raise ModelError(_fixed(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """The attention implementation of a configuration and, by name, those of the configurations inside it."""
    inside = {name: getattr(config, name, None) for name in config.sub_configs}
    own: dict[str, Any] = {"": config._attn_implementation}
    chosen = {name: part for name, part in inside.items() if getattr(part, "_attn_implementation", None) is not None}
    return own | {name: _implementations(part) for name, part in chosen.items()}


def _fixed(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} does not let its attention be replaced: it does not use the attention interface"
