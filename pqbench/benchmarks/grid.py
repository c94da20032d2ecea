"""Checks of the numbers that span a benchmark's grid, with one clear line for each mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqbench.errors import ConfigError


def whole(field: str, values: Any) -> list[int]:
    """``values`` as a list of different positive integers.

    Raises:
        ConfigError: it is something else.
    """
    if not _is_grid(values) or not all(type(value) is int and value > 0 for value in values):
        raise ConfigError(f"benchmark.{field} needs a list of different positive whole numbers, not {_shown(values)}")
    return list(values)


def percent(field: str, values: Any) -> list[float]:
    """``values`` as a list of different numbers from 0 to 100.

    Raises:
        ConfigError: it is something else.
    """
    if not _is_grid(values) or not all(type(value) in (int, float) and 0 <= value <= 100 for value in values):
        raise ConfigError(f"benchmark.{field} needs a list of different numbers from 0 to 100, not {_shown(values)}")
    return list(values)


def fits(lengths: Sequence[int], max_length: int) -> None:
    """Nothing if the model takes prompts of these ``lengths``.

    Raises:
        ConfigError: it does not.
    """
    if max(lengths) > max_length:
        raise ConfigError(f"benchmark.lengths has {max(lengths)}, but the model takes {max_length} tokens at most")


def _is_grid(values: Any) -> bool:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and len(values) > 0 and len(set(values)) == len(values)


def _shown(values: Any) -> str:
    return str(list(values) if isinstance(values, Sequence) and not isinstance(values, str) else values)
