"""Host memory is held until all its readers are done."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, field

import torch

from pqbench.store.link.held import Held


@dataclass
class Place:
    """An event that has passed if it is told so, or if it was waited for."""

    passed: bool = False
    waits: list[int] = field(default_factory=list)

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waits.append(1)
        self.passed = True


def buffer() -> tuple[list[torch.Tensor], weakref.ref[torch.Tensor]]:
    """A buffer in a list that holds the only reference to it."""
    rows = torch.zeros(3)
    return [rows], weakref.ref(rows)


def test_a_buffer_lives_until_the_last_of_its_marks_is_passed() -> None:
    held, places = Held(), [Place(), Place()]
    rows, alive = buffer()
    held.hold(rows, places)
    rows = []
    for place in places:
        held.hold([], [])
        assert alive() is not None
        place.passed = True
    held.hold([], [])  # the next call frees it
    gc.collect()
    assert alive() is None
    assert len(held) == 0


def test_marks_need_not_be_passed_in_order() -> None:
    held, late = Held(), Place()
    first, one = buffer()
    second, other = buffer()
    held.hold(first, [late])
    held.hold(second, [Place(passed=True)])
    first = second = []
    gc.collect()
    assert one() is not None
    assert other() is None
    held.drain()
    assert late.waits
    assert len(held) == 0
    assert one() is None


def test_many_threads_let_buffers_go() -> None:
    held, places = Held(), [Place() for _ in range(200)]

    def work(part: list[Place]) -> None:
        for place in part:
            held.hold([torch.zeros(1)], [place])
            place.passed = True

    threads = [threading.Thread(target=work, args=(places[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held.hold([], [])
    assert len(held) == 0
