"""What a method promises of its selections in one layer, and how the harness checks it.

The first selection is checked before any row is read by it, because a GPU does not recover from reading rows outside
the store. This check costs one synchronisation in each layer. Later steps are compared with the budget once, after the
decode, from the counts of the meters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from pqbench.engine.arguments import outlives_exit
from pqbench.errors import SelectionError
from pqbench.method import Geometry, Method, Selection
from pqbench.store.base import Store


@dataclass(frozen=True)
class Contract:
    """What one method promises in one layer: valid rows, and no more tokens than :meth:`Method.limit` allows."""

    method: Method
    geometry: Geometry

    @outlives_exit
    def check(self, selection: object, store: Store) -> None:
        """Verify what a method selected from a store whose last row is the current token. Waits for the device once.

        Raises:
            SelectionError: the object is not a selection, its indices are not of shape ``[B, H, n]``, rows are out of
                range or selected twice, the current token is missing or seen by no query head of a KV head, or there
                are more tokens than the budget allows. The message names the method, the layer and the step.
        """
        if not isinstance(selection, Selection):
            self._refuse(store, f"select() returned {type(selection).__name__} instead of a Selection")
        indices, visible = self._counted(selection, store), selection.visible
        held, limit = store.length, self.method.limit(store.seen, self.geometry)
        size = held if indices is None else indices.shape[2]
        if limit is not None and self.method.evicts and held > limit:
            self._refuse(store, f"the method holds {held} tokens, but the budget allows {limit}")
        if limit is not None and visible is None and size > limit:
            self._refuse(store, f"the selection has {size} tokens, but the budget allows {limit}")
        faults = {} if indices is None else _faults(indices, held - 1)
        if visible is not None:
            attended = visible[..., :size].any(2)  # [B, H, size]; rows that no query head sees are padding
            current = attended[..., -1] if indices is None else (attended & (indices == held - 1)).any(-1)
            faults[f"no query head of a KV head sees the current token, row {held - 1}"] = current.all().logical_not()
            if limit is not None:
                most = attended.sum(-1).max()
                faults[f"the selection has more tokens than the {limit} that the budget allows"] = most > limit
        if faults:
            sound = torch.stack(list(faults.values())).logical_not().tolist()  # The only wait for the device.
            for reason, good in zip(faults, sound, strict=True):
                if not good:
                    self._refuse(store, reason)

    def check_steps(self, attended: Sequence[int | None], held: Sequence[int], excess: int, seen: int) -> None:
        """Compare all steps of a decode with the budget.

        Args:
            attended: tokens that a KV head attended to in each step; None where only the device knew the number.
            held: rows that the store held in each step.
            excess: where only the device knew the number, the most tokens by which a KV head exceeded the limit of a
                step, see :attr:`pqbench.engine.meter.Meter.excess`; 0 or less if none did.
            seen: length of the context after the last step.

        Raises:
            SelectionError: a step attended to more tokens than its budget, or an evicting method held more.
        """
        first = seen - len(attended) + 1
        for context, (count, rows) in enumerate(zip(attended, held, strict=True), start=first):
            limit = self.method.limit(context, self.geometry)
            most = max(count or 0, rows if self.method.evicts else 0)
            if limit is not None and most > limit:
                raise SelectionError(
                    f"{self._where(context)}: attended to {most} tokens, but the budget allows {limit}"
                )
        if excess > 0:
            raise SelectionError(
                f"{self._where(seen)} or before: a KV head attended to {excess} tokens more than the budget allows"
            )

    def _counted(self, selection: Selection, store: Store) -> Tensor | None:
        """Verify the shape of a selection's indices and return those that are in use, ``[B, H, n]``; None for all
        rows."""
        indices, visible = selection.indices, selection.visible
        if indices is None:
            return None
        expected = self.geometry.batch, self.geometry.kv_heads
        whole = not indices.is_floating_point() and indices.dtype != torch.bool
        if indices.ndim != 3 or tuple(indices.shape[:2]) != expected or not whole:
            self._refuse(
                store,
                f"the selection's indices are {tuple(indices.shape)} of {indices.dtype}, expected whole numbers "
                f"[{expected[0]}, {expected[1]}, n]",
            )
        if visible is not None and visible.shape[-1] != indices.shape[2]:
            self._refuse(store, f"visible is {tuple(visible.shape)} for indices {tuple(indices.shape)}")
        indices = indices if selection.count is None else indices[:, :, : int(selection.count)]
        if not indices.shape[2]:
            self._refuse(store, f"the selection lacks the current token, row {store.length - 1}")
        return indices

    def _refuse(self, store: Store, reason: str) -> NoReturn:
        raise SelectionError(f"{self._where(store.seen)}: {reason}")

    def _where(self, seen: int) -> str:
        """The method, the layer and the step that makes a context of ``seen`` tokens."""
        step = seen - self.geometry.prompt
        return f"{type(self.method).__name__}, layer {self.geometry.layer}, step {step}"


def _faults(indices: Tensor, last: int) -> dict[str, Tensor]:
    """The faults that rows ``[B, H, n]`` can have, by message, where ``last`` is the row of the current token. Each
    value is a bool ``[]`` on the device that says whether the fault is there."""
    ordered = indices.sort(dim=2).values
    least, most = ordered[:, :, 0], ordered[:, :, -1]
    return {
        f"the selection is out of range: rows go from 0 to {last}": ((least < 0) | (most > last)).any(),
        f"the selection lacks the current token, row {last}": (most < last).any(),
        "the selection names a row twice": (ordered[:, :, 1:] == ordered[:, :, :-1]).any(),
    }
