"""How prompts are run, whatever the method: the options of a run, and checks that a method and a model support them."""

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
            its own, otherwise on cores that the model's threads leave idle. The tokens do not change. With several
            methods no index overlaps with the prefill, so that the times of the methods can be told apart.
        backend: which kernels compute, see :func:`pqbench.kernels.backend.kernels`.
        calibration: times of this hardware for methods that adapt to it.
        streams: the queues of the device; with None, CUDA's streams on a GPU and no streams on the CPU.
        named: whether the phases of the work have names in the record of a torch profiler.
        graphs: capture one decode step in a CUDA graph and replay it for every further token. On the CPU a recording
            takes the place of the graph. This works only for methods that can be captured, and only for batches of
            prompts of the same length.
        select_ahead: select early, with the query of the previous step, while the previous layer computes. KV heads
            whose query has turned since then select again. This works only for methods that can select ahead.
        correction: a query counts as turned when its cosine with the previous query, averaged over the query group of a
            KV head, is at most this value. With 1 every head selects again.
        max_length: the longest context in tokens, for contexts longer than the model's own limit; None for that limit.

    Raises:
        ConfigError: a value has the wrong type, or ``correction`` is not in [-1, 1].
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
        """The options that are on, among those that change how a step runs and are off by default."""
        ahead = {"select_ahead": True, "correction": self.correction} if self.select_ahead else {}
        return {**({"graphs": True} if self.graphs else {}), **ahead}

    def check(self, methods: Mapping[str, Method], model: PreTrainedModel | None = None) -> None:
        """Raises ConfigError when a method or the model does not support these options."""
        if self.graphs:
            check_captured(methods, self.tier, model)
        if self.select_ahead:
            check_methods_ahead(methods)

    @classmethod
    def of(cls, given: Any) -> Setting:
        """The caller's setting, or the default setting for None. Raises ConfigError for anything else."""
        if given is not None and not isinstance(given, cls):
            raise ConfigError(f"setting is {shown(given)}: pass an object, such as Setting(HostTier())")
        return cls() if given is None else given

    def device_answers(self) -> bool:
        """Whether the GPU, if there is one, still works after an error. It does after running out of memory, but not
        after an illegal access."""
        streams = CudaStreams() if self.streams is None else self.streams
        return streams.alive()

    def check_device(self, error: object) -> None:
        """Raises DeviceError when the device no longer answers after an error. Call it only after the error has been
        recorded."""
        if not self.device_answers():
            raise DeviceError(
                f"the GPU no longer answers after this error: {error}. Finished measurements are kept, and the same "
                "command continues from there"
            )
