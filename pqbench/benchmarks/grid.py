"""Checks of task names and of the numbers that span a benchmark's grid, with one clear line for each mistake."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pqbench.errors import ConfigError


def whole(field: str, values: Any) -> list[int]:
    """``values`` as a list of different positive integers.

    Raises:
        ConfigError: ``values`` is anything else.
    """
    if not _is_grid(values) or not all(type(value) is int and value > 0 for value in values):
        raise ConfigError(f"benchmark.{field} needs a list of different positive whole numbers, not {_shown(values)}")
    return list(values)


def at_least_one(field: str, value: Any) -> None:
    """Check that an option is a whole number of at least 1.

    Raises:
        ConfigError: it is not.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"benchmark.{field} is {value!r}: use a whole number of at least 1")


def percent(field: str, values: Any) -> list[float]:
    """``values`` as a list of different numbers from 0 to 100.

    Raises:
        ConfigError: ``values`` is anything else.
    """
    if not _is_grid(values) or not all(type(value) in (int, float) and 0 <= value <= 100 for value in values):
        raise ConfigError(f"benchmark.{field} needs a list of different numbers from 0 to 100, not {_shown(values)}")
    return list(values)


def named(
    tasks: str | Sequence[str], known: Collection[str], groups: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[str]]:
    """The tasks that the given names of tasks and groups stand for, each once and in order; and the unknown names."""
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [str(name) for name in names if name not in known and name not in groups]
    chosen = dict.fromkeys(task for name in names if str(name) not in unknown for task in groups.get(name, (name,)))
    return list(chosen), unknown


def fits(lengths: Sequence[int], max_length: int) -> None:
    """Check that the model takes prompts of these ``lengths``.

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
