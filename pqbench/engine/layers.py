"""The caches given to transformers. Prefill and decoding have their own kinds of layers, so that the phase need not be
inferred from shapes.

A :class:`PrefillLayer` keeps the whole prompt and computes dense attention. A :class:`DecodeLayer` answers one query
per sequence through a method.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from pqbench.engine.attention import dense_attention
from pqbench.engine.cohort import Cohort, Observer, Rows
from pqbench.errors import ModelError
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import Geometry
from pqbench.store.tiers import Placement, Prompt


class LayeredCache(Cache):
    """A transformers cache that knows which of its layers are ours and verifies that every layer of the model uses it.
    In each forward pass, every layer of the model must first update its entry once and then call attention once. Other
    models are refused, because our layers would not answer their attention."""

    def __init__(self, layers: list[CacheLayerMixin]) -> None:
        super().__init__(layers=layers)
        self.selective: dict[int, Any] = {i: layer for i, layer in enumerate(layers) if hasattr(layer, "attention")}
        self._updated: int | None = None  # the layer whose entry was updated but whose attention was not called yet
        self._answered = 0

    @property
    def cohorts(self) -> list[Cohort]:
        """The cohorts of every layer of a decode, layer by layer."""
        return [cohort for layer in self.selective.values() for cohort in layer.cohorts]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._updated is not None:
            raise ModelError(f"layer {self._updated} computes attention without the attention interface")
        self._updated = layer_idx
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def begin(self) -> None:
        """A forward pass starts."""
        self._updated, self._answered = None, 0

    def answering(self) -> CacheLayerMixin:
        """The layer that answers the current attention call. Raises ModelError when no layer was updated before the
        call."""
        if self._updated is None:
            raise ModelError(
                "it calls attention over keys that are not the layer's own cache entry: several layers "
                "share keys and values, or one layer calls attention several times"
            )
        layer, self._updated = self.layers[self._updated], None
        self._answered += 1
        return layer

    def end(self) -> None:
        """A forward pass is over. Raises ModelError when not every layer was updated and answered."""
        if self._updated is not None:
            raise ModelError(f"layer {self._updated} computes attention without the attention interface")
        if self._answered != len(self.layers):
            raise ModelError(f"{len(self.layers) - self._answered} of its {len(self.layers)} layers bypass the cache")


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type of every layer. Raises ModelError for a type that is neither full nor sliding attention."""
    types, _ = _described(config)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"the model has layers of type {', '.join(unknown)}; pqbench serves full and sliding attention"
        )
    return types


def sliding_layers(config: PreTrainedConfig) -> dict[int, CacheLayerMixin]:
    """Transformers' own cache layers for sliding layers, which methods do not serve."""
    types, options = _described(config)
    return {i: DynamicSlidingWindowLayer(**options[i]) for i, kind in enumerate(types) if kind == "sliding_attention"}


def _described(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Attention type of every layer, and the arguments from which its cache layer is made. Releases of transformers
    differ: the newest give arguments for each layer, 5.17 gives one set of arguments for all layers, and older releases
    give none."""
    describe = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if describe is None:
        window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
        types = (
            getattr(config, "layer_types", None)
            or ["full_attention" if window is None else "sliding_attention"] * count
        )
        return list(types), [{} if window is None else {"sliding_window": window}] * count
    types, options = describe(config)
    return list(types), options if isinstance(options, list) else [options] * len(types)


class OurLayer(CacheLayerMixin):
    """What transformers requires of a cache layer. Transformers does not see evictions: positions count all tokens
    seen."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.sinks: Tensor | None = None  # [Hq], of the current call; see attention_forward

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Shape:
    """What the calls of one layer's attention have in common.

    Attributes:
        kv_heads, group, head_dim: H, G and D; D is the larger width if those of keys and values differ.
        scaling: factor on q.k.
        device: where the layer runs.
        sinks: ``[H, G]`` float32, logits that take part in each head's softmax and have no value.
    """

    kv_heads: int
    group: int
    head_dim: int
    scaling: float
    device: torch.device
    sinks: Tensor | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scaling: float, sinks: Tensor | None) -> Shape:
        """The shape of one call: q ``[B, Hq, n, D]`` and k ``[B, H, S, D]``."""
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        known = None if sinks is None else sinks.detach().float().view(heads, group)
        return cls(heads, group, q.shape[-1], scaling, q.device, known)

    def geometry(self, layer: int, rows: Rows, prompt: int = 0, backend: str = "reference") -> Geometry:
        """What a method's state must know about a layer of this shape, without the facts that only some methods
        need."""
        return Geometry(
            layer=layer,
            batch=rows.count,
            kv_heads=self.kv_heads,
            group=self.group,
            head_dim=self.head_dim,
            scaling=self.scaling,
            prompt=prompt,
            backend=backend,
            device=self.device,
            sinks=self.sinks,
        )


