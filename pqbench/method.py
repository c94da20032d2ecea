"""The method interface: what a KV-cache method decides, within its :class:`pqbench.budget.Budget`.

A method is a dataclass (its fields are its configuration and its repr) that makes one :class:`LayerState` per attention
layer and cohort. The sequences of a cohort have equal length and no padding, so a method never sees a mask.
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
    """Times measured on this hardware, for methods that adapt the amount of their work to it."""

    def idle_seconds(self, length: int) -> float:
        """Seconds of clustering that can run behind one layer's dense prefill of ``length`` tokens."""

    def clustering(self, problems: int, width: int, clusters: int) -> tuple[float, float]:
        """a, b in seconds = a + b * points * iterations, for ``problems`` parallel K-Means of ``width`` dimensions."""


@dataclass(frozen=True)
class Geometry:
    """Facts about one layer that its state may use.

    Attributes:
        layer: index of the layer in the model.
        batch, kv_heads, group, head_dim: B, H, G and D.
        scaling: factor on q.k before the softmax.
        prompt: length of the prompt in tokens.
        inverse_frequencies: rotary frequencies ``[D_rotary / 2]`` in radians per position, when the method asked for
            them with ``Method.needs_positions``; an empty tensor where the layer does not rotate its keys.
        layers, rank: number of full-attention layers of the model, and the number of this one among them, from 0.
        backend: name of the backend that computes; all have the same functions, see :mod:`pqbench.kernels.backend`.
        device: where this layer runs.
        calibration: times of this hardware; None if they have not been measured.
        sinks: ``[H, G]`` float32, logits that the model learned for this layer. Each takes part in the softmax of its
            head and adds no value. Attention includes them by itself; :meth:`column_sums` and
            :meth:`exact_probabilities`, which give the probabilities of tokens, include them too.
        correction: with selection ahead, a query whose cosine to the previous one is at most this counts as turned, see
            :class:`pqbench.engine.setting.Setting`; None without selection ahead.
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
        """Attention that each key received, float32 ``[B, H, S]``: :func:`pqbench.kernels.reference.column_sums`."""
        if self.sinks is None:
            return self.kernels.column_sums(q, keys, self.scaling, band=band)
        return sinks.column_sums(q, keys, self.scaling, self.sinks, band)

    def exact_probabilities(self, q: Tensor, keys: Tensor) -> Tensor:
        """Attention that each key ``[B, H, S, D]`` receives from q ``[B, H, G, D]``, summed over the query group:
        float32 ``[B, H, S]``."""
        if self.sinks is None:
            return self.kernels.exact_probabilities(q, keys, self.scaling)
        return sinks.exact_probabilities(q, keys, self.scaling, self.sinks)

    @property
    def kernels(self) -> Kernels:
        """The kernels for tensors on the model's device."""
        return kernels(self.device, self.backend)

    def __deepcopy__(self, memo: dict[int, Any]) -> Geometry:
        """Copies of a state share the facts, because they do not change."""
        return self


class Arrival(Protocol):
    """A tensor that is on its way to the device."""

    def wait(self) -> Tensor:
        """Wait until the tensor is complete, and return it."""


