"""Keys and values of one layer in host memory: those of the prompt, which stores share, and those that a store adds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pqbench.errors import ConfigError
from pqbench.kernels.pages import empty_rows
from pqbench.kernels.reference.rows import HostTokens
from pqbench.store.link.base import Copy, Direction, Link, Transfer, poison

_CHUNK = 1024  # a chunk that a store adds has at least so many rows
_SHARE = 8  # a chunk that a store adds has at least 1 / 8 of the rows held


def host_buffer(batch: int, heads: int, count: int, width: int, dtype: torch.dtype, link: Link) -> Tensor:
    """Memory ``[B, H, count, 2, D]`` on the host; page-locked if the link needs it, filled with NaN if it debugs."""
    shape = (batch, heads, count, 2, width)
    buffer = page_locked(shape, dtype) if link.pinned else empty_rows(shape, dtype, torch.device("cpu"))
    return poison(buffer) if link.debug else buffer


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that a device can read directly.

    Raises:
        ConfigError: the driver cannot provide that much.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{prod(shape) * dtype.itemsize / 2**30:.2f} GiB of page-locked host memory cannot be had ({reason}): use "
            "a shorter context, a smaller batch, or store=device"
        ) from error


class HostPrompt:
    """The prompt of one layer and one cohort on the host, copied there as it is computed.

    Key and value of a token are adjacent, so that fetching a row is one copy. Stores only read it.
    """

    def __init__(self, capacity: int, like: Tensor, link: Link) -> None:
        """Room for ``capacity`` tokens of keys like ``like`` ``[B, H, *, D]``, which also names the device."""
        batch, heads, _, width = like.shape
        self.rows = host_buffer(batch, heads, capacity, width, like.dtype, link)
        self.device = like.device
        self.link = link
        self.length = 0
        # Keys and values [B, H, S, D] on the GPU, held while an index is built from them. None for a model on the CPU,
        # where a second copy would be of no use.
        self.near: tuple[Tensor, Tensor] | None = None
        self._transfers: list[Transfer] = []

    @classmethod
    def offload(cls, link: Link, keys: Tensor, values: Tensor) -> HostPrompt:
        """Start to copy a whole prompt, keys and values ``[B, H, S, D]``, to the host."""
        prompt = cls(keys.shape[2], keys, link)
        prompt.extend(keys, values)
        if link.pinned:
            prompt.near = keys, values
        return prompt

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Start to copy the next tokens ``[B, H, n, D]``; they must not be overwritten before :meth:`wait`.

        Raises:
            ValueError: more tokens than there is room for.
        """
        stop = self.length + keys.shape[2]
        if stop > self.rows.shape[2]:
            raise ValueError(f"a prompt of {stop} tokens does not fit into {self.rows.shape[2]} rows")
        target = self.rows[:, :, self.length : stop]
        if self.link.pinned:  # a device copies dense rows, so keys and values are stacked first
            copies = [Copy(torch.stack([keys, values], 3), target)]
        else:
            copies = [Copy(keys, target[..., 0, :]), Copy(values, target[..., 1, :])]
        self._transfers.append(self.link.submit(copies, Direction.TO_HOST, "prompt rows"))
        self.length = stop

    def arranged(self, indices: Tensor) -> HostPrompt:
        """A copy of the prompt whose rows are in the order of ``indices`` ``[B, H, length]``."""
        self.wait()
        batch, heads, _, _, width = self.rows.shape
        prompt = HostPrompt(self.length, self.rows.new_empty(batch, heads, 0, width, device=self.device), self.link)
        copy = Copy(self.rows, prompt.rows, indices.to(self.rows.device))
        if self.link.direct:  # a kernel is faster, although rows cross the link twice
            self.link.submit([copy], Direction.TO_HOST, "arranged rows", urgent=True).wait()
        else:
            copy.run()
        prompt.length = self.length
        return prompt

    def wait(self) -> None:
        """Wait until all rows are on the host."""
        for transfer in self._transfers:
            transfer.wait()
        self._transfers = []

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held."""
        return self.rows[:, :, : self.length].nbytes


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one chunk: rows ``[B, H, n, 2, D]`` of tokens ``start`` to ``start + n``."""

    start: int
    rows: Tensor

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + int(self.rows.shape[2])


