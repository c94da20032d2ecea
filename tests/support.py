"""Shared by the tests: tiny models, and definitions in float64 numpy that are independent of the code under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import Geometry, LayerState, Method, Selection
from pqbench.store.device import DeviceStore

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _gemma() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**SHAPE, "num_hidden_layers": 3},
            sliding_window=24,
            layer_types=kinds,
            query_pre_attn_scalar=16,
            tie_word_embeddings=False,  # tied, random weights only echo the prompt
        )
    )


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma3": _gemma,
}


@lru_cache
def tiny_model(name: str) -> PreTrainedModel:
    """A random model whose greedy continuations vary from token to token."""
    torch.manual_seed(0)
    return randomize(TINY[name]())


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Draw weights from N(0, 0.2), but keep the norms."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()


def prompt_of(length: int, seed: int = 0, batch: int = 1) -> Tensor:
    """A random prompt ``[B, S]`` without the padding token."""
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts ``[1, S_i]`` as one batch with its mask."""
    width = max(p.shape[1] for p in prompts)
    rows = [torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts]
    return torch.cat(rows), torch.cat(masks)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def turned(x: np.ndarray, position: float, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding by complex numbers: components j and j + D/2 form one number, which is multiplied by exp(i p
    w_j)."""
    half = len(frequencies)
    number = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([number.real, number.imag], -1)


@dataclass
class Case:
    """A prompt of one layer and the decoded tokens: q ``[B, H, G, S + T, D]``, keys and values ``[B, H, S + T, D]``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    prompt: int
    frequencies: Tensor

    @property
    def geometry(self) -> Geometry:
        """The harness's description of this layer."""
        batch, heads, group, _, width = self.q.shape
        return Geometry(0, batch, heads, group, width, width**-0.5, self.prompt, self.frequencies)

    @property
    def scaling(self) -> float:
        """Factor on q.k."""
        return float(self.q.shape[-1] ** -0.5)

    def probabilities(self, length: int) -> np.ndarray:
        """Exact attention of the query at ``length - 1`` over all tokens so far: float64 ``[B, H, G, length]``."""
        q, keys = self.q[:, :, :, length - 1].double().numpy(), self.keys[:, :, :length].double().numpy()
        return softmax(np.einsum("bhgd,bhsd->bhgs", q, keys) * self.scaling)

    def terms(self, length: int) -> np.ndarray:
        """Exp of the exact logits of the query at ``length - 1``: float64 ``[B, H, G, length]``."""
        q, keys = self.q[:, :, :, length - 1].double().numpy(), self.keys[:, :, :length].double().numpy()
        return np.exp(np.einsum("bhgd,bhsd->bhgs", q, keys) * self.scaling)

    def sums(self, length: int) -> np.ndarray:
        """Exact numerator and denominator of attention at ``length - 1``, float64 ``[B, H, G, D + 1]``."""
        return _sums(self.terms(length), self.values[:, :, None, :length].double().numpy())

    def full(self, length: int) -> np.ndarray:
        """Exact output at ``length - 1``, float64 ``[B, H, G, D]``."""
        return np.einsum("bhgs,bhsd->bhgd", self.probabilities(length), self.values[:, :, :length].double().numpy())


def case(
    prompt: int,
    steps: int = 4,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    width: int = 16,
    seed: int = 0,
    spread: float = 1.5,
) -> Case:
    """A case of random tensors; ``spread`` sharpens the attention, so that selections differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    total = prompt + steps
    q = torch.randn(batch, heads, group, total, width, generator=generator) * spread
    keys = torch.randn(batch, heads, total, width, generator=generator)
    values = torch.randn(batch, heads, total, width, generator=generator)
    return Case(q, keys, values, prompt, 10000.0 ** (-torch.arange(width // 2) * 2 / width))


def store_of(keys: Tensor, values: Tensor) -> DeviceStore:
    """A store over copies of the rows."""
    return DeviceStore(GrowingBuffer(keys), GrowingBuffer(values))


def start(method: Method, data: Case, chunk: int | None = None) -> tuple[LayerState, DeviceStore]:
    """A state that has seen the prompt, and its store."""
    state = method.layer(data.geometry)
    for first in range(0, data.prompt, chunk or data.prompt):
        stop = min(data.prompt, first + (chunk or data.prompt))
        state.observe(data.q[:, :, :, first:stop], data.keys[:, :, :stop], data.values[:, :, :stop])
    store = store_of(data.keys[:, :, : data.prompt], data.values[:, :, : data.prompt])
    store.after_prefill(state.finish_prefill(store), method.evicts)  # in place
    return state, store


def append(state: LayerState, store: DeviceStore, data: Case, step: int) -> Tensor:
    """Add token ``prompt + step``; returns its query ``[B, H, G, D]``."""
    at = data.prompt + step
    store.append(data.keys[:, :, at : at + 1], data.values[:, :, at : at + 1])
    state.append(store)
    return data.q[:, :, :, at]


def advance(state: LayerState, store: DeviceStore, data: Case, step: int) -> Selection:
    """One decode step without attention; if weights are needed, they come from :func:`weights_of`."""
    q = append(state, store, data, step)
    selection = state.select(q, store)
    finish(state, store, selection, q, data)
    return selection


def finish(state: LayerState, store: DeviceStore, selection: Selection, q: Tensor, data: Case) -> None:
    """Give the attention weights to the state, and drop the rows that it wants to drop."""
    weights = torch.from_numpy(weights_of(selection, store, q, data)).float() if state.needs_weights else None
    dropped = state.attended(weights, store)
    if dropped is not None:
        store.drop(dropped)


def rows_of(selection: Selection, store: DeviceStore) -> Tensor:
    """Rows attended to, ``[B, H, n]``."""
    if selection.indices is not None:
        return selection.indices
    return torch.arange(store.length).expand(*store.positions.shape[:2], -1)


def tokens_of(selection: Selection, store: DeviceStore) -> Tensor:
    """Original positions attended to, ``[B, H, n]``."""
    return store.positions.gather(2, rows_of(selection, store))


def _attend(selection: Selection, store: DeviceStore, q: Tensor, data: Case) -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(selection, store).numpy()
    frequencies, held = data.frequencies.double().numpy(), store.keys().double().numpy()
    batch, heads, group, _ = q.shape
    logits = np.zeros((batch, heads, group, rows.shape[2]))
    for b, h, n in np.ndindex(*rows.shape):
        key = held[b, h, rows[b, h, n]]
        if selection.key_shift is not None:
            key = turned(key, float(selection.key_shift[b, h, n]), frequencies)
        logits[b, h, :, n] = q[b, h].double().numpy() @ key * data.scaling
    if selection.log_weights is not None:
        logits += selection.log_weights.double().numpy()
    if selection.visible is not None:
        logits[~selection.visible.expand(logits.shape).numpy()] = -np.inf
    values = np.take_along_axis(store.values().double().numpy(), rows[..., None], 2)
    return logits, values


def weights_of(selection: Selection, store: DeviceStore, q: Tensor, data: Case) -> np.ndarray:
    """Attention probabilities over the selected rows, float64 ``[B, H, G, n]``."""
    return softmax(_attend(selection, store, q, data)[0])


def _sums(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums ``[B, H, G, D + 1]`` of values ``[B, H, 1, n, D]`` by terms ``[B, H, G, n]``, and of the terms."""
    return np.concatenate([(terms[..., None, :] @ values)[..., 0, :], terms.sum(-1, keepdims=True)], -1)


def estimate_of(selection: Selection, store: DeviceStore, data: Case) -> np.ndarray:
    """The estimate of :meth:`Case.sums` from the weighted rows of a selection, float64 ``[B, H, G, D + 1]``."""
    assert selection.log_weights is not None
    chosen = tokens_of(selection, store).numpy()
    terms = np.take_along_axis(data.terms(store.seen), chosen[:, :, None].repeat(data.q.shape[2], 2), 3)
    terms = terms * np.exp(selection.log_weights.double().numpy())
    if selection.visible is not None:
        terms = terms * selection.visible.numpy()
    return _sums(terms, np.take_along_axis(data.values.double().numpy(), chosen[..., None], 2)[:, :, None])


def assert_unbiased(drawn: np.ndarray, truth: np.ndarray) -> None:
    """Check that estimates ``[n, B, H, G, D + 1]`` by :func:`estimate_of` differ, and that their mean is within 4.5
    standard errors of ``truth``."""
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - truth) <= 4.5 * error + 1e-5).all()
    assert (error[..., -1] < 0.03 * truth[..., -1]).all()  # so the bound is not trivial
    assert (drawn[..., -1].std(0) > 0).all()


def output_of(selection: Selection, store: DeviceStore, q: Tensor, data: Case) -> np.ndarray:
    """The output that a selection and its residual define, float64 ``[B, H, G, D]``."""
    logits, values = _attend(selection, store, q, data)
    exact = np.einsum("bhgn,bhnd->bhgd", softmax(logits), values)
    if selection.residual is None:
        return exact
    top = logits.max(-1)
    lse = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    log_weight = selection.residual.log_weight.double().numpy() + (lse if selection.residual.relative else 0)
    share = (1 / (1 + np.exp(lse - log_weight)))[..., None]
    return exact * (1 - share) + selection.residual.value.double().numpy() * share
