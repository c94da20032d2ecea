"""Parts of :func:`pqbench.kernels.reference.pq_select`: the check of its arguments, and the layout of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.number import Number


def check_room(
    codes: Tensor,
    sink: Number,
    top_k: Number,
    length: Number,
    middle: Number,
    room: int,
    only: Tensor | None,
    out: Tensor | None,
) -> None:
    """Check the arguments of a selection. Numbers on a device are not read; the caller must ensure that they are valid.

    Raises:
        ValueError: ``room`` is too small, there are too few ``codes``, the middle is not inside the context, ``only``
            is given without ``out``, or ``out`` is not int64 ``[B, H, room]``.
    """
    if only is not None and out is None:
        raise ValueError("only= keeps what out= holds for the other heads: pass out as well")
    if out is not None and (out.shape != (*codes.shape[:2], room) or out.dtype != torch.int64):
        raise ValueError(f"out must be int64 {(*codes.shape[:2], room)}, got {out.dtype} {tuple(out.shape)}")
    if any(isinstance(number, Tensor) for number in (sink, top_k, length, middle)):
        return
    if not 0 <= middle <= codes.shape[2] or sink < 0 or top_k < 0 or sink + middle > length:
        raise ValueError(
            f"a middle of {middle} tokens after {sink} sinks does not fit {length} tokens and {codes.shape[2]} codes"
        )
    if length - middle + min(top_k, middle) > room:
        raise ValueError(f"room for {room} tokens does not hold the {length - middle + min(top_k, middle)} selected")


def lay_out(
    top: Tensor, sink: int, length: int, middle: int, room: int, only: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The selection ``[B, H, room]``: sinks, then ``top`` ``[B, H, k]`` plus ``sink``, then the window. ``top`` are
    indices within the middle. See :func:`pqbench.kernels.reference.pq_select` for ``only`` and ``out``."""
    batch, heads, count = top.shape
    indices = top.new_empty(batch, heads, room) if out is None else out
    window = length - sink - middle
    chosen = indices[:, :, sink : sink + count]
    if only is None:
        torch.add(top, sink, out=chosen)
    else:
        chosen.copy_(torch.where(only.bool()[:, :, None], top + sink, chosen))
    indices[:, :, :sink] = torch.arange(sink, device=top.device)
    indices[:, :, sink + count : sink + count + window] = torch.arange(sink + middle, length, device=top.device)
    return indices