class KV(Protocol):
    """Read access to the rows that a store holds for one layer, oldest first unless rows were dropped or arranged."""

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
        """Keys of rows ``start`` to ``stop`` after rotary embedding, ``[B, H, n, D]``."""

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @property
    def device(self) -> torch.device:
        """Where queries and selected rows are."""

    def bring(self, rows: Tensor) -> Arrival:
        """Start to bring a tensor from host memory to the device; the caller does not wait."""

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:
        """Bring the first ``count`` of rows ``[B, H, n]`` to the device before the next step selects them. The step
        must name them at the same places of its selection; heads that do not are marked in :attr:`Selection.anew`."""

    def keys_at(self, rows: Tensor) -> Tensor:
        """Keys of rows ``[B, H, n]`` on the device, ``[B, H, n, D]``."""

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same keys ``[B, H, n, D]``, on the device on which an index should be built from them. That is where they
        are stored, so that nothing is moved; but for a model on a GPU, keys in host memory are brought to the GPU.
        Compute with the backend for the device of the returned keys."""


@dataclass(frozen=True)
class Residual:
    """An estimate of what the unselected tokens add to the output. It is merged with the exact part by log-sum-exp.

    Attributes:
        value: ``[B, H, G, D]``, the weighted mean value of the unselected tokens.
        log_weight: ``[B, H, G]``, log of the sum of exp(logit) over the unselected tokens.
        relative: whether ``log_weight`` is the difference to the log-sum-exp of the selected tokens.
    """

    value: Tensor
    log_weight: Tensor
    relative: bool = False


@dataclass(frozen=True)
class Selection:
    """The rows to attend to in one step.

    Attributes:
        indices: ``[B, H, n]`` store rows, unique and in range; None attends to every row held.
        visible: ``[B, H, G, n]`` bool, which query head sees which row; None means that every head sees every row. A
            selection whose heads have different sizes is padded with rows that no query head sees.
        key_shift: ``[B, H, n]``, positions by which each key is moved before it is scored (methods that renumber).
        residual: estimate of what the unselected tokens add; None for nothing.
        log_weights: ``[B, H, G, n]`` or ``[B, H, 1, n]`` float32, added to the logits: log of the number of tokens that
            a sampled row stands for.
        count: only the first ``count`` of the n rows are attended to, the others may be anything; None means all n. A
            captured step always has the same n, and this number says how many of the rows are filled.
        anew: bool ``[B, H]``, after :meth:`KV.fetch_ahead`: heads whose rows differ from those fetched ahead.
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
    """What the host knows about a captured step before it is replayed.

    Attributes:
        numbers: the numbers that :meth:`LayerState.select` reads.
        attended: tokens that a KV head attends to; None for all.
    """

    numbers: tuple[int, ...] = ()
    attended: int | None = None


@dataclass(frozen=True)
class Check:
    """A condition that an index needs and that is computed on the device. It is read only after the index is built, so
    that a prefill never waits for the device.

    Attributes:
        holds: bool ``[]`` on the device.
        message: text of the ConfigError that is raised if the condition does not hold.
    """

    holds: Tensor
    message: str


