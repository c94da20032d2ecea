"""The method interface: what a KV-cache method decides, and the budget it decides within.

A method is a dataclass (its fields are its configuration and its repr) that makes one :class:`LayerState` per attention
layer and sequence group. Sequences of a group have equal length and no padding, so a method never sees a mask.
Shapes: B sequences, H KV heads, G query heads per KV head, S tokens, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pqbench.errors import BudgetError, ConfigError
from pqbench.kernels.backend import Kernels, kernels

__all__ = [
    "KV",
    "Budget",
    "BudgetError",
    "CompensatedBudget",
    "ConfigError",
    "Geometry",
    "LayerState",
    "Method",
    "PaperBudget",
    "Residual",
    "Selection",
    "Split",
    "compensated",
]  # fmt: skip


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
        ratio: the budget as a share of the context, in (0, 1]. Exactly one of the two is set.
        window_share: see ``window``.
        minimum: floor of a ratio budget, so that short contexts are attended whole.
        grow: recompute a ratio as the context grows while decoding; otherwise it stays at the prompt's value.

    Raises:
        BudgetError: when the fields contradict each other, or a context leaves less than sink + window.
    """

    sink: int = 32
    window: int | None = None
    tokens: int | None = None
    ratio: float | None = 0.1
    window_share: float = 0.5
    minimum: int = 64
    grow: bool = True

    def __post_init__(self) -> None:
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
    token on top; fixed at the prompt's length (arXiv 2407.12820, released scripts)."""

    grow: bool = False

    def resolve(self, context: int, prompt: int) -> Split:
        """See :meth:`Budget.resolve`; only ``sink`` and ``ratio`` count."""
        base = context if self.grow else prompt
        half = max(0, int((base - self.sink) * (self.ratio or 0) * 0.5))
        if self.sink + 2 * half + 1 >= context:
            return self._whole(context)
        return Split(self.sink, half + 1, half)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            raise BudgetError("the paper's budget is a ratio: set budget.ratio, not budget.tokens")


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
    @property
    def label(self) -> str:
        return f"{100 * (self.ratio or 0):.3g} % (C)"


class Calibration(Protocol):
    """Times measured on this hardware, for methods that fit their work to it."""

    def idle_seconds(self, length: int) -> float:
        """Seconds of clustering that one layer's dense prefill of ``length`` tokens hides."""

    def clustering(self, problems: int, width: int, clusters: int) -> tuple[float, float]:
        """a, b of Time = a + b * points * iterations for ``problems`` K-Means of ``width`` dimensions side by side."""


@dataclass(frozen=True)
class Geometry:
    """What a layer state knows of its layer.

    Attributes:
        layer: index of the layer in the model.
        batch, kv_heads, group, head_dim: B, H, G and D.
        scaling: factor on q.k before the softmax.
        prompt: length of the prompt in tokens.
        inverse_frequencies: rotary frequencies ``[D_rotary / 2]`` in radians per position, when the method asked for
            them with ``Method.needs_positions``.
        layers: number of full-attention layers of the model, of which this is the ``rank``-th, counted from 0.
        body: which kernels compute; one signature, see :mod:`pqbench.kernels.backend`.
        device: where this layer runs.
        calibration: times of this hardware, None where nobody measured them.
    """

    layer: int
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    scaling: float
    prompt: int
    inverse_frequencies: Tensor | None = None
    layers: int = 1
    rank: int = 0
    body: str = "reference"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calibration: Calibration | None = None

    @property
    def kernels(self) -> Kernels:
        """The kernels for tensors on the model's device."""
        return kernels(self.device, self.body)

    def __deepcopy__(self, memo: dict[int, Any]) -> Geometry:
        """Facts do not change: copies of a state share them."""
        return self


class Arrival(Protocol):
    """A tensor on its way to the device."""

    def wait(self) -> Tensor:
        """The tensor, complete."""


