"""What one layer's decode may cost on a GPU: launches of a step, what comes on top now and then, and waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.fake_cuda.drive import STEPS, Decode
from tests.fake_cuda.tally import COPY, SYNC, TORCH, TRITON


@dataclass(frozen=True)
class Cost:
    """The most that a decode of 80 steps may do in one layer.

    Attributes:
        launches: kernels of an ordinary step, Triton's and torch's.
        more: kernels that all steps together launch beyond that: tokens are encoded every 16 steps and sent to the host
            every 32.
        copies: memcpys of all steps together.
        waits: how often the host waits for the GPU, all steps together.
    """

    launches: int
    more: int = 0
    copies: int = 0
    waits: int = 0

    def exceeded(self, decode: Decode) -> str:
        """What a decode did beyond this, with the lines that did it; empty where it did not."""
        parts = []
        if decode.launches > self.launches:
            parts.append(f"{decode.launches} launches in an ordinary step, budget {self.launches}")
        more = decode.all(TRITON, TORCH) - STEPS * decode.launches
        if more > self.more:
            parts.append(f"{more} launches beyond the ordinary ones of {STEPS} steps, budget {self.more}")
        for kind, most in ((COPY, self.copies), (SYNC, self.waits)):
            if decode.all(kind) > most:
                parts.append(f"{decode.all(kind)} times {kind}, budget {most}\n{decode.listed(kind)}")
        if decode.launches > self.launches or more > self.more:
            parts.append(decode.steps[-1].listed(TRITON, TORCH))
        return "\n".join(parts)


Row = tuple[Cost, Cost, Cost]  # on the device, on the host, on the host with cached blocks
_COSTS: dict[str, Row] = {
    "full": (Cost(3), Cost(4, 24, 1000, 4), Cost(4, 24, 1000, 4)),
    "pqcache": (Cost(6, 10), Cost(8, 40, 10, 4), Cost(10, 40, 10, 4)),
}
COSTS: Mapping[str, Row] = MappingProxyType(_COSTS)
