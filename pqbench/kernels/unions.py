"""Unions of what the query heads of a KV head choose, as rows of equal number."""

from __future__ import annotations

import torch
from torch import Tensor


def union_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The union per KV head of the sets that its query heads choose.

    Args:
        chosen: bool ``[B, H, G, M]``, which of M tokens each query head chose.

    Returns:
        Tokens ``[B, H, n]``, where n is the size of the largest union: the members of the union first, then padding
        that no query head chose. And bool ``[B, H, G, n]``, which of them each query head chose.
    """
    union = chosen.any(2)
    size = int(union.sum(-1).max())
    tokens = union.to(torch.int8).topk(size, dim=-1).indices
    return tokens, chosen.gather(3, tokens[:, :, None].expand(*chosen.shape[:3], size))
