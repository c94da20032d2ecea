"""The method interface: what a KV-cache method decides, within its :class:`pqbench.budget.Budget`.

A method is a dataclass (its fields are its configuration and its repr) that makes one :class:`LayerState` per attention
layer and sequence group. Sequences of a group have equal length and no padding, so a method never sees a mask.
Shapes: B sequences, H KV heads, G query heads per KV head, S tokens, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from pqbench.budget import Budget, CompensatedBudget, PaperBudget, Split
from pqbench.errors import BudgetError, ConfigError
from pqbench.kernels import sinks
from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.number import Number
from pqbench.typed import check_types

__all__ = [
    "KV",
    "Budget",
    "BudgetError",
    "Check",
    "CompensatedBudget",
    "ConfigError",
    "Geometry",
    "LayerState",
    "Method",
    "Number",
    "PaperBudget",
    "Plan",
    "Residual",
    "Selection",
    "Split",
    "compensated",
]


class Calibration(Protocol):
    """Times measured on this hardware, for methods that fit their work to them."""

    def idle_seconds(self, length: int) -> float:
        """Seconds of clustering that one layer's dense prefill of ``length`` tokens hides."""

    def clustering(self, problems: int, width: int, clusters: int) -> tuple[float, float]:
        """a, b of Time = a + b * points * iterations for ``problems`` K-Means of ``width`` dimensions side by side."""


@dataclass(frozen=True)
class Geometry:
    """The facts of its layer that a layer state may use.

    Attributes:
        layer: index of the layer in the model.
        batch, kv_heads, group, head_dim: B, H, G and D.
        scaling: factor on q.k before the softmax.
        prompt: length of the prompt in tokens.
        inverse_frequencies: rotary frequencies ``[D_rotary / 2]`` in radians per position, when the method asked for
            them with ``Method.needs_positions``; none of them where the layer does not rotate its keys.
        layers: number of full-attention layers of the model, of which this is the ``rank``-th, counted from 0.
        backend: which kernels compute; one signature, see :mod:`pqbench.kernels.backend`.
        device: where this layer runs.
        calibration: times of this hardware, None where nobody measured them.
        sinks: ``[H, G]`` float32, logits that the model learned for this layer: each takes part in its head's softmax
            and brings no value. Attention counts them by itself; probabilities of tokens come from
            :meth:`column_sums` and :meth:`exact_probabilities`, which count them too.
        correction: with selection ahead, the cosine up to which a query counts as turned, see
            :class:`pqbench.engine.setting.Setting`; None without.
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
    backend: str = "reference"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calibration: Calibration | None = None
    sinks: Tensor | None = None
    correction: float | None = None

    def column_sums(self, q: Tensor, keys: Tensor, band: int | None = None) -> Tensor:
        """Attention each key received, see :func:`pqbench.kernels.reference.column_sums`: float32 ``[B, H, S]``."""
        if self.sinks is None:
            return self.kernels.column_sums(q, keys, self.scaling, band=band)
        return sinks.column_sums(q, keys, self.scaling, self.sinks, band)

    def exact_probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        """Attention that each key ``[B, H, S, D]`` receives from q ``[B, H, G, D]``, group summed: float32
        ``[B, H, S]``."""
        if self.sinks is None:
            return self.kernels.exact_probabilities(q, keys, self.scaling)
        return sinks.exact_probabilities(q, keys, self.scaling, self.sinks)

    @property
    def kernels(self) -> Kernels:
        """The kernels for tensors on the model's device."""
        return kernels(self.device, self.backend)

    def __deepcopy__(self, memo: dict[int, Any]) -> Geometry:
        """Facts do not change: copies of a state share them."""
        return self


class Arrival(Protocol):
    """A tensor that is on its way to the device."""

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

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:
        """Bring the first ``count`` of rows ``[B, H, n]`` to the device before the coming step asks for them, at
        these places of its selection. The step names the heads that will ask for other rows in
        :attr:`Selection.anew`."""

    def keys_at(self, rows: Tensor) -> Tensor:
        """Keys of rows ``[B, H, n]`` on the device, ``[B, H, n, D]``."""

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same keys where an index is best built from them. That is where they lie, so that nothing is moved;
        but keys that lie across the link of a GPU are brought to the GPU. The backend for the device of these keys
        computes."""


@dataclass(frozen=True)
class Residual:
    """What the unselected tokens would have added to the output. It is merged with the exact part by log-sum-exp.

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
        log_weights: ``[B, H, G, n]`` or ``[B, H, 1, n]`` float32, added to the logits: log of how many tokens a row
            stands for, where rows are a sample of more.
        count: how many of the n rows count, from the first on; None means all. The rows behind them may be
        anything. A captured step always selects into the same room, and says by this number how much of it is
        filled.
        anew: bool ``[B, H]``, after :meth:`KV.fetch_ahead`: heads whose rows differ from those that were asked for
        ahead.
    """

    indices: Tensor | None = None
    visible: Tensor | None = None
    key_shift: Tensor | None = None
    residual: Residual | None = None
    log_weights: Tensor | None = None
    count: Number | None = None
    anew: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What the host knows of a captured step before it is replayed: the numbers that :meth:`LayerState.select`
    reads, and how many tokens a KV head attends to (None for all)."""

    numbers: tuple[int, ...] = ()
    attended: int | None = None


