"""The allowed cost of decoding with one layer on a GPU: launches of a step, additional launches in some steps, and
waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.fake_cuda.drive import Decode
from tests.fake_cuda.tally import COPY, SYNC, TORCH, TRITON


@dataclass(frozen=True)
class Cost:
    """The most that a decode of 80 steps may do in one layer.

    Attributes:
        launches: kernels of Triton and torch in an ordinary step.
        more: additional kernels of all steps together. Tokens are encoded every 16 steps and sent to the host every 32
            steps, and the first step makes room.
        copies: memcpys in all steps together.
        waits: how often the host waits for the GPU in all steps together.
        late: kernels that may be compiled while decoding.
    """

    launches: int
    more: int = 0
    copies: int = 0
    waits: int = 0
    late: tuple[str, ...] = ()

    def exceeded(self, decode: Decode) -> str:
        """What a decode did beyond this cost, with the lines of code; empty if nothing. The check of the first step has
        a budget of its own, see :func:`beyond_check`."""
        parts = [beyond_check(decode)] if beyond_check(decode) else []
        more = decode.all(TRITON, TORCH, without=CHECK) - len(decode.steps) * decode.launches
        if decode.launches > self.launches:
            parts.append(f"{decode.launches} launches in an ordinary step, budget {self.launches}")
        if more > self.more:
            parts.append(f"{more} launches beyond the ordinary ones, budget {self.more}")
        if parts:
            parts.append(max(decode.steps, key=lambda step: step.launches).listed(TRITON, TORCH))
        for kind, most in ((COPY, self.copies), (SYNC, self.waits)):
            if decode.all(kind, without=CHECK) > most:
                done = decode.all(kind, without=CHECK)
                parts.append(f"{done} times {kind}, budget {most}\n{decode.listed(kind)}")
        compiled = {name: step for name, step in decode.late.items() if name not in self.late}
        if compiled:
            parts.append(f"compiled in mid-decode, in step: {compiled}")
        return "\n".join(parts)


CHECK = ("pqbench/engine/contract.py",)
_CHECKING = 20  # launches that the check of a selection takes at most, where query heads differ


def beyond_check(decode: Decode) -> str:
    """What the check of a method's selections did beyond its budget; empty if nothing. It may wait once and launch a
    few kernels in the first step, and must do nothing in later steps."""
    first, *later = (step.of(TRITON, TORCH) - step.of(TRITON, TORCH, without=CHECK) for step in decode.steps)
    waits, *more = (step.of(SYNC, COPY) - step.of(SYNC, COPY, without=CHECK) for step in decode.steps)
    if first > _CHECKING or waits > 1 or any(later) or any(more):
        return f"the check launched {first} and then {sum(later)}, and waited {waits} and then {sum(more)} times"
    return ""


Row = tuple[Cost, Cost, Cost]  # on the device, on the host, on the host with cached blocks
_ENCODING = 10  # launches in 80 steps to encode tokens, sixteen at a time, and to store their codes
_HEADS = 8  # a window of some thousand tokens is filled once, by a copy for each head
_PQ: Row = (Cost(6, _ENCODING), Cost(7, 42, _HEADS), Cost(10, 44, _HEADS))
# Codes in host memory are copied once in each step, and joined with the codes of later tokens.
CODES_ON_HOST: Row = (Cost(7, _ENCODING + 1, 81), Cost(8, 43, 81 + _HEADS), Cost(11, 45, 81 + _HEADS))
# Every head's rows are one copy, but for those that came to the host later, by a kernel that nothing needed before.
_FLUSHING = Cost(3, 38, 640, late=("copy_rows",))
_EVICTING = {"h2o": 84, "pyramidkv": 63, "snapkv": 63, "streaming_llm": 73, "tova": 66}  # all tiers are the device
_COSTS: dict[str, Row] = {
    **{name: (Cost(launches),) * 3 for name, launches in _EVICTING.items()},
    "full": (Cost(2), _FLUSHING, _FLUSHING),
    "infllm": (Cost(86, 1), Cost(87, 18), Cost(90, 20)),
    "magicpig": (Cost(97, waits=80), Cost(97, 16, waits=80), Cost(103, 18, waits=80)),  # how many tokens it samples
    "oracle": (Cost(10), Cost(15, 17), Cost(18, 19)),
    "paper_infinitebench": _PQ,
    "paper_longbench": _PQ,
    "pqcache": _PQ,
    "pqcache_plus": (Cost(54), Cost(55, 8), Cost(58, 10)),
    "quest": (Cost(30), Cost(31, 17), Cost(34, 19)),
    "random_tokens": (Cost(10), Cost(11, 17), Cost(14, 19)),
    "sparq": (Cost(56), Cost(57, 17), Cost(60, 19)),
    "vattention": (Cost(18, _ENCODING), Cost(19, 27), Cost(22, 28)),
}
COSTS: Mapping[str, Row] = MappingProxyType(_COSTS)
