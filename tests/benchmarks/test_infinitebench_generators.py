"""Recipes against their definition: labels are computed again from the text alone, sweeps from the official sizes."""

from __future__ import annotations

import ast
import json
import re
import runpy
import statistics
import tempfile
import uuid
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqbench.benchmarks.infinitebench_generators import (
    KINDS,
    LAYERS,
    OFFICIAL,
    Place,
    Row,
    fit,
    generate,
    least_units,
    noise_line,
)
from pqbench.benchmarks.infinitebench_scores import score
from pqbench.errors import ConfigError

TASKS = tuple(OFFICIAL)


def solve(task: str, row: Row) -> list[str]:
    """The answer of a careful reader, found in the text of the prompt without the code of the recipes."""
    match task:
        case "passkey" | "number_string":
            keys = set(re.findall(r"\d+", row.context))
            assert len(keys) == 1
            return list(keys)
        case "kv_retrieval":
            (key,) = re.findall(r'Key: "([^"]+)"', row.input)
            (value,) = re.findall(f'"{key}": "([^"]+)"', row.context)
            return [value]
        case "math_find":
            return [str(_statistic(ast.literal_eval(row.context), row.input))]
        case "math_calc":
            parts = re.findall(r"[+-] \d+", row.context)
            first = int(row.context.split()[0])
            return [str(first + sum(int(p.replace(" ", "")) for p in parts[: i + 1])) for i in range(len(parts))]
        case _:
            return [str(_run(row))]


def _statistic(numbers: list[int], question: str) -> int | float:
    if "median" in question:
        return statistics.median(numbers)
    rank = next((i for i, word in enumerate(("second", "third"), 1) if word in question), 0)
    extreme = max if "largest" in question else min
    for _ in range(rank):
        worst = extreme(numbers)
        numbers = [n for n in numbers if n != worst]
    return extreme(numbers)


