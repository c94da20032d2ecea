"""Attention, codebooks and selection in plain torch. These functions define the results of all backends.

Shapes: B sequences, H KV heads, G query heads per KV head, S tokens, D head dimension, m sub-spaces of D/m dimensions,
K = 2**b centroids. Arithmetic is float32 for every storage type.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.number import Number
from pqbench.kernels.reference.select import check_room, lay_out

_TILE = 1 << 19  # elements of the largest temporary score tile
CODE = torch.uint8  # one byte per code; K <= 256


def rotate(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotate ``x`` ``[..., D]`` by ``positions`` ``[...]``, as rotary embedding does (RoFormer, arXiv 2104.09864; half
    layout). ``inverse_frequencies`` ``[D_rotary / 2]`` are in radians per position.

    Rotations add up: rotating an embedded key by a difference of positions moves it to another position, and rotating
    it by minus its position removes the embedding. With partial rotary embedding only the first
    ``2 * len(inverse_frequencies)`` dimensions are rotated.
    """
    half = inverse_frequencies.shape[0]
    angles = positions[..., None].float() * inverse_frequencies.float()  # [..., half]
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.to(x.dtype)


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Codes int64 ``[P, N]``: the nearest of the centroids ``[P, K, d]`` for points ``[P, N, d]``, by Euclidean
    distance. Of equally near ones, the lowest index is taken."""
    problems, count, _ = points.shape
    half_norms = centroids.float().square().sum(-1).mul(-0.5)[:, None, :]  # [P, 1, K]
    flipped = centroids.float().transpose(1, 2)  # [P, d, K]
    codes = torch.empty(problems, count, dtype=torch.int64, device=points.device)
    step = max(1, _TILE // (problems * centroids.shape[1]))
    for start in range(0, count, step):
        block = points[:, start : start + step].float()
        codes[:, start : start + step] = torch.baddbmm(half_norms, block, flipped).argmax(-1)
    return codes


def update(points: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """New centroids ``[P, K, d]``: the mean of the points ``[P, N, d]`` with each code ``[P, N]``. An empty cluster
    keeps its centroid."""
    problems, clusters, dimension = centroids.shape
    flat = (codes + clusters * torch.arange(problems, device=codes.device)[:, None]).reshape(-1)  # [P * N]
    sums = torch.zeros(problems * clusters, dimension, device=points.device)
    sums.index_add_(0, flat, points.reshape(-1, dimension).float())
    counts = torch.bincount(flat, minlength=problems * clusters)[:, None]  # [P * K, 1]
    means = sums / counts.clamp(min=1)
    return torch.where(counts > 0, means, centroids.reshape(-1, dimension).float()).view_as(centroids)


def kmeans(
    points: Tensor, clusters: int, iterations: int, seed: int, sample: int | None = None, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on P independent problems, points ``[P, N, d]`` with N >= K.

    Initial centroids are K points drawn without replacement, the same rows for every problem (as in the released
    PQCache code); the draw depends only on ``seed`` and N. If ``sample`` < N, the iterations run on the first
    ``sample`` rows of the draw, and one more runs on all points. A problem stops early once at most a share
    ``tolerance`` of its points changes cluster. An empty cluster keeps its centroid.

    Returns:
        centroids ``[P, K, d]`` float32 and codes ``[P, N]`` int64, the nearest of those centroids.
    """
    order = draw(points.shape[1], seed).to(points.device)
    points = points.float()
    centroids = points[:, order[:clusters]].contiguous()
    if sample is not None and sample < points.shape[1]:
        centroids, _ = lloyd(points[:, order[: max(sample, clusters)]], centroids, iterations, tolerance)
        iterations = min(iterations, 1)
    return lloyd(points, centroids, iterations, tolerance)


