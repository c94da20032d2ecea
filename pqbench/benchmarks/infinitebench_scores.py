"""Scores of InfiniteBench's twelve tasks, by the rules of the official scorer.

Source of the rules: https://github.com/OpenBMB/InfiniteBench, ``src/compute_scores.py`` (commit 88b3daa). Oddities of
the official rules are kept and named where they occur. We differ in two cases in which the official script stops with
an exception: a prediction like "94.0" for the integer label 94 counts as equal, and numbers of thousands of digits are
compared.

Every function takes the raw prediction and the accepted answers as strings and returns percent, 0 to 100. Where the
official rule looks at only one label, the first reference is used.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from pqbench.errors import DataError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Scorer = Callable[[str, Sequence[str]], float]

_RETRIEVAL_MARKS = "\n:\"'.,?!{}"
_CODE_RUN_MARKS = "\n.`'\":"
_CHOICE_MARKS = "\n\"'.,?!{}"
_DEBUG_MARKS = ("\n", "`", "'", '"', "-", "*", "Option", "option")
# In the official order: the first prefix that is found decides, even if a later one would have matched.
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")
_NUMBER = re.compile(r"\d+\.\d+|\d+")

# Unicode ranges (both ends included) of the Chinese and full-width punctuation that the Chinese rule removes.
# As in the official code, the opening double angle bracket and the full-width full stop are not among them.
_CHINESE_RANGES = (
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0xFE4F, 0xFE4F),
)
_CHINESE_MARKS = frozenset(string.punctuation).union(
    chr(code) for first, last in _CHINESE_RANGES for code in range(first, last + 1)
)


def first_integer(prediction: str, references: Sequence[str]) -> float:
    """Passkey and number_string: the first run of ASCII digits must equal the label as text, so leading zeros count."""
    found = re.search("[0-9]+", prediction)
    return _percent(found is not None and found.group() == references[0])


def kv_retrieval(prediction: str, references: Sequence[str]) -> float:
    """The label must be one of the words after newlines and ``: " ' . , ? ! { }`` were replaced by spaces."""
    return _percent(references[0] in _blank(prediction, _RETRIEVAL_MARKS).split())


def math_find(prediction: str, references: Sequence[str]) -> float:
    """The first number, integer or decimal, must equal the label; a minus sign is not part of a number."""
    found = _NUMBER.search(prediction)
    return _percent(found is not None and float(found.group()) == float(references[0]))


def math_calc(prediction: str, references: Sequence[str]) -> float:
    """The share of the labels that the predicted integers match before the first wrong one."""
    labels = [str(int(label)) for reference in references for label in re.findall("-?[0-9]+", reference)]
    correct = 0
    # Numbers are compared as text without leading zeros, because int() refuses more than 4300 digits.
    for number, label in zip(re.findall("[0-9]+", prediction), labels, strict=False):
        if (number.lstrip("0") or "0") != label:
            break
        correct += 1
    return 100.0 * correct / len(labels)


def code_run(prediction: str, references: Sequence[str]) -> float:
    """The last word must be an integer equal to the label; a decimal point splits words, so "4.0" is read as 0."""
    label = int(references[0])
    words = _blank(prediction, _CODE_RUN_MARKS).split()
    try:
        return _percent(bool(words) and int(words[-1]) == label)
    except ValueError:
        return 0.0


def code_debug(prediction: str, references: Sequence[str]) -> float:
    """The references are function name and letter. A reply is right if it starts with the letter and "." or ":", or if
    it names the letter or the function after a lead-in.

    As in the official rule, a bare letter is wrong, and exactly one character is skipped between lead-in and answer.
    """
    name, letter = references
    prediction = prediction.strip()
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 100.0
    return _percent(
        _starts_after(_collapse(_blank(prediction, _DEBUG_MARKS)), _DEBUG_PREFIXES, (letter, name)) or False
    )


