"""How many bytes of keys a method reads to decide what to attend to; the keys of the tokens that it selects are not
among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pqbench.store.base import Usage

UPKEEP = 128  # keys that a step may read outside selections without counting them, such as those of an unfinished block

_Found = TypeVar("_Found")


class KeyReads:
    """Counts the keys that one method reads from one store, step by step.

    Every key that a selection reads counts. What a method reads outside its selections is mostly the upkeep of its
    index, which belongs to building it: each key may be read once without being counted, and so may :data:`UPKEEP` keys
    in every step. Whatever exceeds both counts, so that a method cannot score all keys before it selects.
    """

    def __init__(self, usage: Usage, prompt: int) -> None:
        """``prompt`` is the length of the prompt in tokens."""
        self._usage, self._unread = usage, prompt
        self._known = usage.key_bytes_read  # bytes that are accounted for
        self._selecting = 0

    def selecting(self, work: Callable[[], _Found]) -> _Found:
        """Run the method's selection."""
        before = self._usage.key_bytes_read
        found = work()
        self._selecting = self._usage.key_bytes_read - before
        self._known += self._selecting
        return found

    def step(self, row_bytes: int, repeats: bool = False) -> int:
        """Bytes that the step read. ``row_bytes`` are those of one token's keys. With ``repeats`` the device does the
        same selection again in the next step, without the host."""
        self._unread += 1
        other, self._known = self._usage.key_bytes_read - self._known, self._usage.key_bytes_read
        counted = max(0, other - max(UPKEEP, self._unread) * row_bytes)
        self._unread = max(0, self._unread - other // row_bytes)
        read = self._selecting + counted
        if not repeats:
            self._selecting = 0
        return read