def draw(count: int, seed: int) -> Tensor:
    """The order in which K-Means draws rows: a random permutation ``[count]`` on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def lloyd(points: Tensor, centroids: Tensor, iterations: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """At most ``iterations`` steps of Lloyd's algorithm on points ``[P, N, d]`` from given centroids ``[P, K, d]``;
    returns as :func:`kmeans`."""
    codes = assign(points, centroids)
    going = torch.ones(len(points), 1, dtype=torch.bool, device=points.device)
    for _ in range(iterations):
        centroids = torch.where(going[:, :, None], update(points, codes, centroids), centroids)
        moved = torch.where(going, assign(points, centroids), codes)
        going = (moved != codes).sum(1, keepdim=True) > int(tolerance * points.shape[1])
        codes = moved
        if not bool(going.any()):
            break
    return centroids, codes


def train_codebook(
    keys: Tensor,
    parts: int,
    clusters: int,
    iterations: int,
    seed: int,
    sample: int | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codebook of keys ``[B, H, S, D]``: :func:`kmeans` with ``clusters`` centroids per sequence, head and sub-space.

    Returns:
        codebook float32 ``[B, H, m, K, D/m]`` and codes uint8 ``[B, H, S, m]``.
    """
    batch, heads, count, dimension = keys.shape
    centroids, codes = kmeans(subspaces(keys, parts), clusters, iterations, seed, sample, tolerance)
    codebook = centroids.view(batch, heads, parts, clusters, dimension // parts)
    return codebook, codes.view(batch, heads, parts, count).transpose(2, 3).to(CODE).contiguous()


def subspaces(x: Tensor, parts: int) -> Tensor:
    """Vectors ``[B, H, S, D]`` as P = B*H*m problems ``[P, S, D/m]``, where m is ``parts``."""
    batch, heads, count, dimension = x.shape
    split = x.reshape(batch, heads, count, parts, dimension // parts)
    return split.transpose(2, 3).reshape(batch * heads * parts, count, dimension // parts)


def encode(keys: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 ``[B, H, S, m]`` of keys ``[B, H, S, D]`` in a codebook ``[B, H, m, K, D/m]``, K <= 256."""
    batch, heads, parts, clusters, width = codebook.shape
    codes = assign(subspaces(keys, parts), codebook.reshape(-1, clusters, width))  # [B*H*m, S]
    return codes.view(batch, heads, parts, -1).transpose(2, 3).to(CODE)


def pq_scores(q: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Approximate q.k ``[B, H, G, S]`` of q ``[B, H, G, D]`` with keys given by codes ``[B, H, S, m]``, by table
    look-up."""
    batch, heads, group, _ = q.shape
    parts, width = codebook.shape[2], codebook.shape[4]
    blocks = q.float().view(batch, heads, group, parts, width)
    tables = torch.einsum("bhgmw,bhmkw->bhmgk", blocks, codebook)  # [B, H, m, G, K]
    index = codes.permute(0, 1, 3, 2).long()[:, :, :, None, :]  # [B, H, m, 1, S]
    return tables.gather(4, index.expand(-1, -1, -1, group, -1)).sum(2)


def group_probabilities(scores: Tensor) -> Tensor:
    """Softmax of scores ``[B, H, G, S]`` per query head, summed over the query group: ``[B, H, S]``."""
    return scores.float().softmax(-1).sum(2)


def pq_probabilities(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
    """Approximate attention that each token would receive, float32 ``[B, H, S]``: softmax of :func:`pq_scores` per
    query head, summed over the query group."""
    return group_probabilities(pq_scores(q, codebook, codes) * scaling)


def pq_select(
    q: Tensor,
    codebook: Tensor,
    codes: Tensor,
    scaling: float,
    sink: Number,
    top_k: Number,
    length: Number,
    middle: Number,
    room: int,
    only: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Indices int64 ``[B, H, room]`` of the tokens that a step attends to, in a context of ``length`` tokens.

    For each head they are the sinks 0 to sink - 1, then the min(top_k, middle) tokens of the middle with the largest
    :func:`pq_probabilities` in ascending order (of equal ones, the lower index is taken), then the window sink + middle
    to length - 1. All further entries are undefined.

    Args:
        q: ``[B, H, G, D]``.
        codebook: ``[B, H, m, K, D/m]``.
        codes: uint8 ``[B, H, C, m]``; the first ``middle`` of them belong to tokens sink to sink + middle - 1, the
            others are ignored.
        scaling: factor on q.k before the softmax.
        sink, top_k, length, middle: numbers of tokens.
        room: size of the result per head.
        only: bool or uint8 ``[B, H]``; heads that are not set keep their middle tokens of ``out``. None sets all.
        out: int64 ``[B, H, room]`` to write into; None for a new tensor.

    Raises:
        ValueError: see :func:`pqbench.kernels.reference.select.check_room`.
    """
    check_room(codes, sink, top_k, length, middle, room, only, out)
    best = _best_of_codes(q, codebook, codes[:, :, : int(middle)], scaling, int(top_k))
    return lay_out(best, int(sink), int(length), int(middle), room, only, out)


def _best_of_codes(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float, wanted: int) -> Tensor:
    return top_k(pq_probabilities(q, codebook, codes, scaling), wanted)


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Exact attention that each of the keys ``[B, H, S, D]`` would receive from q ``[B, H, G, D]``, summed over the
    query group: float32 ``[B, H, S]``."""
    return group_probabilities(q.float() @ keys.float().transpose(2, 3) * scaling)


def top_k(scores: Tensor, count: int) -> Tensor:
    """Indices ``[..., k]`` of the ``count`` largest scores ``[..., S]``, in ascending order; all if S is smaller.

    Of equal scores, the lower index is taken. NaN counts as infinity.
    """
    total = scores.shape[-1]
    if count >= total:
        return torch.arange(total, device=scores.device).expand(*scores.shape[:-1], total)
    if count <= 0:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64, device=scores.device)
    scores = scores.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    threshold = scores.topk(count, dim=-1).values[..., -1:]
    above, level = scores > threshold, scores == threshold
    chosen = above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], count)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    indices: Tensor | None = None,
    visible: Tensor | None = None,
    need_weights: bool = False,
    log_weights: Tensor | None = None,
    count: Number | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact attention of one query per head.

    Args:
        q: ``[B, H, G, D]``.
        keys, values: ``[B, H, S, D]``.
        scaling: factor on q.k before the softmax.
        indices: ``[B, H, n]``, the rows to attend to; None for all, n = S.
        visible: bool ``[B, H, G, n]``, which query head sees which row, at least one; None if all rows are visible.
        need_weights: return the probabilities.
        log_weights: float32 ``[B, H, G, n]``, added to the logits: log of the number of tokens that a row represents.
        count: attend only to the first ``count`` of the n rows, at least one. The others may hold anything; their
            probabilities are 0.

    Returns:
        output ``[B, H, G, D]`` in q's type, log-sum-exp of the logits, float32 ``[B, H, G]``, and probabilities,
        float32 ``[B, H, G, n]``, or None without ``need_weights``.
    """
    given = keys.shape[2] if indices is None else indices.shape[2]
    used = given if count is None else min(given, int(count))
    if indices is not None:
        keys, values = gather_rows(keys, indices[:, :, :used]), gather_rows(values, indices[:, :, :used])
    keys, values = keys[:, :, :used], values[:, :, :used]
    logits = q.float() @ keys.float().transpose(2, 3) * scaling  # [B, H, G, n]
    if log_weights is not None:
        logits = logits + log_weights[..., :used]
    if visible is not None:
        logits = logits.masked_fill(~visible[..., :used], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    output = (weights @ values.float()).to(q.dtype)
    if used < given:
        weights = functional.pad(weights, (0, given - used))
    return output, lse, weights if need_weights else None


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None) -> Tensor:
    """Attention of one query per head, q ``[B, H, G, D]``, over all rows or the first ``count``: ``[B, H, G, D]``. KV
    heads are not repeated."""
    if count is not None:
        keys, values = keys[:, :, : int(count)], values[:, :, : int(count)]
    return functional.scaled_dot_product_attention(q, keys, values, scale=scaling)


def merge(output: Tensor, lse: Tensor, value: Tensor, log_weight: Tensor) -> Tensor:
    """Attention output over the union of two disjoint sets of tokens: the first has ``output`` ``[B, H, G, D]`` and
    log-sum-exp ``lse`` ``[B, H, G]``, the second has mean value ``value`` and log-sum-exp ``log_weight``."""
    share = torch.sigmoid(log_weight - lse)[..., None]  # weight of the second set
    return (output.float() * (1 - share) + value.float() * share).to(output.dtype)


def column_sums(q: Tensor, keys: Tensor, scaling: float, band: int | None = None, rows: int = 128) -> Tensor:
    """Attention that each key received, float32 ``[B, H, S]``: causal softmax probabilities, summed over queries and
    query group (H2O, arXiv 2306.14048).

    q ``[B, H, G, n, D]`` are the queries of the last n of the keys ``[B, H, S, D]``. They are processed ``rows`` at a
    time, each with its complete softmax, so that there is never an S x S matrix, and the sums of the chunks of a
    prefill add up exactly. With ``band``, a query sees only the last ``band`` keys up to its own. The result is float32
    because half precision would saturate in the columns of sinks.
    """
    batch, heads, group, count, dimension = q.shape
    total = keys.shape[2]
    sums = torch.zeros(batch, heads, total, device=q.device)
    for start in range(0, count, rows):
        block = q[:, :, :, start : start + rows].float() * scaling  # [B, H, G, c, D]
        size = block.shape[3]
        end = total - count + start + size
        first = 0 if band is None else max(0, end - size - band + 1)
        seen = keys[:, :, first:end].float().transpose(2, 3)  # [B, H, D, e]
        logits = (block.reshape(batch, heads, -1, dimension) @ seen).view(batch, heads, group, size, -1)
        _hide(logits, band)
        weights = logits.softmax(-1).view(batch, heads, group * size, -1)
        sums[:, :, first:end] += weights.new_ones(1, group * size).matmul(weights)[:, :, 0]
    return sums


def _hide(logits: Tensor, band: int | None) -> None:
    """Set logits ``[..., c, e]`` of the last c queries to -inf for keys in the future and for keys before the band."""
    size, total = logits.shape[-2:]
    future = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., total - size :].masked_fill_(future, float("-inf"))
    if band is not None:
        query = torch.arange(total - size, total, device=logits.device)[:, None]
        past = torch.arange(total, device=logits.device) <= query - band
        logits.masked_fill_(past, float("-inf"))


def gather(source: Tensor, indices: Tensor, target: Tensor) -> None:
    """Copy rows ``indices`` ``[B, H, n]`` of ``source`` ``[B, H, S, ...]`` into ``target`` ``[B, H, n, ...]``."""
    target.copy_(gather_rows(source, indices))


def warm_up() -> float:
    """Does nothing, because nothing is compiled. Returns 0."""
    return 0.0


def use_threads(count: int) -> None:
    """Does nothing, because torch has its own setting."""
