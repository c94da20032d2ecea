"""Options of the timing of one layer: budgets that replace those of the methods, and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pqbench.errors import BudgetError, ConfigError
from pqbench.method import Method

DTYPES = ("float32", "bfloat16", "float16")


def with_budget(method: Method, budget: float) -> Method:
    """The method with another budget: a number of tokens if ``budget`` is above 1, and otherwise a share of the
    context. A method without a budget is returned unchanged.

    Raises:
        BudgetError: the method's budget cannot take this value.
    """
    if method.budget is None:
        return method
    tokens, ratio = (int(budget), None) if budget > 1 else (None, budget)
    return method.with_budget(replace(method.budget, tokens=tokens, ratio=ratio))


def selects(method: Method, length: int) -> bool:
    """Whether, by its budget, a method leaves out tokens of a context of this length. False if the budget does not fit
    the length."""
    try:
        split = method.split(length, length)
    except BudgetError:
        return False
    return split is None or (split.total < length and not method.attends_all(length))


def budgets_of(values: Any) -> list[float]:
    """Values of the option ``budgets``. Raises ConfigError unless they are different shares or numbers of tokens."""
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
    """Values of the option ``dtypes``. Raises ConfigError unless they are different names of dtypes."""
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or any(value not in DTYPES for value in values) or len(set(values)) < len(values):
        raise ConfigError(f"benchmark.dtypes is {values}: use a list of different ones of {', '.join(DTYPES)}")
    return list(values)