class HostRows:
    """All rows of one store, ordered by token position, in chunks. Rows never move, so that transfers may refer to
    them. The first chunk is the prompt, the second is the reserved memory; more chunks are added when it is full.

    Kernels may read the chunks directly. After the store is deleted, the link keeps the memory until they are done.
    """

    def __init__(self, prompt: HostPrompt, reserve: int = 0) -> None:
        """Memory for ``reserve`` tokens after the prompt is taken now."""
        self._chunks = [Piece(0, prompt.rows[:, :, : prompt.length])]
        self._prompt = prompt
        self.link, self.device, self.dtype = prompt.link, prompt.device, prompt.rows.dtype
        self._buffers = [prompt.rows]
        self._tokens: list[HostTokens] = []
        if prompt.link.direct:
            weakref.finalize(self, prompt.link.release, self._buffers).atexit = False
        if reserve:
            self.reserve(prompt.length + reserve)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one row of every head: B, H, 2 and D."""
        batch, heads, _, halves, width = self._prompt.rows.shape
        return batch, heads, halves, width

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Tokens ``start`` to ``stop``, chunk by chunk. Memory is added if ``stop`` is beyond the last chunk."""
        self._prompt.wait()
        if self._chunks[-1].stop < stop:
            self.reserve(max(stop, self._chunks[-1].stop + max(_CHUNK, self._chunks[-1].stop // _SHARE)))
        for chunk in self._chunks:
            first, last = max(start, chunk.start), min(stop, chunk.stop)
            if first < last:
                yield Piece(first, chunk.rows[:, :, first - chunk.start : last - chunk.start])

    def reserve(self, rows: int) -> None:
        """Make sure that there is memory for ``rows`` tokens in all."""
        held = self._chunks[-1].stop
        if rows > held:
            batch, heads, _, _, width = self._prompt.rows.shape
            buffer = host_buffer(batch, heads, rows - held, width, self.dtype, self.link)
            self._chunks.append(Piece(held, buffer))
            self._buffers.append(buffer)
            self._tokens = []

    def tokens(self) -> list[HostTokens]:
        """All rows, two chunks at a time, for kernels that read them directly."""
        if not self._tokens:
            self._prompt.wait()
            for first in range(0, len(self._chunks), 2):
                one, *other = self._chunks[first : first + 2]
                rows = self._buffers[first]
                more = self._buffers[first + 1] if other else rows[:, :, :0]
                stop = other[0].stop if other else one.stop
                self._tokens.append(HostTokens(one.start, stop, rows, one.stop, more))
        return self._tokens

    def gather(self, heads: Tensor, positions: Tensor, target: Tensor) -> tuple[list[Copy], Tensor | None]:
        """The copies that bring N rows to ``target`` ``[N, 2, D]``: those of heads ``[N]`` (counted over all sequences)
        at positions ``[N]``.

        Returns:
            the copies, and for each row of the target which of the N rows it will hold, ``[N]``; None if they are in
            order.
        """
        self._prompt.wait()
        if len(self._chunks) == 1:
            return [self._part(self._chunks[0], heads, positions, target)], None
        copies, order, first = [], [], 0
        for chunk in self._chunks:
            inside = ((positions >= chunk.start) & (positions < chunk.stop)).nonzero()[:, 0]
            if len(inside):
                place = target[first : first + len(inside)]
                copies.append(self._part(chunk, heads[inside], positions[inside], place))
                order.append(inside)
                first += len(inside)
        return copies, torch.cat(order)

    def _part(self, chunk: Piece, heads: Tensor, positions: Tensor, target: Tensor) -> Copy:
        """The copy of rows of one chunk, which is addressed as a flat table, so that heads may need different numbers
        of rows."""
        whole = self._prompt.rows if chunk.start == 0 else chunk.rows
        flat = heads * whole.shape[2] + (positions - chunk.start)
        return Copy(whole.flatten(0, 2)[None, None], target[None, None], flat[None, None])
