"""The index of PQCache in one layer: a codebook, and codes of the middle tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from methods.pqcache.clustering import Clustering
from methods.pqcache.host_codes import HostCodes
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Arrival, Budget, Geometry, Number

if TYPE_CHECKING:
    from methods.pqcache.method import PQCache

AHEAD = 16  # tokens encoded at once


def step_numbers(budget: Budget, length: int, prompt: int) -> tuple[int, int, int, int, int, int]:
    """Sinks, top_k, length, middle, tokens attended to, and those among them outside the window, all of a step with
    ``length`` tokens."""
    split = budget.resolve(length, prompt)
    middle = length - split.sink - split.window
    found = split.sink + min(split.top_k, middle)
    return split.sink, split.top_k, length, middle, found + split.window, found


class KeyIndex:
    """Codes of the middle tokens, and of a few tokens behind it, which are encoded together.

    Attributes:
        codebook: ``[B, H, m, 2**b, D/m]``; None until there are keys enough.
        codes: uint8 ``[B, H, n, m]``; None until then.
        middle: tokens whose codes count; some tokens that are still in the window have their codes already.
        clustering: makes codebooks.
    """

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        self.method, self.geometry = method, geometry
        self.clustering = Clustering(method, geometry)
        self.codebook: Tensor | None = None
        self.codes: GrowingBuffer | HostCodes | None = None
        self.middle = 0
        self._arriving: Arrival | None = None

    def reach(self, kv: KV, length: int) -> bool:
        """Give every token a code that is in the middle when there are ``length`` tokens. Returns whether a codebook
        was made for it."""
        first, stop = self.method.budget.resolve(length, self.geometry.prompt).middle(length)
        made = self.codebook is None and stop - first > self.method.clusters
        if made:
            self.train(kv, first, stop)
        elif self.codes is not None and stop - first > len(self.codes):
            self.join(kv, first + len(self.codes), stop)
        self.middle = stop - first
        return made

    def train(self, kv: KV, start: int, stop: int) -> None:
        """Make the codebook from rows ``start`` to ``stop``, and their codes."""
        self.middle = stop - start
        codebook, codes = self.quantised(kv.stored_keys(start, stop))
        self.codebook = codebook.to(kv.device)
        self.codes, self._arriving = GrowingBuffer(codes.to(kv.device)), None  # other codes may be on their way

    def quantised(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook and codes of keys ``[B, H, S, D]``."""
        return self.clustering.train(keys)

    def join(self, kv: KV, start: int, stop: int) -> None:
        """Give codes to rows ``start`` to ``stop``, which have left the window. The next rows to leave it get theirs at
        the same time, because to encode sixteen tokens takes as long as to encode one."""
        self.known.append(self.encode(kv, start, min(kv.length, max(stop, start + AHEAD))))

    def encode(self, kv: KV, start: int, stop: int) -> Tensor:
        """What the index says of rows ``start`` to ``stop``: codes ``[B, H, n, m]``."""
        if self.codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")
        return self.geometry.kernels.encode(kv.keys(start, stop), self.codebook)

    def ask(self, kv: KV) -> None:
        """Ask for codes that lie on the host, while the layer before computes."""
        if self.codes is not None and self.method.codes_on == "host":
            self._arriving = self._on_host().ask(kv)

    def arrived(self, kv: KV) -> Tensor:
        """Codes ``[B, H, n, m]`` on the device, those of the middle first: the codes that were asked for a layer ago,
        and those that have joined since."""
        if self.method.codes_on == "device":
            return self.known.view()
        codes = self._on_host()
        arrived = (self._arriving or codes.ask(kv)).wait()
        self._arriving = None
        return codes.all(arrived)

    def best(
        self,
        q: Tensor,
        codes: Tensor,
        numbers: Sequence[Number],
        room: int,
        only: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Sinks, the middle tokens that ``codes`` put first for q ``[B, H, G, D]``, and the window, by the
        :func:`step_numbers` of a step: ``[B, H, room]``. Heads that are not among ``only`` keep what is ``chosen``."""
        if self.codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")
        sink, top_k, length, middle, _, _ = numbers
        return self.geometry.kernels.pq_select(
            q, self.codebook, codes, self.geometry.scaling, sink, top_k, length, middle, room, only, chosen
        )

    @property
    def known(self) -> GrowingBuffer | HostCodes:
        """The codes, which must exist."""
        if self.codes is None:
            raise RuntimeError("no codes before finish_prefill()")
        return self.codes

    @property
    def on_device(self) -> GrowingBuffer:
        """The codes, which must lie on the device."""
        codes = self.known
        if isinstance(codes, HostCodes):
            raise RuntimeError("codes that have moved to the host have no place on the device")
        return codes

    def _on_host(self) -> HostCodes:
        """The codes, moved to the host by the first step: until then they are still being worked on."""
        codes = self.known
        moved = self.codes = HostCodes(codes.view()) if isinstance(codes, GrowingBuffer) else codes
        return moved

    @property
    def bytes_read(self) -> int:
        """Bytes of the codes that a step reads."""
        return 0 if self.codes is None else self.codes.bytes // len(self.codes) * self.middle

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return (0 if self.codes is None else self.codes.bytes) + (0 if self.codebook is None else self.codebook.nbytes)
