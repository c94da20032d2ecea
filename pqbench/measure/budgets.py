"""What the timing of one layer can be asked for: budgets in place of the methods' own, and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pqbench.errors import BudgetError, ConfigError
from pqbench.method import Method

DTYPES = ("float32", "bfloat16", "float16")


def with_budget(method: Method, budget: float) -> Method:
    """The method with another budget: tokens from 2 up, else a share of the context. One without a budget stays.

    Raises:
        BudgetError: the method's kind of budget cannot be that.
    """
    if method.budget is None:
        return method
    tokens, ratio = (int(budget), None) if budget > 1 else (None, budget)
    return method.with_budget(replace(method.budget, tokens=tokens, ratio=ratio))


def selects(method: Method, length: int) -> bool:
    """Whether a method leaves tokens out at this length, as far as its budget says."""
    try:
        split = method.split(length, length)
    except BudgetError:
        return False
    return split is None or (split.total < length and not method.attends_all(length))


def budgets_of(values: Any) -> list[float]:
    """Values of the option ``budgets``. Raises ConfigError for anything but different shares and numbers of tokens."""
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(_is_budget(value) for value in values) or len(set(values)) < len(values):
        raise ConfigError(
            f"benchmark.budgets is {values}: use a list of different budgets, each a share of the "
            "context in (0, 1] or a whole number of tokens from 2 up"
        )
    return list(values)


def _is_budget(value: Any) -> bool:
    return (type(value) in (int, float) and 0 < value <= 1) or (type(value) is int and value >= 2)


def dtypes_of(values: Any) -> list[str]:
    """Values of the option ``dtypes``. Raises ConfigError for anything but different names of dtypes."""
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or any(value not in DTYPES for value in values) or len(set(values)) < len(values):
        raise ConfigError(f"benchmark.dtypes is {values}: use a list of different ones of {', '.join(DTYPES)}")
    return list(values)
