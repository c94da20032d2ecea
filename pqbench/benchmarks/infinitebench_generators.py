"""InfiniteBench's six synthetic tasks, made by the official recipes at any length.

Source: https://github.com/OpenBMB/InfiniteBench, ``data/construct_synthetic_dataset.py`` (commit 88b3daa). The official
script sets no seed, so only its distributions can be reproduced. A recipe's size is its number of units: noise lines,
pairs, numbers, operands or functions. With the official size and number of samples (``OFFICIAL``) the recipes have the
distributions of the official sets. Smaller sets spread their samples evenly over the same depths, question kinds and
layers.

Our recipes differ only in wording: the noise line comes from lm-eval's RULER (the same five sentences); the key line,
the headers and the questions are our own, with the same facts in the same places.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pqbench.errors import ConfigError, DataError

POSITIONS = 59  # depths of the official passkey and number_string sets
LAYERS = (2, 4, 6, 8, 10)
KINDS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")


@dataclass(frozen=True)
class Place:
    """The place of a sample in its set, as ``index`` of ``total``: depth, question kind or layers vary over the set."""

    index: int
    total: int

    def share(self, steps: int) -> int:
        """Which of ``steps`` equal parts of the set this sample lies in."""
        return self.index * steps // self.total


@dataclass(frozen=True)
class Row:
    """A row as in the official files; ``facts`` holds what was drawn (depth, kind, ...)."""

    context: str
    input: str
    answer: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


Recipe = Callable[[int, Place, random.Random], Row]


def passkey(units: int, place: Place, rng: random.Random) -> Row:
    """``units`` noise lines and among them one that names a key of 5 random digits; the question asks for the key."""
    key = "".join(str(rng.randint(0, 9)) for _ in range(5))
    return _hidden_line(units, place, key, "pass key")


def number_string(units: int, place: Place, rng: random.Random) -> Row:
    """Like passkey with 10 digits: 5 are random, and 5 times one of the digits is repeated beside itself."""
    digits = [str(rng.randint(0, 9)) for _ in range(5)]
    while len(digits) < 10:
        at = rng.randint(0, len(digits) - 1)
        digits.insert(at, digits[at])
    return _hidden_line(units, place, "".join(digits), "sequence of digits")


def kv_retrieval(units: int, place: Place, rng: random.Random) -> Row:
    """A one-line JSON object of ``units`` unique uuid4 pairs; over the set the requested index moves evenly from first
    to last."""
    pairs: dict[str, str] = {}
    while len(pairs) < units:
        pairs[_uuid(rng)] = _uuid(rng)
    at = place.share(units)
    key = list(pairs)[at]
    return Row(
        context=f"JSON data:\n{json.dumps(pairs)}",
        input=f'\nKey: "{key}"\nThe value that belongs to this key is: ',
        answer=[pairs[key]],
        facts={"depth": at / units, "index": at},
    )


def math_find(units: int, place: Place, rng: random.Random) -> Row:
    """A list of ``units`` integers in 0..99 and one of seven questions; "second" and "third" count distinct values.

    Questions for a largest value first draw the upper bound of the list from 79..99, questions for a smallest value its
    lower bound from 0..19, and the median draws one of the two. A list without three distinct values is drawn again,
    which happens only with very few units.
    """
    kind = KINDS[place.share(len(KINDS))]
    narrow_top = rng.random() <= 0.5 if kind == "median" else "largest" in kind
    low, high = (0, rng.randint(79, 99)) if narrow_top else (rng.randint(0, 19), 99)
    numbers = [rng.randint(low, high) for _ in range(units)]
    while len(set(numbers)) < 3:
        numbers = [rng.randint(low, high) for _ in range(units)]
    return Row(
        context=str(numbers),
        # lm-eval's template takes the kind from the text between "The" and " of", and also names it before the list.
        input=f"Reply with a single number and nothing else. The {kind} number of the list is: ",
        answer=[str(_find(numbers, kind))],
        facts={"kind": kind},
    )


def math_calc(units: int, place: Place, rng: random.Random) -> Row:  # noqa: ARG001 (nothing is swept here)
    """A sum of ``units`` operands in 0..99 with plus or minus signs of equal chance; the answers are all partial sums.

    An operand that would take the sum out of 0..99 is replaced by one that does not.
    """
    value = rng.randint(0, 99)
    text, values = [str(value)], []
    for _ in range(units - 1):
        operand = rng.randint(0, 99)
        if rng.random() > 0.5:
            operand = operand if value + operand <= 99 else rng.randint(0, 99 - value)
            value, sign = value + operand, "+"
        else:
            operand = operand if value - operand >= 0 else rng.randint(0, value)
            value, sign = value - operand, "-"
        text.append(f"{sign} {operand}")
        values.append(str(value))
    return Row(context=" ".join(text), input="The values after each operator are: ", answer=values)


def code_run(units: int, place: Place, rng: random.Random) -> Row:
    """About ``units`` one-line Python functions in equal layers, each of which calls one of the next layer; the
    question asks for the value of one call.

    The constants added lie in -12..17, the argument in -10..10; the numbers in the function names are sorted and lie
    in 1 to 2 * ``units``.
    """
    layers = LAYERS[place.share(len(LAYERS))]
    width = units // layers
    if not width:
        raise ConfigError(f"code_run needs at least {layers} functions for {layers} layers")
    names = rng.sample(range(1, 2 * units + 1), layers * width)
    levels = [names[i * width : (i + 1) * width] for i in range(layers)]
    calls = {name: rng.choice(below) for level, below in pairwise(levels) for name in level}
    added = {name: rng.randint(-12, 17) for name in names}
    start, x = rng.choice(levels[0]), rng.randint(-10, 10)
    value, at = x, start
    while True:
        value += added[at]
        if at not in calls:
            break
        at = calls[at]
    bodies = (
        f"def func_{n}(x):\n    return {f'func_{calls[n]}(x)' if n in calls else 'x'}{_signed(added[n])}\n"
        for n in sorted(names)
    )
    return Row(
        context="These are the functions of functions_module.py:\n\n" + "\n".join(bodies),
        input=f"Please give the exact value that func_{start}({x}) returns.",
        answer=[str(value)],
        facts={"layers": layers},
    )


@dataclass(frozen=True)
class Official:
    """The size of a released set: units of each sample, number of samples, and the fewest units with which the recipe
    works."""

    recipe: Recipe
    units: int
    samples: int
    least: int = 1


OFFICIAL: Mapping[str, Official] = MappingProxyType(
    {
        "passkey": Official(passkey, 5220, 590),
        "number_string": Official(number_string, 5220, 590),
        "kv_retrieval": Official(kv_retrieval, 2500, 500),
        "math_find": Official(math_find, 60000, 350, least=6),
        "math_calc": Official(math_calc, 30000, 50, least=2),
        "code_run": Official(code_run, 550, 400),
    }
)


def generate(task: str, units: int, place: Place, seed: str) -> Row:
    """One row of ``units`` units; the same arguments give the same row on every machine.

    Raises:
        ConfigError: ``task`` has no recipe, or ``units`` are too few for it.
        DataError: lm-eval, which holds the noise line, is not installed.
    """
    if task not in OFFICIAL:
        raise ConfigError(f"InfiniteBench's {task} cannot be generated; these can: {', '.join(OFFICIAL)}")
    if units < least_units(task, place):
        raise ConfigError(f"{task} needs at least {least_units(task, place)} units, not {units}")
    return OFFICIAL[task].recipe(units, place, random.Random(f"{seed}/{task}/{place.index}"))


def least_units(task: str, place: Place) -> int:
    """The fewest units with which sample ``place`` of ``task`` can be made."""
    return LAYERS[place.share(len(LAYERS))] if task == "code_run" else OFFICIAL[task].least


def fit(
    make: Callable[[int], Row], size: Callable[[Row], int], target: int, least: int, guess: int = 0
) -> tuple[Row, int]:
    """The row with the most units whose ``size`` is at most ``target``; one unit more would make it too long.

    Args:
        make: makes a row of a given number of units.
        size: the length of a row in tokens; it grows with the units, apart from random differences between rows.
        target: the length that must not be exceeded.
        least: the fewest units that ``make`` accepts.
        guess: where to look first, for instance the units of the previous sample.

    Raises:
        ConfigError: not even ``least`` units fit.
    """
    best = make(least)
    base = size(best)
    if base > target:
        raise ConfigError(f"benchmark.length={target} is too short: the shortest prompt has {base} tokens")
    low, high = least, least + (target - base) + 1  # a unit is at least one token, so `high` units cannot fit
    # A unit of any recipe has 3 to 100 tokens, so a first attempt with an eighth of the room wastes little time.
    trial = guess or least + (target - base) // 8
    while high - low > 1:
        trial = min(max(trial, low + 1), high - 1)
        row = make(trial)
        tokens = size(row)
        if tokens <= target:
            low, best = trial, row
        else:
            high = trial
        trial = least + (target - base) * (trial - least) // max(1, tokens - base)
    return best, low


def _hidden_line(units: int, place: Place, key: str, name: str) -> Row:
    positions = min(POSITIONS, place.total)
    # A single sample goes to the middle: at depth 0 any method with sinks would find it.
    before = units * place.share(positions) // (positions - 1) if positions > 1 else units // 2
    noise = f"{noise_line()}\n"
    line = f"The {name} is {key}. Keep it in mind: {key} is the {name}.\n"
    return Row(
        context=noise * before + line + noise * (units - before),
        input=f"What is the {name}?",
        answer=[key],
        facts={"depth": before / units},
    )


def _find(numbers: list[int], kind: str) -> int | float:
    if kind == "median":
        ordered, middle = sorted(numbers), len(numbers) // 2
        # The median of an even count is a float even if it is whole, as in the official labels, whose lists are even.
        return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    rank = {"second": 1, "third": 2}.get(kind.split()[0], 0)
    return sorted(set(numbers), reverse="largest" in kind)[rank]


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _signed(number: int) -> str:
    return f" {'-' if number < 0 else '+'} {abs(number)}" if number else ""


@cache
def noise_line() -> str:
    """The five noise sentences, read out of lm-eval's RULER source.

    The source is read and not imported, because importing that module takes 20 s and tries to download a tokenizer.

    Raises:
        DataError: lm-eval is not installed, or does not hold the sentences where version 0.4.13 does.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("InfiniteBench's noise text comes from the package lm-eval: pip install 'lm-eval==0.4.13'")
    path = Path(spec.submodule_search_locations[0]) / "tasks" / "ruler" / "prepare_niah.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.If(
                test=ast.Compare(comparators=[ast.Constant(value="repeat")]),
                body=[ast.Assign(value=ast.Constant(value=str(line))), *_],
            ):
                return line
    raise DataError(f"{path} has no haystack of type 'repeat': install lm-eval==0.4.13")