def _run(row: Row) -> int:
    ((name, x),) = re.findall(r"(func_\d+)\((-?\d+)\)", row.input)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(row.context.partition("\n\n")[2], encoding="utf-8")
        return int(runpy.run_path(str(program))[name](int(x)))


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_labels_are_right(task: str, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    place = Place(data.draw(st.integers(0, total - 1)), total)
    units = data.draw(st.integers(least_units(task, place), 120))
    row = generate(task, units, place, str(data.draw(st.integers(0, 10**6))))
    assert row.answer == solve(task, row)
    assert score(task, ", ".join(row.answer), row.answer) == 100


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_rows_and_samples_differ(task: str) -> None:
    rows = [generate(task, 40, Place(i, 20), "0") for i in range(20)]
    assert rows == [generate(task, 40, Place(i, 20), "0") for i in range(20)]
    assert len({(row.context, row.input) for row in rows}) == 20
    others = [generate(task, 40, Place(i, 20), "1") for i in range(20)]
    assert all(row.context != other.context for row, other in zip(rows, others, strict=True))


def test_rows_are_the_same_on_every_machine() -> None:
    # Stored values, so that a change of Python's generator or of a recipe is noticed.
    assert generate("passkey", 3, Place(0, 8), "0").answer == ["24629"]
    assert generate("kv_retrieval", 3, Place(7, 8), "0").answer == ["c8585cf2-bdc8-485b-b600-b9f62ae88a94"]


def test_official_sizes() -> None:
    assert {task: (official.units, official.samples) for task, official in OFFICIAL.items()} == {
        "passkey": (5220, 590),
        "number_string": (5220, 590),
        "kv_retrieval": (2500, 500),
        "math_find": (60000, 350),
        "math_calc": (30000, 50),
        "code_run": (550, 400),
    }


@pytest.mark.parametrize("task", ["passkey", "number_string"])
def test_passkey_sweeps_59_depths_ten_times_by_90_lines(task: str) -> None:
    before = []
    for i in range(0, 590, 7):
        row = generate(task, 5220, Place(i, 590), "0")
        lines = row.context.splitlines()
        assert len(lines) == 5221
        (at,) = [n for n, line in enumerate(lines) if line != noise_line()]
        assert lines[at].count(row.answer[0]) == 2
        assert row.facts["depth"] == at / 5220
        before.append(at)
    assert before == [i // 10 * 90 for i in range(0, 590, 7)]


@pytest.mark.parametrize(
    ("units", "total", "expected"), [(100, 5, [0, 25, 50, 75, 100]), (10, 2, [0, 10]), (9, 1, [4])]
)
def test_few_passkeys_are_spread_from_end_to_end(units: int, total: int, expected: list[int]) -> None:
    contexts = [generate("passkey", units, Place(i, total), "0").context.splitlines() for i in range(total)]
    assert [next(n for n, line in enumerate(c) if line != noise_line()) for c in contexts] == expected


def test_keys_have_the_official_digits() -> None:
    rows = [generate("passkey", 1, Place(i, 400), "0") for i in range(400)]
    assert all(re.fullmatch("[0-9]{5}", row.answer[0]) for row in rows)
    assert set(Counter(row.answer[0][0] for row in rows)) == set("0123456789")
    for i in range(200):
        (digits,) = generate("number_string", 1, Place(i, 200), "0").answer
        assert re.fullmatch("[0-9]{10}", digits)
        # Copies stand beside their digit, so ten digits form at most five runs.
        assert len(re.findall(r"(\d)\1*", digits)) <= 5


def test_noise_is_five_short_sentences() -> None:
    assert noise_line().count(".") == 5
    assert "\n" not in noise_line()


def test_kv_retrieval_asks_for_every_fifth_of_2500_unique_pairs() -> None:
    for i in (0, 1, 250, 499):
        row = generate("kv_retrieval", 2500, Place(i, 500), "0")
        header, _, body = row.context.partition("\n")
        assert header
        assert "\n" not in body
        pairs = json.loads(body)
        assert len(pairs) == 2500
        assert len({*pairs, *pairs.values()}) == 5000
        assert row.facts["index"] == 5 * i
        assert list(pairs)[5 * i] in row.input
    assert all(uuid.UUID(text).version == 4 and str(uuid.UUID(text)) == text for pair in pairs.items() for text in pair)


def test_math_find_asks_the_seven_kinds_50_times_each() -> None:
    kinds = [KINDS[Place(i, 350).share(7)] for i in range(350)]
    assert Counter(kinds) == dict.fromkeys(KINDS, 50)
    assert [generate("math_find", 9, Place(i, 7), "0").facts["kind"] for i in range(7)] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_math_find_draws_from_the_official_ranges(kind: str) -> None:
    lows, highs = set(), set()
    for i in range(40):
        row = generate("math_find", 2000, Place(KINDS.index(kind), 7), str(i))
        numbers = ast.literal_eval(row.context)
        assert len(numbers) == 2000
        lows.add(min(numbers))
        highs.add(max(numbers))
    # The chance that 2000 draws from at most 100 values miss one end is 2e-9.
    assert (lows == {0}) == ("largest" in kind)
    assert (highs == {99}) == ("smallest" in kind)
    assert lows <= set(range(20))
    assert highs <= set(range(79, 100))


def test_the_median_of_an_even_count_is_a_float_and_of_an_odd_count_an_integer() -> None:
    assert all("." in generate("math_find", 100, Place(6, 7), str(i)).answer[0] for i in range(9))
    assert all("." not in generate("math_find", 101, Place(6, 7), str(i)).answer[0] for i in range(9))


def test_math_calc_has_a_value_after_each_operator_and_stays_within_0_and_99() -> None:
    row = generate("math_calc", 30000, Place(0, 50), "0")
    assert len(re.findall(r"\d+", row.context)) == 30000
    assert len(row.answer) == 29999
    assert re.fullmatch(r"\d{1,2}( [+-] \d{1,2})*", row.context)
    assert {int(value) for value in row.answer} == set(range(100))
    # Both signs are equally likely: about 15000 of each, within six standard deviations.
    assert abs(row.context.count("+") - 15000) < 520


def test_code_run_is_layered_and_within_the_official_ranges() -> None:
    seen = Counter(LAYERS[Place(i, 400).share(5)] for i in range(400))
    assert seen == dict.fromkeys(LAYERS, 80)
    for i, layers in enumerate(LAYERS):
        row = generate("code_run", 550, Place(i, 5), "0")
        bodies = dict(re.findall(r"def func_(\d+)\(x\):\n    return (.+)\n", row.context))
        assert len(bodies) == 550 // layers * layers
        assert all(1 <= int(name) <= 1100 for name in bodies)
        assert all(int(one) < int(two) for one, two in pairwise(bodies))
        depth = {name: _depth(name, bodies) for name in bodies}
        assert Counter(depth.values()) == dict.fromkeys(range(1, layers + 1), 550 // layers)
        added = {int(sign + n) for body in bodies.values() for sign, n in re.findall(r" ([+-]) (\d+)$", body)}
        assert added <= set(range(-12, 18)) - {0}
        assert {min(added), max(added)} == {-12, 17}
        (start, x) = re.findall(r"func_(\d+)\((-?\d+)\)", row.input)[0]
        assert depth[start] == layers
        assert -10 <= int(x) <= 10


def _depth(name: str, bodies: dict[str, str]) -> int:
    called = re.match(r"func_(\d+)", bodies[name])
    return 1 + _depth(called[1], bodies) if called else 1


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None, max_examples=25)
@given(target=st.integers(700, 6000), index=st.integers(0, 7), guess=st.sampled_from([0, 1, 30, 10**6]))
def test_one_more_unit_would_not_fit(task: str, target: int, index: int, guess: int) -> None:
    place = Place(index, 8)

    def size(row: Row) -> int:
        return len(row.context + row.input)

    def make(units: int) -> Row:
        return generate(task, units, place, "0")

    row, units = fit(make, size, target, least_units(task, place), guess)
    assert row == make(units)
    assert size(row) <= target < size(make(units + 1))


def test_fitting_takes_few_looks() -> None:
    looks = []

    def size(row: Row) -> int:
        looks.append(row)
        return len(row.context) // 3

    _, units = fit(lambda n: generate("math_find", n, Place(0, 7), "0"), size, 100_000, 6)
    assert len(looks) < 12
    looks.clear()
    fit(lambda n: generate("math_find", n, Place(0, 7), "0"), size, 100_000, 6, guess=units)
    assert len(looks) < 5


@pytest.mark.parametrize("task", TASKS)
def test_a_target_too_short_for_one_unit_is_refused(task: str) -> None:
    least = least_units(task, Place(0, 8))
    with pytest.raises(ConfigError, match=r"length=3 is too short: the shortest prompt has \d+"):
        fit(lambda n: generate(task, n, Place(0, 8), "0"), lambda row: len(row.context), 3, least)


def test_too_few_units_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="code_run needs at least 10 units"):
        generate("code_run", 9, Place(7, 8), "0")
    with pytest.raises(ConfigError, match="code_debug cannot be generated; these can: passkey"):
        generate("code_debug", 9, Place(0, 8), "0")