class KV(Protocol):
    """Read access to the rows a store holds for one layer; row order is age unless rows were dropped or arranged."""

    @property
    def length(self) -> int:
        """Rows held, the current token included."""

    @property
    def seen(self) -> int:
        """Tokens appended so far, dropped ones included."""

    @property
    def positions(self) -> Tensor:
        """Position of every row, ``[B, H, length]``."""

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys after rotary embedding of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @property
    def device(self) -> torch.device:
        """Where queries and selected rows are."""

    def bring(self, rows: Tensor) -> Arrival:
        """Ask for a tensor in host memory; it crosses the link while the caller goes on."""

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same keys where they lie, on the device or in host memory: nothing is moved."""


@dataclass(frozen=True)
class Residual:
    """What the unselected tokens would have added: merged with the exact part by log-sum-exp.

    Attributes:
        value: ``[B, H, G, D]``, their weighted mean value.
        log_weight: ``[B, H, G]``, log of their summed exp(logit); with ``relative`` it counts from the log-sum-exp of
            the selected tokens instead of from zero.
        relative: see ``log_weight``.
    """

    value: Tensor
    log_weight: Tensor
    relative: bool = False


@dataclass(frozen=True)
class Selection:
    """The rows to attend to in one step.

    Attributes:
        indices: ``[B, H, n]`` store rows, unique and in range; None attends to every row held.
        visible: ``[B, H, G, n]`` bool, which query head sees which row; None means all do. Padding of ragged
            selections is a row no query head sees.
        key_shift: ``[B, H, n]``, positions by which each key is moved before it is scored (methods that renumber).
        residual: estimate of the unselected rest.
    """

    indices: Tensor | None = None
    visible: Tensor | None = None
    key_shift: Tensor | None = None
    residual: Residual | None = None


class LayerState:
    """One method's memory of one layer. The defaults are those of full attention; override what the method needs."""

    needs_weights: ClassVar[bool] = False

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """See a block of dense prefill: q ``[B, H, G, n, D]`` of the last n of the keys and values ``[B, H, S, D]``."""

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of a prompt block by the method itself, where ``Method.own_prefill``: ``[B, H, G, n, D]`` for q
        ``[B, H, G, n, D]`` of the last n of the keys and values ``[B, H, S, D]``. :meth:`observe` follows."""
        raise NotImplementedError(f"{type(self).__name__} has no prefill of its own")

    def finish_prefill(self, kv: KV) -> Tensor | None:
        """Build the index. An evicting method returns the rows ``[B, H, n]`` that it keeps. Another may return all rows
        in an order ``[B, H, S]`` in which it wants them stored; from then on it numbers rows by their places there."""
        return None

    def append(self, kv: KV) -> None:
        """A decoded token was added as the last row."""

    def prefetch(self, kv: KV) -> None:
        """The layer before starts its step: ask for what :meth:`select` will read from the host."""

    def select(self, q: Tensor, kv: KV) -> Selection:
        """Choose the rows for the query q ``[B, H, G, D]``."""
        return Selection()

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        """After each step: return rows ``[B, H, e]`` to drop, if any. With ``needs_weights``, ``weights`` are the
        attention probabilities ``[B, H, G, n]`` of the selected rows."""
        return None

    @property
    def facts(self) -> dict[str, float]:
        """What a record should say about this index besides its size."""
        return {}

    @property
    def index_bytes(self) -> int:
        """Bytes of the index read by one step, all sequences and heads of the layer."""
        return 0

    @property
    def resident_bytes(self) -> int:
        """Bytes the index holds between steps."""
        return 0


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; subclasses are frozen dataclasses whose fields are validated in ``__post_init__``.

    ``evicts``: the store really drops rows. ``needs_positions`` asks for rotary frequencies, ``needs_calibration`` for
    times of this hardware. ``own_prefill``: the prompt runs through :meth:`LayerState.prefill` instead of dense
    attention, so that no other method shares it, and clips distances, so that the trained length is no limit.
    """

    evicts: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    own_prefill: ClassVar[bool] = False

    @abstractmethod
    def layer(self, geometry: Geometry) -> LayerState:
        """A fresh state for one layer and group. Raises ConfigError when the options do not fit the geometry."""

    def attends_all(self, context: int) -> bool:
        """Whether this context is by design attended whole whatever the budget (too short for the method's index)."""
        return False

    def split(self, context: int, prompt: int) -> Split | None:
        """The budget at this length, None when the method has none (full attention)."""
        budget: Any = getattr(self, "budget", None)
        return None if budget is None else budget.resolve(context, prompt)


def compensated(method: Method) -> Method:
    """The method with more tokens when it evicts and its budget is a :class:`CompensatedBudget`; else as it is."""
    budget: Any = getattr(method, "budget", None)
    if not (method.evicts and isinstance(budget, CompensatedBudget)):
        return method
    larger: Any = method  # of some subclass that has a budget
    return replace(larger, budget=budget.for_evicting)
