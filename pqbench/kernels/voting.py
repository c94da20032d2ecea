"""Votes of the last prompt queries for tokens, for methods that keep the tokens which these queries attend to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def pooled(votes: Tensor, kernel: int, kind: str) -> Tensor:
    """Average (``avg``) or maximum (``max``) of ``kernel`` neighbouring votes, ``kernel`` odd: ``[B, H, M]`` for votes
    ``[B, H, M]``."""
    if kernel == 1 or votes.shape[-1] == 0:
        return votes
    pool = functional.avg_pool1d if kind == "avg" else functional.max_pool1d
    return pool(votes, kernel, stride=1, padding=kernel // 2)


def refused(observation: int, kernel: int, pooling: str) -> str | None:
    """Why votes cannot be taken and pooled in this way, as ``field is value: remedy``; None if they can."""
    if observation < 1:
        return f"observation is {observation}: at least 1 query must vote"
    if kernel < 1 or kernel % 2 == 0:
        return f"kernel is {kernel}: it must be odd, 1 for no pooling"
    return None if pooling in ("avg", "max") else f"pooling is {pooling!r}: use avg or max"


class Votes:
    """Holds the last queries ``[B, H, G, w, D]`` during the prefill, and at its end their votes ``[B, H, S]``."""

    def __init__(self, observation: int, prompt: int) -> None:
        """The last ``observation`` of ``prompt`` queries vote."""
        self._observation, self._prompt = observation, prompt
        self._queries: Tensor | None = None
        self._votes: Tensor | None = None

    def observe(self, q: Tensor, keys: Tensor, column_sums: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Called for each block of the prompt: queries ``[B, H, G, n, D]`` of the last n of the keys ``[B, H, S, D]``.
        ``column_sums(queries, keys)`` returns the votes, the attention that each key receives."""
        recent = q if self._queries is None else torch.cat([self._queries, q], dim=3)
        recent = recent[:, :, :, -self._observation :]
        if keys.shape[2] < self._prompt:
            self._queries = recent.clone()  # a view would hold the whole block
        else:
            self._queries, self._votes = None, column_sums(recent, keys)

    def take(self, first: int, stop: int, kernel: int, kind: str) -> Tensor:
        """The :func:`pooled` votes for tokens ``first`` to ``stop``; frees the votes.

        Raises:
            RuntimeError: the end of the prompt was not observed, or the votes were taken before.
        """
        if self._votes is None:
            raise RuntimeError("finish_prefill() before observe() saw the end of the prompt")
        votes, self._votes = self._votes[:, :, first:stop], None
        return pooled(votes, kernel, kind)


def oldest_generated(positions: Tensor, seen: int, voted: int, kept: Tensor, count: int) -> Tensor:
    """The ``count`` rows ``[B, H, count]`` to drop, of rows at ``positions`` ``[B, H, n]`` in a context of ``seen``
    tokens. The oldest rows from position ``voted`` on are dropped first, then the oldest rows before it, but no row
    that is ``kept``, bool ``[B, H, n]``."""
    order = positions + seen * (positions < voted)
    return order.masked_fill(kept, 2 * seen).topk(count, dim=-1, largest=False).indices
