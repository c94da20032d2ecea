"""Budgets: values worked out by hand, general properties, and error messages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqbench.method import Budget, BudgetError, CompensatedBudget, ConfigError, PaperBudget, Split


@pytest.mark.parametrize(
    ("budget", "context", "prompt", "expected"),
    [
        # ratio 0.1 of 1000 = 100: 32 sinks, half of the other 68 window, half top-k
        (Budget(), 1000, 1000, (32, 34, 34)),
        (Budget(), 2000, 1000, (32, 84, 84)),  # grows with the context
        (Budget(grow=False), 2000, 1000, (32, 34, 34)),
        (Budget(), 500, 500, (32, 16, 16)),  # 50 is below the minimum of 64
        (Budget(), 1019, 1000, (32, 34, 35)),  # int(101.9) = 101: the odd token goes to top-k
        (Budget(window=10), 1000, 1000, (32, 10, 58)),
        (Budget(window_share=0.25), 1000, 1000, (32, 17, 51)),
        (Budget(window_share=0.0), 1000, 1000, (32, 1, 67)),
        (Budget(window_share=1.0), 1000, 1000, (32, 68, 0)),
        (Budget(tokens=128, ratio=None), 5000, 1000, (32, 48, 48)),
        (Budget(sink=4, window=6, tokens=10, ratio=None), 5000, 1000, (4, 6, 0)),
        # everything fits: the middle still competes
        (Budget(ratio=1.0), 1000, 1000, (32, 484, 484)),
        (Budget(tokens=128, ratio=None), 100, 100, (32, 34, 34)),
        (Budget(), 64, 64, (32, 16, 16)),
        (Budget(), 33, 33, (32, 1, 0)),
        (Budget(), 20, 20, (19, 1, 0)),
        (Budget(), 1, 1, (0, 1, 0)),
        (Budget(window=10), 5, 5, (4, 1, 0)),
        (Budget(sink=0, window=4096, ratio=1.0), 100, 100, (0, 100, 0)),
    ],
)
def test_numbers_by_hand(budget: Budget, context: int, prompt: int, expected: tuple[int, int, int]) -> None:
    assert budget.resolve(context, prompt) == Split(*expected)


@given(st.integers(33, 40000), st.sampled_from([0.001, 0.05, 0.1, 0.2, 0.5, 0.99]), st.integers(0, 5000))
def test_the_papers_split_is_that_of_the_released_code(prompt: int, ratio: float, decoded: int) -> None:
    """Window and top-k have int((s - 32) * c * 0.5) tokens each, fixed when the prompt ends; sinks and current token
    are added."""
    half = int((prompt - 32) * ratio * 0.5)  # 0 for the shortest prompts: never silently everything
    context = prompt + decoded + 1
    split = PaperBudget(ratio=ratio).resolve(context, prompt)
    if 32 + 2 * half + 1 < context:
        assert split == Split(32, half + 1, half)
    else:
        assert split.total == context


def test_the_papers_split_in_long_generation_stays_small() -> None:
    assert PaperBudget(ratio=0.2).resolve(30200, 200) == Split(32, 17, 16)  # AIME as released: 32 + 16 + 16 + 1
    assert PaperBudget(ratio=0.2, grow=True).resolve(30200, 200).total == 32 + 2 * 3016 + 1


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    sink, window = draw(st.integers(0, 40)), draw(st.none() | st.integers(1, 40))
    share, grow = draw(st.floats(0, 1)), draw(st.booleans())
    if draw(st.booleans()):
        tokens = draw(st.integers(sink + (window or 1), 300))
        return Budget(sink, window, tokens, None, share, grow=grow)
    minimum = draw(st.integers(sink + (window or 1), 120))
    return Budget(sink, window, None, draw(st.floats(0.01, 1.0)), share, minimum, grow)


@given(budgets(), st.integers(1, 500), st.integers(0, 300))
def test_a_split_covers_each_token_once(budget: Budget, prompt: int, decoded: int) -> None:
    context = prompt + decoded
    split = budget.resolve(context, prompt)
    base = context if budget.grow else prompt
    size = budget.tokens if budget.tokens is not None else max(budget.minimum, int((budget.ratio or 0) * base))
    assert split.total == min(size, context)
    assert min(split.sink, split.top_k) >= 0
    assert split.window >= 1  # the current token
    first, stop = split.middle(context)
    assert 0 <= first <= stop < context
    assert (first, context - stop) == (split.sink, split.window)
    assert split.top_k <= stop - first
    top = first + torch.randperm(stop - first)[: split.top_k]
    rows = split.around(top.expand(2, 3, -1), context)
    assert rows.shape == (2, 3, split.total)
    for row in rows.flatten(0, 1).tolist():
        assert len(set(row)) == len(row)
        assert {*range(split.sink), *range(context - split.window, context)} <= set(row)
        assert set(row) <= set(range(context))


@given(budgets(), st.integers(1, 400))
def test_the_middle_never_shrinks_while_decoding(budget: Budget, prompt: int) -> None:
    """Indexes grow when tokens leave the window, so a token must not return into the window."""
    middles = [budget.resolve(context, prompt).middle(context) for context in range(prompt, prompt + 120)]
    for (first, stop), (next_first, next_stop) in pairwise(middles):
        assert stop <= next_stop <= stop + 1 or first == stop
        assert first in (next_first, stop)


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.99])
def test_the_papers_middle_never_shrinks_either(ratio: float) -> None:
    for prompt in range(1, 150):
        budget = PaperBudget(sink=4, ratio=ratio)
        stops = [budget.resolve(context, prompt).middle(context)[1] for context in range(prompt, prompt + 40)]
        assert all(0 <= after - before <= 1 for before, after in pairwise(stops) if before > 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 100, "ratio": 0.2}, "exactly one"),
        ({"ratio": None}, "exactly one"),
        ({"ratio": 0.0}, r"ratio is 0.0.*\(0, 1\]"),
        ({"ratio": 1.5}, r"ratio is 1.5.*\(0, 1\]"),
        ({"ratio": -0.1}, r"\(0, 1\]"),
        ({"ratio": float("nan")}, "ratio is nan: use a number"),
        ({"window_share": 1.5}, "window_share is 1.5"),
        ({"sink": -1}, "sink"),
        ({"window": 0}, "window"),
        ({"tokens": 32, "ratio": None}, r"tokens is 32.*33"),
        ({"tokens": 41, "ratio": None, "window": 10}, r"tokens is 41.*42"),
    ],
)
def test_contradictions_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget(**options)  # type: ignore[arg-type]


def test_a_context_that_leaves_less_than_sinks_and_window_is_named() -> None:
    with pytest.raises(BudgetError, match=r"70 tokens \(ratio 0.1 of 700\).*sink 32.*window 40.*raise budget.ratio"):
        Budget(window=40).resolve(700, 700)
    with pytest.raises(BudgetError, match=r"sink 100"):
        Budget(sink=100).resolve(500, 500)


def test_a_fixed_budget_names_the_length_it_was_taken_from() -> None:
    with pytest.raises(BudgetError, match=r"ratio 0.1 of 700\)"):
        Budget(window=40, grow=False).resolve(900, 700)


@pytest.mark.parametrize("options", [{"window": 5}, {"minimum": 10}, {"window_share": 0.25}])
@pytest.mark.parametrize("kind", [PaperBudget, CompensatedBudget])
def test_fields_that_the_papers_budget_does_not_use_are_refused(
    kind: type[PaperBudget], options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"budget.{name} is .*does not use it.*Leave budget.{name} out"):
        kind(**options)


@given(budgets(), st.integers(41, 500), st.integers(0, 300))
def test_between_two_steps_an_evicting_method_leaves_room_for_the_next_token(
    budget: Budget, prompt: int, decoded: int
) -> None:
    held, coming = budget.between_steps(prompt + decoded, prompt), budget.resolve(prompt + decoded + 1, prompt)
    assert held.total == coming.total - 1
    assert (held.sink, held.top_k) == (coming.sink, coming.top_k)
    always = held.always(torch.arange(prompt + decoded), prompt + decoded)
    first, stop = coming.middle(prompt + decoded + 1)
    assert always.tolist() == [not first <= row < stop for row in range(prompt + decoded)]


def test_the_papers_budget_is_a_ratio() -> None:
    with pytest.raises(BudgetError, match="set budget"):
        PaperBudget(ratio=None, tokens=100)


@pytest.mark.parametrize(
    ("budget", "label"),
    [(Budget(), "10 %"), (Budget(ratio=0.025), "2.5 %"), (Budget(tokens=90, ratio=None), "90 tokens")],
)
def test_label(budget: Budget, label: str) -> None:
    assert budget.label == label


def test_tokens_alone_are_enough() -> None:
    assert (Budget(tokens=4096).tokens, Budget(tokens=4096).ratio, Budget(tokens=4096).label) == (
        4096,
        None,
        "4096 tokens",
    )
