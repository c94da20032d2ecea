"""Budgets: how many tokens of each kind (sinks, window, top-k) a KV head may attend to, for every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqbench.errors import BudgetError
from pqbench.typed import check_types


@dataclass(frozen=True)
class Split:
    """How many tokens of each kind one KV head attends to in one step.

    Attributes:
        sink: first tokens of the context.
        window: most recent tokens, the current one included.
        top_k: tokens that the method selects from the middle, the tokens between sinks and window.
    """

    sink: int
    window: int
    top_k: int

    @property
    def total(self) -> int:
        """Tokens that one KV head attends to."""
        return self.sink + self.window + self.top_k

    def always(self, positions: Tensor, seen: int) -> Tensor:
        """Which rows are sinks or in the window, bool ``[B, H, n]``, for ``positions`` ``[B, H, n]`` of ``seen``
        tokens."""
        return (positions < self.sink) | (positions >= seen - self.window)

    def middle(self, length: int) -> tuple[int, int]:
        """First and one-past-last index of the middle, whose tokens compete for ``top_k``, at this context length."""
        return self.sink, length - self.window

    def around(self, top: Tensor, length: int) -> Tensor:
        """Indices ``[B, H, sink + k + window]`` of a selection: sinks, ``top`` ``[B, H, k]``, window, in this order."""
        batch, heads, _ = top.shape
        sink = torch.arange(self.sink, device=top.device).expand(batch, heads, -1)
        window = torch.arange(length - self.window, length, device=top.device).expand(batch, heads, -1)
        return torch.cat([sink, top, window], dim=-1)


@dataclass(frozen=True)
class Budget:
    """Tokens that one KV head may attend to in one step, all kinds together.

    Attributes:
        sink: first tokens of the context, always attended to.
        window: most recent tokens, the current one included, always attended to; None computes it from
            ``window_share``.
        tokens: the budget as a number of tokens; None to use ``ratio``.
        ratio: the budget as a share of the context, in (0, 1]. Only one of ``tokens`` and ``ratio`` may be set; with
            ``tokens``, the default ratio becomes None.
        window_share: share of the budget without the sinks that the window gets when ``window`` is None, in [0, 1].
        minimum: smallest number of tokens of a ratio budget, so that all of a short context is attended to.
        grow: recompute a ratio as the context grows while decoding; otherwise the prompt's length counts.

    Raises:
        BudgetError: a field has a wrong type, fields contradict each other, or the budget at some context length is
            smaller than sink + window.
    """

    sink: int = 32
    window: int | None = None
    tokens: int | None = None
    ratio: float | None = 0.1
    window_share: float = 0.5
    minimum: int = 64
    grow: bool = True

    def __post_init__(self) -> None:
        check_types(self, "budget", BudgetError)
        if self.tokens is not None and self.ratio == type(self).ratio:
            object.__setattr__(self, "ratio", None)  # the default was not asked for
        if (self.tokens is None) == (self.ratio is None):
            raise BudgetError("set exactly one of budget.tokens and budget.ratio (the other to null)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise BudgetError(f"budget.ratio is {self.ratio}: it must lie in (0, 1]")
        if not 0 <= self.window_share <= 1:
            raise BudgetError(f"budget.window_share is {self.window_share}: it must lie in [0, 1]")
        if self.sink < 0 or (self.window is not None and self.window < 1):
            raise BudgetError(
                "budget.sink must be at least 0 and budget.window at least 1 (it holds the current token)"
            )
        floor = self.sink + (self.window or 1)
        if self.tokens is not None and self.tokens < floor:
            raise BudgetError(f"budget.tokens is {self.tokens}, below sink + window = {floor}: raise it or lower those")

    def resolve(self, context: int, prompt: int) -> Split:
        """The split for a context of ``context`` tokens, the current one included, of which ``prompt`` are the prompt.

        Raises:
            BudgetError: the budget at this length is smaller than sink + window.
        """
        base = context if self.grow else prompt
        size = self._size(base)
        if size >= context:
            return self._whole(context)
        window = self.window if self.window is not None else max(1, int((size - self.sink) * self.window_share))
        if size < self.sink + window:
            raise BudgetError(
                f"a budget of {size} tokens (ratio {self.ratio} of {base}) is below sink {self.sink} + window "
                f"{window}: raise budget.ratio or budget.minimum, or lower budget.sink or budget.window"
            )
        return Split(self.sink, window, size - self.sink - window)

    def between_steps(self, seen: int, prompt: int) -> Split:
        """What an evicting method holds between two steps, after ``seen`` tokens: the split of the next step without
        the token of that step."""
        split = self.resolve(seen + 1, prompt)
        return Split(split.sink, split.window - 1, split.top_k)

    @property
    def label(self) -> str:
        """A short text for the budget in tables."""
        return f"{self.tokens} tokens" if self.tokens is not None else f"{100 * (self.ratio or 0):g} %"

    def _size(self, context: int) -> int:
        return self.tokens if self.tokens is not None else max(self.minimum, int((self.ratio or 0) * context))

    def _whole(self, context: int) -> Split:
        """The split that attends to every token. Middle tokens still count as top_k, so that the method's search
        runs."""
        sink = min(self.sink, context - 1)
        window = min(self.window or max(1, int((context - sink) * self.window_share)), context - sink)
        return Split(sink, window, context - sink - window)


@dataclass(frozen=True)
class PaperBudget(Budget):
    """The split of PQCache's experiments (arXiv 2407.12820, released scripts): ``ratio x (prompt - sink)`` tokens, half
    of them window and half top-k. Sinks and the current token are added to that. The split is fixed by the prompt.

    Attributes:
        sink: first tokens of the context, in addition to the ratio.
        ratio: share of the prompt without its sinks.
        grow: recompute the split as the context grows while decoding; the paper does not.

    Raises:
        BudgetError: a field of :class:`Budget` is set that this budget does not use (tokens, window, window_share,
            minimum).
    """

    grow: bool = False

    def resolve(self, context: int, prompt: int) -> Split:
        """See :meth:`Budget.resolve`; only ``sink``, ``ratio`` and ``grow`` are used."""
        base = context if self.grow else prompt
        half = max(0, int((base - self.sink) * (self.ratio or 0) * 0.5))
        if self.sink + 2 * half + 1 >= context:
            return self._whole(context)
        return Split(self.sink, half + 1, half)

    def __post_init__(self) -> None:
        if self.tokens is not None or self.ratio is None:
            raise BudgetError("the paper's budget is a ratio: set budget.ratio, not budget.tokens")
        super().__post_init__()
        for name in ("window", "window_share", "minimum"):
            value = getattr(self, name)
            if value != getattr(Budget, name):
                raise BudgetError(
                    f"budget.{name} is {value}, but the paper's budget does not use it: half of the ratio is window, "
                    f"half is top-k. Leave budget.{name} out, or use budget=default"
                )


@dataclass(frozen=True)
class CompensatedBudget(PaperBudget):
    """The paper's budget with compensation (arXiv 2407.12820). Evicting methods read no index; the paper's baselines
    marked "(C)" keep more tokens instead. The paper does not say how many, so that there are two readings;
    :func:`pqbench.method.compensated` applies them.

    Attributes:
        communication: phi, index bytes that the other methods read per step and byte of keys (paper: 1/128, 1/64).
        reading: how index bytes become tokens. ``kv``: tokens whose keys and values have as many bytes, phi / 2 of the
            context. ``keys``: tokens whose keys have as many bytes, phi of the context.

    Raises:
        BudgetError: phi is outside [0, 1], or there is no such reading.
    """

    communication: float = 1 / 128
    reading: str = "kv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.communication <= 1:
            raise BudgetError(f"budget.communication is {self.communication}: it must lie in [0, 1]")
        if self.reading not in ("kv", "keys"):
            raise BudgetError(f"budget.reading is {self.reading!r}: use kv or keys")

    @property
    def for_evicting(self) -> Budget:
        """The larger budget of an evicting method; its label ends with (C)."""
        extra = self.communication / 2 if self.reading == "kv" else self.communication
        return _Enlarged(self.sink, ratio=min(1.0, (self.ratio or 0) + extra), grow=self.grow)


class _Enlarged(PaperBudget):
    """The paper's budget with a larger ratio."""

    @property
    def label(self) -> str:
        return f"{100 * (self.ratio or 0):.3g} % (C)"