def longbook_choice(prediction: str, references: Sequence[str]) -> float:
    """The references are option text and letter. If the reply begins with A, B, C or D, that letter alone decides, even
    in "Bleak House"; other forms are looked for only if it does not."""
    prediction = prediction.strip()
    if not prediction:
        return 0.0
    if prediction[0] in "ABCD":
        return _percent(prediction[0] in references)
    if prediction in references:
        return 100.0
    text = _collapse(_blank(prediction, _CHOICE_MARKS))
    led = _starts_after(text, _CHOICE_PREFIXES, references)
    if led is not None:
        return _percent(led)
    # The official code takes any substring of "ABCD" for a letter: the word "BC" ends the search and is wrong.
    first = next((word for word in text.split() if word in "ABCD"), None)
    return _percent(first is not None and first in references)


def longdialogue_qa(prediction: str, references: Sequence[str]) -> float:
    """The first label, exactly as written, must be one of the upper-cased words; a label of two words never matches."""
    words = _blank(prediction.strip(), _RETRIEVAL_MARKS).split()
    return _percent(references[0] in [word.upper() for word in words])


def longbook_qa_english(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over the accepted answers, from bags of lower-cased words without punctuation and articles."""
    return max(_f1(_english_words(prediction), _english_words(reference)) for reference in references)


def longbook_qa_chinese(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over the accepted answers, from bags of lower-cased characters without punctuation and spaces."""
    return max(_f1(_chinese_characters(prediction), _chinese_characters(reference)) for reference in references)


def longbook_sum(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of rougeLsum over the references; lines are sentences and words are not stemmed (the default of HF
    ``evaluate``)."""
    return 100.0 * float(_rouge().score_multi(list(references), prediction)["rougeLsum"].fmeasure)


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "passkey": first_integer,
        "number_string": first_integer,
        "kv_retrieval": kv_retrieval,
        "longbook_sum_eng": longbook_sum,
        "longbook_qa_eng": longbook_qa_english,
        "longbook_choice_eng": longbook_choice,
        "longdialogue_qa_eng": longdialogue_qa,
        "longbook_qa_chn": longbook_qa_chinese,
        "code_debug": code_debug,
        "code_run": code_run,
        "math_find": math_find,
        "math_calc": math_calc,
    }
)


def score(task: str, prediction: str, references: Sequence[str]) -> float:
    """The score of one prediction of InfiniteBench's ``task`` in percent, 0 to 100.

    Raises:
        DataError: the task is unknown, or its rule cannot use the references (none at all, no number, no letter).
    """
    if task not in SCORERS:
        raise DataError(f"InfiniteBench has no task {task!r}; tasks: {', '.join(SCORERS)}")
    if not references:
        raise DataError(f"a record of InfiniteBench's task {task} has no references")
    try:
        return SCORERS[task](prediction, references)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"references {list(references)[:3]!r} do not fit InfiniteBench's task {task}: {error}"
        ) from error


def _percent(right: bool) -> float:
    return 100.0 if right else 0.0


def _blank(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _collapse(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def _starts_after(text: str, prefixes: Sequence[str], labels: Sequence[str]) -> bool | None:
    """Whether a label starts one character after the first prefix found; None if the text has none of the prefixes."""
    for prefix in prefixes:
        at = text.find(prefix)
        if at >= 0:
            rest = text[at + len(prefix) :]
            return bool(rest) and any(rest[1:].startswith(label) for label in labels)
    return None


def _english_words(text: str) -> list[str]:
    # Punctuation is removed before articles, unlike in usual versions of the SQuAD script: "a-b" becomes "ab" first.
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _chinese_characters(text: str) -> list[str]:
    return [c for c in text.lower() if c not in _CHINESE_MARKS and not c.isspace()]


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(reference)
    return 100.0 * (2 * precision * recall) / (precision + recall)


@cache
def _rouge() -> RougeScorer:
    # Imported on first use, because it loads nltk, which only one of the twelve tasks needs.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)
