"""The index of PQCache in one layer: a codebook, and the codes of the middle tokens."""

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
    """Numbers of a step with ``length`` tokens: sinks, top_k, length, tokens in the middle, tokens attended to, and
    tokens attended to outside the window."""
    split = budget.resolve(length, prompt)
    middle = length - split.sink - split.window
    found = split.sink + min(split.top_k, middle)
    return split.sink, split.top_k, length, middle, found + split.window, found


class KeyIndex:
    """Codes of the middle tokens, and of a few window tokens that will join the middle next and are encoded together.

    Attributes:
        codebook: ``[B, H, m, 2**b, D/m]``; None until the middle has enough keys.
        codes: uint8 ``[B, H, n, m]``; None until the codebook exists.
        middle: number of middle tokens; only their codes are searched.
        clustering: computes codebooks.
    """

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        self.method, self.geometry = method, geometry
        self.clustering = Clustering(method, geometry)
        self.codebook: Tensor | None = None
        self.codes: GrowingBuffer | HostCodes | None = None
        self.middle = 0
        self._arriving: Arrival | None = None

    def reach(self, kv: KV, length: int) -> bool:
        """Encode all tokens that are in the middle of a context of ``length`` tokens. Returns whether this computed a
        codebook."""
        first, stop = self.method.budget.resolve(length, self.geometry.prompt).middle(length)
        made = self.codebook is None and stop - first > self.method.clusters
        if made:
            self.train(kv, first, stop)
        elif self.codes is not None and stop - first > len(self.codes):
            self.join(kv, first + len(self.codes), stop)
        self.middle = stop - first
        return made

    def train(self, kv: KV, start: int, stop: int) -> None:
        """Compute the codebook from rows ``start`` to ``stop``, and the codes of these rows."""
        self.middle = stop - start
        codebook, codes = self.quantised(kv.stored_keys(start, stop))
        self.codebook = codebook.to(kv.device)
        self.codes, self._arriving = GrowingBuffer(codes.to(kv.device)), None  # older codes may be on their way

    def quantised(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook ``[B, H, m, 2**b, D/m]`` and codes uint8 ``[B, H, S, m]`` of keys ``[B, H, S, D]``."""
        return self.clustering.train(keys)

    def join(self, kv: KV, start: int, stop: int) -> None:
        """Encode rows ``start`` to ``stop``, which have left the window. The next rows that will leave it are encoded
        at the same time, because encoding sixteen tokens takes as long as encoding one."""
        self.known.append(self.encode(kv, start, min(kv.length, max(stop, start + AHEAD))))

    def encode(self, kv: KV, start: int, stop: int) -> Tensor:
        """Codes ``[B, H, n, m]`` of rows ``start`` to ``stop``. Raises RuntimeError if there is no codebook yet."""
        if self.codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")
        return self.geometry.kernels.encode(kv.keys(start, stop), self.codebook)

    def ask(self, kv: KV) -> None:
        """Start to bring codes from the host, while the previous layer computes."""
        if self.codes is not None and self.method.codes_on == "host":
            self._arriving = self._on_host().ask(kv)

    def arrived(self, kv: KV) -> Tensor:
        """Codes ``[B, H, n, m]`` on the device, those of the middle first. Codes from the host were asked for with
        :meth:`ask`."""
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
        """The selection ``[B, H, room]`` of a step for q ``[B, H, G, D]``: sinks, the best middle tokens, and the
        window.

        Args:
            codes: ``[B, H, n, m]`` on the device.
            numbers: the :func:`step_numbers` of the step.
            room: size of the selection, at least the number of tokens attended to.
            only: bool ``[B, H]``, heads that select; the others keep their rows of ``chosen``. None for all.
            chosen: int64 ``[B, H, room]``, an earlier selection, which is overwritten; None for a new tensor.
        """
        if self.codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")
        sink, top_k, length, middle, _, _ = numbers
        return self.geometry.kernels.pq_select(
            q, self.codebook, codes, self.geometry.scaling, sink, top_k, length, middle, room, only, chosen
        )

    @property
    def known(self) -> GrowingBuffer | HostCodes:
        """The codes. Raises RuntimeError if there are none yet."""
        if self.codes is None:
            raise RuntimeError("no codes before finish_prefill()")
        return self.codes

    @property
    def on_device(self) -> GrowingBuffer:
        """The codes. Raises RuntimeError if they are not on the device."""
        codes = self.known
        if isinstance(codes, HostCodes):
            raise RuntimeError("codes that have moved to the host have no place on the device")
        return codes

    def _on_host(self) -> HostCodes:
        """The codes on the host. The first step moves them there, because the index is still built until then."""
        codes = self.known
        moved = self.codes = HostCodes(codes.view()) if isinstance(codes, GrowingBuffer) else codes
        return moved

    @property
    def bytes_read(self) -> int:
        """Bytes of the codes that a step reads, those of the middle."""
        return 0 if self.codes is None else self.codes.bytes // len(self.codes) * self.middle

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return (0 if self.codes is None else self.codes.bytes) + (0 if self.codebook is None else self.codebook.nbytes)
