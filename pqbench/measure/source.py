"""Keys, values and queries of one layer, for any length and shape. They are random, or come from a real model that
reads prose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.prose import any_text, prose
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.measure.geometries import Shape
from pqbench.method import Geometry, LayerState, Method
from pqbench.models.sources import LoadedModel

BASE = 4096  # number of rows from which longer contexts are tiled
CLUSTERS = 64
_LATE = 1 << 20  # number of the first block of decoded tokens; no context has so many blocks


@dataclass(frozen=True)
class Source:
    """Rows that are repeated with noise. No two tokens are equal, and a context of any length needs only the memory of
    one block.

    Attributes:
        keys, values: ``[1, H, R, D]`` float32.
        queries: ``[1, H, G, R, D]``.
        noise: standard deviation of the noise on keys and values, as a share of their own standard deviation.
        seed: seed of all draws.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    noise: float
    seed: int

    def block(self, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``[1, H, count, D]``, of the block with this number; ``count`` is at most R."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return self._noisy(self.keys, count, generator), self._noisy(self.values, count, generator)

    @property
    def rows(self) -> int:
        """R, the tokens of a full block."""
        return self.keys.shape[2]

    def decoded(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values, each ``[1, H, count, D]``, and queries ``[1, H, G, count, D]`` of tokens after the
        context."""
        blocks = [self.block(_LATE + start, min(self.rows, count - start)) for start in range(0, count, self.rows)]
        keys, values = (torch.cat(parts, 2) for parts in zip(*blocks, strict=True))
        return keys, values, self.last_queries(count, 1)

    def last_queries(self, count: int, draw: int = 0) -> Tensor:
        """The queries at the end of a prompt, ``[1, H, G, count, D]``: rows picked at random."""
        generator = torch.Generator().manual_seed(self.seed + draw)
        chosen = torch.randint(self.queries.shape[3], (count,), generator=generator)
        return self.queries[:, :, :, chosen.to(self.queries.device)]

    def _noisy(self, base: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Add noise to rows. The noise consists of other rows, centred and in random order. This is cheaper than new
        noise, and has the right size in every dimension.

        Random numbers are drawn on the CPU and then moved to the device, so that the rows are the same on every device.
        """
        order = torch.randperm(base.shape[2], generator=generator)[:count].to(base.device)
        sign = (torch.randint(2, (count, 1), generator=generator) * 2.0 - 1).to(base.device)
        return base[:, :, :count] + self.noise * sign * (base[:, :, order] - base.mean(2, keepdim=True))


def synthetic(shape: Shape, seed: int) -> Source:
    """Random keys around cluster centres of their head, and queries that point to such a centre."""
    generator = torch.Generator().manual_seed(seed)
    heads, width = shape.kv_heads, shape.head_dim
    centres = torch.randn(heads, CLUSTERS, width, generator=generator)
    member = torch.randint(CLUSTERS, (heads, BASE), generator=generator)
    near = centres[torch.arange(heads)[:, None], member]  # [H, R, D]
    keys = near + 0.5 * torch.randn(near.shape, generator=generator)
    values = torch.randn(near.shape, generator=generator)
    wanted = torch.randint(CLUSTERS, (heads, shape.group, BASE), generator=generator)
    sought = centres[torch.arange(heads)[:, None, None], wanted]  # [H, G, R, D]
    queries = 0.5 * sought + 0.5 * torch.randn(sought.shape, generator=generator)
    return Source(keys[None], values[None], queries[None], 0.3, seed)


@torch.inference_mode()
def captured(loaded: LoadedModel, shape: Shape, seed: int) -> Source:
    """Keys after rotary embedding, values and queries of a real model that reads prose.

    KV heads of the model are put side by side, layer by layer from the middle layer on, until the shape's width and
    number of heads are reached: two heads of width 64 make one of width 128. When all heads of the model are used up,
    they are used again.
    """
    limit = min(BASE, loaded.max_length)
    prompt = torch.tensor([prose_tokens(Prompter(loaded.tokenizer, loaded.max_length), limit, seed)])
    setting = Setting(overlap=False, backend="reference")
    ids = prompt.to(loaded.model.device)
    with prefill(loaded.model, ids, [Capture()], reserve=1, setting=setting) as prefilled:
        layers = sorted(prefilled.layers)
        ordered = layers[len(layers) // 2 :] + layers[: len(layers) // 2]
        seen = [prefilled.observer(0, layer, 0).state for layer in ordered]
    keys, values, queries = (
        _heads([part for state in seen for part in _parts(state, name)], shape) for name in ("keys", "values", "q")
    )
    order = torch.arange(shape.group) % queries.shape[2]
    return Source(keys[:, :, 0], values[:, :, 0], queries[:, :, order].contiguous(), 0.1, seed)


def prose_tokens(prompter: Prompter, count: int, seed: int) -> list[int]:
    """Exactly ``count`` token ids of prose, the tokenizer's leading special token included."""
    return _tokens(prompter, count, prose(seed))


def timing_tokens(prompter: Prompter, count: int, seed: int) -> tuple[list[int], str]:
    """As :func:`prose_tokens`, but with made-up words if the package with the prose is missing. Also returns the name
    of the text."""
    name, text = any_text(seed)
    return _tokens(prompter, count, text), name


def _tokens(prompter: Prompter, count: int, text: Iterator[str]) -> list[int]:
    ids = list(prompter.frame(chat=False).lead)
    while len(ids) < count:
        ids += prompter.encode(" ".join(next(text).split()) + "\n\n")
    return list(islice(ids, count))


@dataclass(frozen=True)
class Capture(Method):
    """Full attention that keeps the queries, keys and values that it observes."""

    def layer(self, geometry: Geometry) -> CaptureState:
        return CaptureState(geometry)


class CaptureState(LayerState):
    """Keeps q ``[1, H, G, S, D]`` and keys and values ``[1, H, S, D]`` of a prompt that is prefilled in one shot."""

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.q, self.keys, self.values = (x.float().cpu().clone() for x in (q, keys[:, :, None], values[:, :, None]))


def _parts(state: LayerState, name: str) -> list[Tensor]:
    """The KV heads of a captured tensor, each ``[G or 1, S, D]``."""
    return list(getattr(state, name)[0])


def _heads(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    """Heads of the shape's width and number, ``[1, H, G or 1, S, D]``."""
    width = -(-shape.head_dim // parts[0].shape[-1])  # number of parts side by side in one head
    chosen = [parts[i % len(parts)] for i in range(width * shape.kv_heads)]
    joined = [torch.cat(chosen[i : i + width], -1)[..., : shape.head_dim] for i in range(0, len(chosen), width)]
    return torch.stack(joined)[None]


def on(source: Source, device: torch.device) -> Source:
    """The same source on a device. Blocks are then made on that device."""
    return replace(source, **{name: getattr(source, name).to(device) for name in ("keys", "values", "queries")})
