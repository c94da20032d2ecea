"""The metrics of LongBench v1: pure functions of one prediction and one reference, with results from 0 to 1.

The rules are those of ``metrics.py`` in https://github.com/THUDM/LongBench (commit 2e00731), including its mistakes
where they change a score. Two libraries that it calls are replaced by equivalent code: the package ``rouge``, which is
recursive and needs quadratic memory, and ``fuzzywuzzy``, whose results depend on whether python-Levenshtein is
installed. The official requirements do not list python-Levenshtein, so the standard library's matcher is used.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pqbench.errors import DataError

Metric: TypeAlias = Callable[[str, str], float]

# Code points that the official list of Chinese punctuation covers: 《 and the full-width full stop are not among them.
_CHINESE_PUNCTUATION = (
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
)
_DROP_ENGLISH = dict.fromkeys(map(ord, string.punctuation))
_DROP_CHINESE = _DROP_ENGLISH | {code: None for low, high in _CHINESE_PUNCTUATION for code in range(low, high + 1)}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

# The package rouge follows its table backwards by recursion. If that takes more steps than Python's default limit of
# 1000 frames allows, the official scorer returns 0. This is rare in English, but happens for Chinese answers of a
# thousand words, since they hold no full stop that splits them. Measured with the official scripts under Python 3.11.
_ROUGE_STEPS = 990


def best(metric: Metric, prediction: str, references: Iterable[str]) -> float:
    """The highest score over the accepted answers; 0 without any."""
    return max((metric(prediction, reference) for reference in references), default=0.0)


def first_line(prediction: str) -> str:
    """The part of a few-shot answer that is scored: the first line after leading newlines."""
    return prediction.lstrip("\n").partition("\n")[0]


@cache
def _segmenter() -> Any:
    import jieba  # loads a dictionary for a second, and says so on stderr by default

    jieba.setLogLevel(logging.WARNING)
    return jieba.Tokenizer()


def _segment(text: str) -> list[str]:
    return list(_segmenter().cut(text))


def _overlap_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    shared = sum((Counter(prediction) & Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_DROP_ENGLISH)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_DROP_CHINESE).split()) for word in _segment(text))
    return [word for word in words if word]


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words; case, ASCII punctuation and English articles are ignored."""
    return _overlap_f1(_english_words(prediction), _english_words(reference))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the bags of words that jieba finds; case and punctuation are ignored."""
    return _overlap_f1(_chinese_words(prediction), _chinese_words(reference))


def count(prediction: str, reference: str) -> float:
    """The share of the whole numbers in the prediction that equal the reference."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def _retrieval(prediction: str, reference: str, label: str) -> float:
    found = re.search(label + r"(\d+)", reference)
    if found is None:
        raise DataError(f"the answer {reference!r} of a retrieval task names no {label.strip()!r} with a number")
    return count(prediction, found[1])


def retrieval(prediction: str, reference: str) -> float:
    """The share of the whole numbers in the prediction that equal the paragraph number in the reference.

    Raises:
        DataError: the reference names no paragraph.
    """
    return _retrieval(prediction, reference, "Paragraph ")


def retrieval_zh(prediction: str, reference: str) -> float:
    """``retrieval`` for Chinese references.

    Raises:
        DataError: the reference names no paragraph.
    """
    return _retrieval(prediction, reference, "段落")


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity, in whole percent, of the first line that looks like code (no backtick, ``#`` or ``//``)."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    matcher = SequenceMatcher(None, line, reference)
    # The upper bound saves minutes on a very long prediction, whose similarity rounds to 0 anyway.
    return round(100 * matcher.ratio()) / 100 if round(100 * matcher.quick_ratio()) else 0.0


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, if the true class is among them; otherwise 0.

    Class names that are part of the true class's name are not counted.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in reference and name != reference:
            named.remove(name)
        # The official loop removes names from the list while it iterates, and so skips the name after each removed one.
        position += 1
    return 1.0 / len(named) if reference in named else 0.0


def rouge_l_zh(prediction: str, reference: str) -> float:
    """``rouge_l`` of the texts after jieba split them into words."""
    return rouge_l(" ".join(_segment(prediction)), " ".join(_segment(reference)))


def rouge_l(prediction: str, reference: str) -> float:
    """Summary-level ROUGE-L F1 over sets of words, as the package ``rouge`` 1.0.1 computes it.

    Sentences end at full stops, words at whitespace. Every distinct word counts that lies in a longest common
    subsequence of a reference sentence and a predicted sentence. Empty texts score 0.
    """
    guess, truth = _sentences(prediction), _sentences(reference)
    if not guess or not truth:
        return 0.0
    shared: set[str] = set()
    table = _Sentences(guess)
    for sentence in dict.fromkeys(truth):
        words = table.common_words(sentence.split(" "))
        if words is None:
            return 0.0
        shared |= words
    recall = len(shared) / len({word for sentence in truth for word in sentence.split(" ")})
    precision = len(shared) / len({word for sentence in guess for word in sentence.split(" ")})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[str]:
    # Whitespace between two full stops is kept as a sentence with one empty word.
    return [" ".join(part.split()) for part in text.split(".") if part]


class _Sentences:
    """All distinct sentences of a prediction side by side, so that one numpy operation handles one reference word.

    A sentence occupies a zero column and one column per word. A base that grows from sentence to sentence is added to
    its lengths, so that a running maximum over the whole row never carries over from one sentence into the next.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self.words: list[str | None] = []
        self.ends: list[int] = []
        for sentence in dict.fromkeys(sentences):
            self.words += [None, *sentence.split(" ")]
            self.ends.append(len(self.words) - 1)
        self._ids: dict[str, int] = {}
        for word in self.words:
            if word is not None:
                self._ids.setdefault(word, len(self._ids))
        self._columns = np.array([-1 if word is None else self._ids[word] for word in self.words])
        self._order = np.cumsum(self._columns == -1) - 1

    def common_words(self, reference: Sequence[str]) -> set[str] | None:
        """The words that ``reference`` shares, in order, with any of the sentences; None if the recursion of the
        package ``rouge`` would be too deep."""
        above = self._order * (len(reference) + 1)
        upward = np.zeros((len(reference) + 1, len(above)), dtype=bool)
        for row, word in enumerate(reference, start=1):
            equal = self._columns == self._ids.get(word, -2)
            longest = above.copy()
            longest[1:] = np.maximum(longest[1:], above[:-1] + equal[1:])
            longest = np.maximum.accumulate(longest)
            upward[row, 1:] = above[1:] > longest[:-1]
            above = longest
        common: set[str] = set()
        for end in self.ends:
            words = self._walk(reference, upward, end)
            if words is None:
                return None
            common |= words
        return common

    def _walk(self, reference: Sequence[str], upward: NDArray[np.bool_], column: int) -> set[str] | None:
        row, steps, found = len(reference), 0, set()
        while row and self.words[column] is not None:
            steps += 1
            if steps > _ROUGE_STEPS:
                return None
            word = reference[row - 1]
            if self.words[column] == word:
                found.add(word)
                row, column = row - 1, column - 1
            elif upward[row, column]:
                row -= 1
            else:
                column -= 1
        return found