@dataclass(frozen=True)
class Check:
    """Something that an index takes for granted and that only the device knows while the index is built. It is
    looked at once, after the work, so that nothing waits in the middle of a prefill.

    Attributes:
        holds: bool ``[]`` on the device.
        message: text of the ConfigError that is raised if it does not hold.
    """

    holds: Tensor
    message: str


class LayerState:
    """One method's memory of one layer. The defaults are those of full attention; override what the method needs."""

    needs_weights: ClassVar[bool] = False
    numbers: Sequence[Number] | None = None  # with a captured step: those of its plan, on the device

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
        """The layer before starts its step: ask for what :meth:`select` will read from the host, or do what needs no
        query. The token of the step is not stored yet."""

    def reserve(self, kv: KV, rows: int) -> bool:
        """Get ready for a captured step: until there are ``rows`` rows, no tensor that a step reads may move, and all
        steps have one shape. Returns False while they do not have it yet."""
        return True

    def plan(self, kv: KV, length: int) -> Plan:
        """The host's part of the captured step that will make ``length`` rows, in place of :meth:`append`: called
        before the token is stored and :meth:`select` is replayed. As many numbers in every step."""
        return Plan()

    @property
    def fixed(self) -> list[Tensor]:
        """Tensors that a captured step reads where they are."""
        return []

    def select(self, q: Tensor, kv: KV) -> Selection:
        """Choose the rows for the query q ``[B, H, G, D]``."""
        return Selection()

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        """After each step: return rows ``[B, H, e]`` to drop, if any. With ``needs_weights``, ``weights`` are the
        attention probabilities ``[B, H, G, n]`` of the selected rows."""
        return None

    @property
    def checks(self) -> list[Check]:
        """Conditions that the index takes for granted. The harness looks at them after the index is built and at
        the end of decoding."""
        return []

    @property
    def facts(self) -> dict[str, float]:
        """Facts about this index that a record should hold besides its size."""
        return {}

    @property
    def index_bytes(self) -> int:
        """Bytes of its own index that the last step read, all sequences and heads of the layer.

        Keys that :meth:`select` reads through :meth:`KV.keys`, :meth:`KV.keys_at` or :meth:`KV.stored_keys` do not
        belong here: the store counts them, and the meters add them to this figure.
        """
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

    def __init_subclass__(cls, **options: Any) -> None:
        """The types of a method's fields are checked before the method itself looks at their values."""
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @wraps(own)
        def checked(self: Method) -> None:
            check_types(self, type(self).__name__)
            own(self)

        setattr(cls, "__post_init__", checked)  # noqa: B010 - a plain assignment to a method is no longer typed

    def __post_init__(self) -> None:
        """Raises ConfigError when a field has a value of another type than its annotation says."""
        check_types(self, type(self).__name__)

    def why_not_captured(self, offloads: bool) -> str | None:
        """Why no CUDA graph can hold a decode step of this method, in words that follow its name; None where one can.
        ``offloads``: whether the prompt lies in host memory."""
        return "has steps of changing shape"

    def why_not_ahead(self) -> str | None:
        """Why this method cannot select with the query of the step before, in words that follow its name; None where it
        can."""
        return "does not select with the query of the step before"

    @abstractmethod
    def layer(self, geometry: Geometry) -> LayerState:
        """A fresh state for one layer and group. Raises ConfigError when the options do not fit the geometry."""

    def attends_all(self, context: int, prompt: int | None = None) -> bool:
        """Whether this context, which began with a prompt of so many tokens (None for all of it), is attended whole by
        design, whatever the budget, because it is too short for the method's index."""
        return False

    @cached_property  # a class attribute that the field of a subclass can replace
    def budget(self) -> Budget | None:
        """How many tokens a KV head may attend to; None for a method that has no budget (full attention)."""
        return None

    @property
    def budget_label(self) -> str:
        """The budget in a word, for tables; ``all`` for a method without one."""
        return "all" if self.budget is None else self.budget.label

    def with_budget(self, budget: Budget) -> Self:
        """The same method with another budget, in place of the one that it has."""
        options: dict[str, Any] = {"budget": budget}
        return replace(self, **options)

    def split(self, context: int, prompt: int) -> Split | None:
        """The budget at this length, None when the method has none (full attention)."""
        return None if self.budget is None else self.budget.resolve(context, prompt)

    @property
    def beyond_budget(self) -> str | None:
        """Why steps of this method attend to more tokens than the budget says, or to a number that varies, in words
        that follow its name; None for a method that keeps to its budget. A record says it, and the harness does not
        compare such a method with its budget."""
        return None

    def limit(self, context: int, geometry: Geometry) -> int | None:
        """The largest number of tokens that one KV head of this layer may attend to in the step that makes the context
        ``context`` tokens long; None for no limit. An evicting method may not hold more rows than that either."""
        if self.budget is None or self.beyond_budget or self.attends_all(context, geometry.prompt):
            return None
        return self.budget.resolve(context, geometry.prompt).total


def compensated(method: Method) -> Method:
    """The method with more tokens when it evicts and its budget is a :class:`CompensatedBudget`; else as it is."""
    enlarged = method.budget.for_evicting if isinstance(method.budget, CompensatedBudget) else None
    return method.with_budget(enlarged) if method.evicts and enlarged is not None else method
