"""How many tokens a KV head may attend to, and of which kind: resolved here for every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqbench.errors import BudgetError
from pqbench.typed import check_types


@dataclass(frozen=True)
class Split:
    """How many tokens of each kind one KV head attends to in one step; the window includes the current token."""

    sink: int
    window: int
    top_k: int

    @property
    def total(self) -> int:
        """Attended tokens per KV head."""
        return self.sink + self.window + self.top_k

    def always(self, positions: Tensor, seen: int) -> Tensor:
        """Which rows at ``positions`` ``[B, H, n]`` of ``seen`` tokens are sinks or in the window: bool, same shape."""
        return (positions < self.sink) | (positions >= seen - self.window)

    def middle(self, length: int) -> tuple[int, int]:
        """First and one-past-last index of the tokens that compete for ``top_k``."""
        return self.sink, length - self.window

    def around(self, top: Tensor, length: int) -> Tensor:
        """Indices ``[B, H, sink + k + window]`` of a selection: sinks, then ``top`` ``[B, H, k]``, then the window."""
        batch, heads, _ = top.shape
        sink = torch.arange(self.sink, device=top.device).expand(batch, heads, -1)
        window = torch.arange(length - self.window, length, device=top.device).expand(batch, heads, -1)
        return torch.cat([sink, top, window], dim=-1)


@dataclass(frozen=True)
class Budget:
    """Tokens that one KV head may attend to in one step, all kinds together.

    Attributes:
        sink: first tokens of the context, always attended.
        window: most recent tokens, the current one included, always attended; None gives them ``window_share`` of what
            the sinks leave.
        tokens: the budget as a number of tokens, or
        ratio: the budget as a share of the context, in (0, 1]. Exactly one of the two counts: with ``tokens`` the
            default ratio becomes None.
        window_share: see ``window``.
        minimum: floor of a ratio budget, so that short contexts are attended whole.
        grow: recompute a ratio as the context grows while decoding; otherwise it stays at the prompt's value.

    Raises:
        BudgetError: when a field has another type, the fields contradict each other, or a context leaves less than sink
            + window.
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
            object.__setattr__(self, "ratio", None)  # nobody asked for the default
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
        """The split for ``context`` cached tokens (the current one included) that began as ``prompt`` tokens."""
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
        """What an evicting method holds between two steps, when ``seen`` tokens have been appended: the split of the
        next step without that step's own token, which completes it."""
        split = self.resolve(seen + 1, prompt)
        return Split(split.sink, split.window - 1, split.top_k)

    @property
    def label(self) -> str:
        """The budget in a word, for tables."""
        return f"{self.tokens} tokens" if self.tokens is not None else f"{100 * (self.ratio or 0):g} %"

    def _size(self, context: int) -> int:
        return self.tokens if self.tokens is not None else max(self.minimum, int((self.ratio or 0) * context))

    def _whole(self, context: int) -> Split:
        """Everything fits. The middle still competes, so that a method's own path is the one that runs."""
        sink = min(self.sink, context - 1)
        window = min(self.window or max(1, int((context - sink) * self.window_share)), context - sink)
        return Split(sink, window, context - sink - window)


@dataclass(frozen=True)
class PaperBudget(Budget):
    """The split of PQCache's experiments: half window, half top-k of ``ratio x (prompt - sink)``; sinks and the current
    token on top; fixed at the prompt's length (arXiv 2407.12820, released scripts).

    Attributes:
        sink: first tokens of the context, on top of the ratio.
        ratio: share of the prompt without its sinks.
        grow: recompute the split as the context grows while decoding; the paper does not.

    Raises:
        BudgetError: a field of :class:`Budget` is set that this budget does not use (tokens, window, window_share,
            minimum).
    """

    grow: bool = False

    def resolve(self, context: int, prompt: int) -> Split:
        """See :meth:`Budget.resolve`; ``sink``, ``ratio`` and ``grow`` count."""
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
    """The paper's budget with compensation: methods that evict read no index, so the paper's "(C)" baselines keep more
    tokens instead. It does not define how many; both readings are here (:func:`compensated` applies them).

    Attributes:
        communication: phi, index bytes that the other methods read per step and byte of keys (paper: 1/128, 1/64).
        reading: ``kv``, tokens whose keys and values are as many bytes, phi / 2 of the context; ``keys``, tokens whose
            keys are, phi of the context.

    Raises:
        BudgetError: phi outside [0, 1], or no such reading.
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
        """The budget of a method that evicts, labelled (C)."""
        extra = self.communication / 2 if self.reading == "kv" else self.communication
        return _Enlarged(self.sink, ratio=min(1.0, (self.ratio or 0) + extra), grow=self.grow)


class _Enlarged(PaperBudget):
    """The paper's budget with a larger ratio."""

    @property
    def label(self) -> str:
        return f"{100 * (self.ratio or 0):.3g} % (C)"