class LayerState:
    """A method's state in one layer. The defaults give full attention; a subclass overrides what its method needs."""

    needs_weights: ClassVar[bool] = False
    numbers: Sequence[Number] | None = None  # Plan.numbers on the device, in a captured step

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called for each block of a prefill with q ``[B, H, G, n, D]`` of the last n of all keys ``[B, H, S, D]``."""

    def prefill(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The method's own attention for a block of the prompt, if ``Method.own_prefill``: output ``[B, H, G, n, D]``
        for q ``[B, H, G, n, D]`` of the last n of the keys and values ``[B, H, S, D]``. :meth:`observe` follows."""
        raise NotImplementedError(f"{type(self).__name__} has no prefill of its own")

    def finish_prefill(self, kv: KV) -> Tensor | None:
        """Build the index. An evicting method returns the rows ``[B, H, n]`` that it keeps. Another method returns
        None, or all rows ``[B, H, S]`` in the order in which they are to be stored and numbered from then on."""
        return None

    def append(self, kv: KV) -> None:
        """Called after the token of a decode step was stored as the last row."""

    def prefetch(self, kv: KV) -> None:
        """Called when the previous layer starts its step: ask for what :meth:`select` will read from the host, and do
        the work that needs no query. The token of the step is not stored yet."""

    def reserve(self, kv: KV, rows: int) -> bool:
        """Prepare for a captured step: until there are ``rows`` rows, no tensor that a step reads may move, and all
        steps must have the same shapes. Returns False as long as this is not possible."""
        return True

    def plan(self, kv: KV, length: int) -> Plan:
        """The host's part of the captured step after which there are ``length`` rows. It replaces :meth:`append` and
        is called before the token is stored and :meth:`select` is replayed. All plans have equally many numbers."""
        return Plan()

    @property
    def fixed(self) -> list[Tensor]:
        """Tensors that a captured step reads and that therefore must not move."""
        return []

    def select(self, q: Tensor, kv: KV) -> Selection:
        """Select the rows that the query q ``[B, H, G, D]`` attends to."""
        return Selection()

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        """Called after each step; returns the rows ``[B, H, e]`` to drop, or None. With ``needs_weights``, ``weights``
        are the attention probabilities ``[B, H, G, n]`` of the selected rows."""
        return None

    @property
    def checks(self) -> list[Check]:
        """Conditions that the index needs. The harness reads them after the index is built and at the end of
        decoding."""
        return []

    @property
    def facts(self) -> dict[str, float]:
        """Numbers about this index that a record should hold besides its size."""
        return {}

    @property
    def index_bytes(self) -> int:
        """Bytes of the index that the last step read, over all sequences and heads of the layer.

        Keys that :meth:`select` reads through :meth:`KV.keys`, :meth:`KV.keys_at` or :meth:`KV.stored_keys` do not
        belong here: the store counts them, and the measurement adds them.
        """
        return 0

    @property
    def resident_bytes(self) -> int:
        """Bytes that the index holds between steps."""
        return 0


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; subclasses are frozen dataclasses whose fields are validated in ``__post_init__``.

    ``evicts``: the store really drops rows. ``needs_positions`` asks for rotary frequencies, ``needs_calibration`` for
    times of this hardware. ``own_prefill``: the prompt runs through :meth:`LayerState.prefill`, not dense attention. No
    other method shares that prefill, and its distances are clipped, so the prompt may exceed the trained length.
    """

    evicts: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    own_prefill: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the types of a method's fields checked before its own ``__post_init__`` reads their values."""
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
        """Check the fields. Raises ConfigError when the type of a value is not the one that its annotation says."""
        check_types(self, type(self).__name__)

    def why_not_captured(self, offloads: bool) -> str | None:
        """Why a decode step of this method cannot be captured in a CUDA graph, in words that follow the method's name;
        None if it can. ``offloads``: whether the prompt lies in host memory."""
        return "has steps of changing shape"

    def why_not_ahead(self) -> str | None:
        """Why this method cannot select with the query of the previous step, in words that follow the method's name;
        None if it can."""
        return "does not select with the query of the step before"

    @abstractmethod
    def layer(self, geometry: Geometry) -> LayerState:
        """A new state for one layer and cohort. Raises ConfigError when the options do not fit the geometry."""

    def attends_all(self, context: int, prompt: int | None = None) -> bool:
        """Whether the method attends to all of a context of this length, with any budget, because the context is too
        short for the method's index. It began with ``prompt`` tokens; None for all of it."""
        return False

    @cached_property  # a class attribute that the field of a subclass can replace
    def budget(self) -> Budget | None:
        """How many tokens a KV head may attend to; None for a method without a budget (full attention)."""
        return None

    @property
    def budget_label(self) -> str:
        """A short text for the budget in tables; ``all`` for a method without a budget."""
        return "all" if self.budget is None else self.budget.label

    def with_budget(self, budget: Budget) -> Self:
        """The same method with another budget."""
        options: dict[str, Any] = {"budget": budget}
        return replace(self, **options)

    def split(self, context: int, prompt: int) -> Split | None:
        """The split of the budget at this length; None for a method without a budget (full attention)."""
        return None if self.budget is None else self.budget.resolve(context, prompt)

    @property
    def beyond_budget(self) -> str | None:
        """Why steps of this method attend to more tokens than the budget, or to a varying number, in words that follow
        the method's name; None for a method that keeps to its budget. Records hold this text, and the harness does not
        check such a method against its budget."""
        return None

    def limit(self, context: int, geometry: Geometry) -> int | None:
        """The largest number of tokens that one KV head of this layer may attend to in the step after which the context
        is ``context`` tokens long; None for no limit. An evicting method may not hold more rows either."""
        if self.budget is None or self.beyond_budget or self.attends_all(context, geometry.prompt):
            return None
        return self.budget.resolve(context, geometry.prompt).total


def compensated(method: Method) -> Method:
    """The method, with a larger budget if it evicts and its budget is a :class:`CompensatedBudget`."""
    enlarged = method.budget.for_evicting if isinstance(method.budget, CompensatedBudget) else None
    return method.with_budget(enlarged) if method.evicts and enlarged is not None else method