class PrefillLayer(OurLayer):
    """Holds the prompt's keys and values, computes dense attention (or the method's own attention if ``own``), and
    shows each block to the observers.

    ``on_end`` is called inside the layer's own call as soon as all ``columns`` tokens have arrived. From then on the
    prompt's rows belong to the tier (:meth:`prompt`), which may move them while the next layers compute.
    """

    def __init__(
        self,
        columns: int,
        reserve: int,
        rows: Sequence[Rows],
        placement: Placement,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.columns, self.reserve, self.rows, self.placement, self.on_end = columns, reserve, rows, placement, on_end
        self.observers: list[list[Observer]] = []  # by method and cohort
        self.own = False
        self.shape: Shape | None = None  # known after the first block
        self._buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None
        self._prompts: dict[int, Prompt] = {}  # by padding, which is different for each cohort

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            capacity = self.columns + self.reserve
            self._buffers = GrowingBuffer.like(key_states, capacity), GrowingBuffer.like(value_states, capacity)
        keys, values = self._buffers
        keys.append(key_states)
        values.append(value_states)
        self.seen += key_states.shape[2]
        return keys.view(), values.view()

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Causal attention of a block, ``[B, n, Hq, D]``."""
        batch, heads, columns, width = q.shape
        check_rows(k, self.seen)
        self.shape = Shape.of(q, k, scaling, self.sinks)
        grouped = q.view(batch, k.shape[1], heads // k.shape[1], columns, width)  # [B, H, G, n, D]
        if self.own:
            answer = torch.zeros_like(grouped)
            for observer in self._each_observer():
                observer.answer(grouped, k, v, answer)
            output = answer.view_as(q).transpose(1, 2).contiguous()
        else:
            output = dense_attention(module, q, k, v, mask, scaling, self.sinks)
        for observer in self._each_observer():
            observer.observe(grouped, k, v)
        if self.seen == self.columns:
            self._end(k, v)
        return output

    def prompt(self, rows: Rows) -> Prompt:
        """The finished prompt of one cohort, from which stores are made. Raises RuntimeError before the last token
        is prefilled."""
        if not self._prompts:
            raise RuntimeError("prompt() before the last token was prefilled")
        return self._prompts[rows.padding]

    def release(self, rows: Rows) -> None:
        """Drop the prompt of one cohort. Stores that were made from it keep what they need."""
        self._prompts.pop(rows.padding, None)

    def _each_observer(self) -> Iterator[Observer]:
        """The observers of every method and cohort, method by method."""
        return chain.from_iterable(self.observers)

    def _end(self, k: Tensor, v: Tensor) -> None:
        """Hand the rows over to the tier, cohort by cohort. Nothing is copied when a cohort is the whole batch. The
        rows are those that attention used. They can differ from the rows of the cache, because latent attention expands
        them."""
        if self._buffers is None:
            raise RuntimeError("attention() before update()")
        keys, values = (
            held if same_rows(held.view(), used) else GrowingBuffer(used, slack=max(self.reserve, 1))
            for held, used in zip(self._buffers, (k, v), strict=True)
        )
        for rows in self.rows:
            self._prompts[rows.padding] = self.placement.prompt(
                keys.rows(rows.index, rows.padding), values.rows(rows.index, rows.padding), self.reserve
            )
        self._buffers = None
        done, self.on_end = self.on_end, None  # it refers to objects that refer to this layer, so it is dropped
        if done is not None:
            done()
        for prompt in self._prompts.values():
            prompt.let_go()


class DecodeLayer(OurLayer):
    """Stores one new token per sequence, then answers its query, cohort by cohort.

    ``make`` returns the cohorts. It is called when the first step reaches the layer, and it waits for an index that is
    still being built.
    """

    def __init__(self, make: Callable[[], list[Cohort]], seen: int) -> None:
        super().__init__()
        self._make = make
        self.seen = seen
        # A weak reference, because layers that refer to each other in a ring would not be freed.
        self.following: Callable[[], DecodeLayer | None] | None = None

    @cached_property
    def cohorts(self) -> list[Cohort]:
        """The cohorts, made at first use."""
        return self._make()

    def prefetch(self) -> None:
        """Let the methods request what they will need, because the layer before this one starts its step. Nothing can
        be requested while an index is still being built."""
        for cohort in self.__dict__.get("cohorts", ()):
            cohort.prefetch()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        following = None if self.following is None else self.following()
        if following is not None:
            following.prefetch()
        self.seen += 1
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Store the new token as attention sees it, then answer one query per sequence, ``[B, 1, Hq, D]``. The mask is
        not needed, because cohorts have no padding."""
        check_rows(k, 1)
        for cohort in self.cohorts:
            cohort.check(k, scaling)
            cohort.append(k[cohort.rows.index], v[cohort.rows.index])
        grouped = by_kv_head(q, k)
        if len(self.cohorts) == 1:
            return by_query(self.cohorts[0].attend(grouped))
        output = torch.empty_like(grouped)
        for cohort in self.cohorts:
            output[cohort.rows.index] = cohort.attend(grouped[cohort.rows.index])
        return by_query(output)


def by_kv_head(q: Tensor, k: Tensor) -> Tensor:
    """One query per sequence ``[B, Hq, 1, D]``, by the KV heads of k ``[B, H, S, D]``: ``[B, H, G, D]``."""
    batch, heads, _, width = q.shape
    return q.view(batch, k.shape[1], heads // k.shape[1], width)


def by_query(output: Tensor) -> Tensor:
    """Attention outputs ``[B, H, G, D]`` as transformers takes them, ``[B, 1, Hq, D]``."""
    return output.reshape(len(output), 1, -1, output.shape[3])


def check_rows(k: Tensor, expected: int) -> None:
    """Raises ModelError when attention uses another number of keys than the layer's cache entry returned."""
    if k.shape[2] != expected:
        raise ModelError(f"it calls attention over {k.shape[2]} keys where its cache entry gave {expected}")


def same_rows(held: Tensor, used: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return held.data_ptr() == used.data_ptr() and held.shape == used.shape and held.stride() == used.stride()


def link_layers(layers: Sequence[DecodeLayer]) -> None:
    """Let each layer announce its step to the next one. The last layer announces the next token's step to the first
    layer."""
    for layer, following in zip(layers, [*layers[1:], *layers[:1]], strict=True):
        layer.following = weakref.ref(following)


def copy_sliding(layers: dict[int, CacheLayerMixin]) -> dict[int, CacheLayerMixin]:
    """Copies of sliding layers, which can be updated without changing the originals, because an update replaces
    tensors."""
    return {i: copy.copy(layer) for i, layer in layers.items()}
