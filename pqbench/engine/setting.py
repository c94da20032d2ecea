"""How prompts are run, whatever the method: the options of a run, and which methods can follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from pqbench.engine.clock import CudaStreams, Streams
from pqbench.engine.graphs.check import check_captured, check_methods_ahead
from pqbench.errors import ConfigError, DeviceError
from pqbench.method import Calibration, Method
from pqbench.store.tiers import DeviceTier, Tier
from pqbench.typed import check_types, shown


@dataclass(frozen=True)
class Setting:
    """How prompts are run, whatever the method.

    Attributes:
        tier: where KV lives while decoding.
        overlap: with a single method, build each layer's index while the next layers compute: on a GPU in a stream of
            its own, otherwise on cores that the model's threads leave idle. The tokens are the same without. With
            several methods no index overlaps with the prefill, so that the times of the methods stay apart.
        backend: which kernels compute, see :func:`pqbench.kernels.backend.kernels`.
        calibration: times of this hardware for methods that adapt to it.
        streams: the queues of the device; None for CUDA's on a GPU and for none on the CPU.
        named: the phases of the work have names in the record of a torch profiler.
        graphs: capture one decode step in a CUDA graph and replay it for every further token; on the CPU a recording
            takes the place of the graph. This works for methods that can be captured, on batches of prompts of one
            length.
        select_ahead: select with the query of the step before, while the layer before computes, and select again for
            KV heads whose query has turned since. This works for methods that can select ahead.
        correction: a query counts as turned when its cosine with the query before, averaged over the query heads of a
            KV head, is at most this; with 1 every head selects again.
        max_length: the longest context to run, where that is more than the model was made for; None for the model's
            own limit.

    Raises:
        ConfigError: a value of another type, or ``correction`` is no cosine.
    """

    tier: Tier = field(default_factory=DeviceTier)
    overlap: bool = True
    backend: str = "auto"
    calibration: Calibration | None = None
    streams: Streams | None = None
    named: bool = False
    graphs: bool = False
    select_ahead: bool = False
    correction: float = 0.9
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "Setting")
        if not -1 <= self.correction <= 1:
            raise ConfigError(f"correction is {self.correction}: it is a cosine, from -1 to 1")

    @property
    def options(self) -> dict[str, float]:
        """The options that change how a step runs and that are off by default, as far as they are on."""
        ahead = {"select_ahead": True, "correction": self.correction} if self.select_ahead else {}
        return {**({"graphs": True} if self.graphs else {}), **ahead}

    def check(self, methods: Mapping[str, Method], model: PreTrainedModel | None = None) -> None:
        """Raises ConfigError when a method, or a model, cannot do what is asked for here."""
        if self.graphs:
            check_captured(methods, self.tier, model)
        if self.select_ahead:
            check_methods_ahead(methods)

    @classmethod
    def of(cls, given: Any) -> Setting:
        """What a caller gave, or the defaults for None. Raises ConfigError for anything else than a setting."""
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"setting is {shown(given)}: pass an object, such as Setting(HostTier())")
        return cls() if given is None else given

    def device_answers(self) -> bool:
        """Whether a GPU, if there is one, can go on after an error. After an error of memory it can; after an illegal
        access it cannot."""
        streams = CudaStreams() if self.streams is None else self.streams
        return streams.alive()

    def check_device(self, error: object) -> None:
        """Raises DeviceError when the device no longer answers after an error. Call it once the error is on record."""
        if not self.device_answers():
            raise DeviceError(
                f"the GPU answers no more after this error: {error}. What was measured before is kept, and the same "
                "command goes on from there"
            )
