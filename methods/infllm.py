"""InfLLM: retrieve whole blocks of tokens by a few representative keys of each (arXiv 2402.04617)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.kernels.sinks import probabilities
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection, Split


@dataclass(frozen=True)
class InfLLM(Method):
    """Middle tokens form blocks; a block is scored by the mean of its representative keys and fetched as a whole.

    The representatives of a block are the tokens that received most attention probability from the queries that had
    them in their local window. For the score, keys are averaged without rotary embedding, and the query is rotated to
    position ``window - 1``. In the attention itself, every token outside the local window, sinks included, has the
    distance ``window - 1``. Distances are clipped in this way, so InfLLM with all blocks is not full attention.

    ``prefill="infllm"`` runs the prompt the same way, in execution blocks of ``exec_block`` tokens. Each query sees its
    local window at true distances, and sinks and retrieved blocks at distance ``window - 1``; the blocks are ranked by
    all queries of the execution block together. No distance exceeds the window, so a prompt may be longer than those
    that the model was trained on. An execution block also ends where a chunk of the prefill ends.

    Differs from the released code: the prefill is exact by default and blocks are built after it; probabilities come
    from a softmax over the local window alone; there is one vector per block and KV head, not per query head (phi =
    1/block_size); the last block may be partial, and the lowest-ranked block is cut so that the budget is met exactly.
    In its own prefill, tokens that have left the window but do not fill a block yet are attended to.

    Attributes:
        budget: sinks are n_init, the window is n_local, top_k is the number of tokens in retrieved blocks.
        block_size: tokens per block (paper: 128, which is more than the whole top_k of short contexts).
        representatives: keys averaged per block (paper: 4; PQCache's comparison: 1).
        per_head: each KV head ranks blocks by itself; otherwise all heads of a layer read the same blocks (released).
        prefill: ``dense``, or ``infllm`` as described above.
        exec_block: tokens per execution block of the prefill (paper: 512).
    """

    needs_positions = True

    budget: Budget = field(default_factory=Budget)
    block_size: int = 32
    representatives: int = 4
    per_head: bool = False
    prefill: str = "dense"
    exec_block: int = 512

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 1 <= self.representatives <= self.block_size:
            raise ConfigError(
                "infllm needs block_size >= 1 and representatives between 1 and block_size, got "
                f"{self.block_size} and {self.representatives}"
            )
        if self.prefill not in ("dense", "infllm") or self.exec_block < 1:
            raise ConfigError(
                "infllm.prefill must be dense or infllm and infllm.exec_block at least 1, got "
                f"{self.prefill!r} and {self.exec_block}"
            )

    @property
    def own_prefill(self) -> bool:  # type: ignore[override]
        """Whether the prompt runs through the method's own attention."""
        return self.prefill == "infllm"

    def layer(self, geometry: Geometry) -> LayerState:
        return InfLLMState(self, geometry)


class Representatives:
    """Attention ``[B, H, S]`` that each token received from the queries that had it in their local windows, and the
    block vectors computed from it."""

    def __init__(self, method: InfLLM, geometry: Geometry) -> None:
        self._method, self._geometry = method, geometry
        self.scores = GrowingBuffer(torch.zeros(geometry.batch, geometry.kv_heads, 0))

    @property
    def frequencies(self) -> Tensor:
        """Rotary frequencies ``[D_rotary / 2]`` of the layer."""
        if self._geometry.inverse_frequencies is None:
            raise RuntimeError("InfLLM needs rotary frequencies")
        return self._geometry.inverse_frequencies

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.scores.bytes

    def observe(self, q: Tensor, keys: Tensor) -> None:
        """Add the attention that queries ``[B, H, G, n, D]`` of the last n keys of ``[B, H, S, D]`` give to the tokens
        of their local windows."""
        window = self._method.budget.resolve(self._geometry.prompt, self._geometry.prompt).window
        sums = self._geometry.column_sums(q, keys, band=window)  # [B, H, S]
        if len(self.scores):
            sums[:, :, : len(self.scores)] += self.scores.view()
        self.scores = GrowingBuffer(sums)

    def append(self) -> None:
        """Add one token, which has received no attention yet."""
        self.scores.append(self.scores.view(stop=1) * 0)

    def attended(self, received: Tensor, window: int, length: int) -> None:
        """Add the attention of one step: the last ``window`` entries of ``received`` ``[B, H, n]`` belong to the
        window of a context of ``length`` tokens."""
        self.scores.view(length - window).add_(received[..., -window:])

    def summaries(self, keys: Tensor, start: int, size: int) -> Tensor:
        """Block vectors ``[B, H, blocks, D]``: for each block of ``size`` tokens, the mean of its representatives
        without rotary embedding. ``keys`` ``[B, H, n, D]`` begin with token ``start``."""
        scores = self.scores.view(start, start + keys.shape[2])  # [B, H, n]
        blocks = scores.view(*scores.shape[:2], -1, size)
        best = self._geometry.kernels.top_k(blocks, self._method.representatives)  # [B, H, blocks, r]
        offset = size * torch.arange(blocks.shape[2], device=best.device)[:, None]
        rows = (best + offset).flatten(2)  # [B, H, blocks * r]
        chosen = reference.rotate(gather_rows(keys, rows), -(rows + start), self.frequencies)
        return chosen.view(*best.shape, -1).mean(3)


class InfLLMState(LayerState):
    """The attention that tokens received, and one vector per block, ``[B, H, blocks, D]``."""

    needs_weights = True

    def __init__(self, method: InfLLM, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.representatives = Representatives(method, geometry)
        self.vectors: GrowingBuffer | None = None
        self.covered = 0  # tokens in blocks

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if not self.method.own_prefill:
            self.representatives.observe(q, keys)

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        length, size = keys.shape[2], self.method.exec_block
        first = length - q.shape[3]
        outputs = []
        for start in range(first - first % size, length, size):
            begin, end = max(start, first), min(start + size, length)
            block = q[:, :, :, begin - first : end - first]
            outputs.append(self._attend_block(block, keys[:, :, :end], values[:, :, :end]))
            self.representatives.observe(block, keys[:, :, :end])
        return torch.cat(outputs, dim=3)

    def _attend_block(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Output ``[B, H, G, n, D]`` of an execution block: q ``[B, H, G, n, D]`` of the last n of the keys and values
        ``[B, H, S, D]`` so far."""
        length, count, size = keys.shape[2], q.shape[3], self.method.block_size
        split, frequencies = self.method.budget.resolve(length, self.geometry.prompt), self.representatives.frequencies
        position = torch.arange(length - count, length, device=q.device)  # positions of the queries
        far_q = reference.rotate(q, split.window - 1 - position, frequencies).float()  # rotated to position window - 1
        outside = length - count + 1 - split.window  # earlier tokens are outside every query's window
        whole = max(0, outside - split.sink) // size
        near = split.sink + whole * size  # all tokens from here on are attended to
        parts = [torch.arange(split.sink, device=q.device).expand(*keys.shape[:2], -1)]
        if whole and split.top_k:
            vectors = self._prefill_vectors(keys, split.sink, whole)
            top = self._best(far_q.sum(3), vectors, split.top_k)  # [B, H, blocks taken]
            tokens = split.sink + top[..., None] * size + torch.arange(size, device=q.device)
            parts.append(tokens.flatten(2)[..., : split.top_k])
        parts.append(torch.arange(near, length, device=q.device).expand(*keys.shape[:2], -1))
        tokens = torch.cat(parts, dim=2)  # [B, H, t]
        chosen = gather_rows(keys, tokens)
        logits = q.float() @ chosen.float()[:, :, None].transpose(3, 4)  # [B, H, G, n, t]
        clipped = far_q @ reference.rotate(chosen, -tokens, frequencies).float()[:, :, None].transpose(3, 4)
        distance = position[:, None] - tokens[:, :, None, None]  # [B, H, 1, n, t]
        logits = torch.where(distance >= split.window, clipped, logits).masked_fill(distance < 0, float("-inf"))
        weights = probabilities(logits * self.geometry.scaling, self.geometry.sinks)
        return weights @ gather_rows(values, tokens).float()[:, :, None]

    def _prefill_vectors(self, keys: Tensor, sink: int, blocks: int) -> Tensor:
        """Vectors ``[B, H, blocks, D]`` of the first blocks; each is computed once, when the block has left the
        window."""
        if self.vectors is None:
            self.vectors = GrowingBuffer.like(keys, 0)
        known, size = len(self.vectors), self.method.block_size
        if known < blocks:
            rows = slice(sink + known * size, sink + blocks * size)
            self.vectors.append(self.representatives.summaries(keys[:, :, rows], rows.start, size))
        return self.vectors.view(0, blocks)

    def finish_prefill(self, kv: KV) -> None:
        self.vectors = GrowingBuffer.like(kv.keys(0, 0), 0)  # empty; keys(0, 0) moves none from the host
        self._cover(kv)

    def append(self, kv: KV) -> None:
        self.representatives.append()
        self._cover(kv)

    def attended(self, weights: Tensor | None, kv: KV) -> None:
        if weights is not None:
            window = self.method.budget.resolve(kv.length, self.geometry.prompt).window
            self.representatives.attended(weights.sum(2), window, kv.length)

    def select(self, q: Tensor, kv: KV) -> Selection:
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        top = self._rank(q, kv, split)  # [B, H, blocks taken]
        size = self.method.block_size
        tokens = (first + top[..., None] * size + torch.arange(size, device=q.device)).flatten(2)  # [B, H, n]
        beyond = (tokens >= stop).to(torch.int8)  # places after the end of the partial block are sorted last and cut
        tokens = tokens.gather(2, beyond.argsort(dim=2, stable=True))[..., : split.top_k]
        indices = split.around(tokens, kv.length)
        distance = kv.length - split.window  # moves a key so that the current query is window - 1 away
        outside = indices < kv.length - split.window
        return Selection(indices, key_shift=(distance - indices) * outside)

    def _rank(self, q: Tensor, kv: KV, split: Split) -> Tensor:
        """Blocks ``[B, H, n]``, best first: enough to fill top_k even if the partial block is among them."""
        if self.vectors is None:
            raise RuntimeError("select() before finish_prefill()")
        turn = torch.full((), split.window - kv.length, device=q.device)  # made on the device, so that nothing waits
        local = reference.rotate(q, turn, self.representatives.frequencies)  # query rotated to position window - 1
        return self._best(local.float(), self.vectors.view(), split.top_k + self.method.block_size)

    def _best(self, q: Tensor, vectors: Tensor, top_k: int) -> Tensor:
        """Blocks ``[B, H, n]``, best first, enough for ``top_k`` tokens, for queries ``[B, H, G, D]`` rotated to
        position ``window - 1``."""
        scores = (q.sum(2, keepdim=True) @ vectors.float().transpose(2, 3))[:, :, 0]
        if not self.method.per_head:
            scores = scores.sum(1, keepdim=True).expand_as(scores)
        wanted = min(-(-top_k // self.method.block_size), scores.shape[2])
        return scores.topk(wanted, dim=-1, sorted=True).indices

    def _cover(self, kv: KV) -> None:
        """Put every middle token into a block; a partial last block is computed again."""
        if self.vectors is None:
            raise RuntimeError("append() before finish_prefill()")
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        if stop - first <= self.covered:
            return
        whole = self.covered // self.method.block_size
        self.vectors.truncate(whole)
        start = first + whole * self.method.block_size
        full = (stop - start) // self.method.block_size * self.method.block_size
        if full:
            self.vectors.append(
                self.representatives.summaries(kv.keys(start, start + full), start, self.method.block_size)
            )
        if start + full < stop:
            self.vectors.append(
                self.representatives.summaries(kv.keys(start + full, stop), start + full, stop - start - full)
            )
        self.covered = stop - first

    @property
    def index_bytes(self) -> int:
        return 0 if self.vectors is None else self.vectors.bytes

    @property
    def resident_bytes(self) -> int:
        return self.index_bytes + self.representatives.nbytes
