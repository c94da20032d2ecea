"""String recall and ROUGE-1, the two ways in which needle benchmarks are scored. All results are in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from pqbench.errors import DataError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_recall(prediction: str, references: Sequence[str]) -> float:
    """The share of ``references`` that ``prediction`` contains, ignoring case: RULER's ``string_match_all``.

    Source: NVIDIA/RULER ``scripts/eval/synthetic/constants.py`` and the clean-up of ``evaluate.py``.

    Raises:
        DataError: there are no references, or one is empty, which every text would contain.
    """
    return 100 * sum(_found(prediction, references)) / len(references)


def string_recall_any(prediction: str, references: Sequence[str]) -> float:
    """100 if ``prediction`` contains one of ``references``, otherwise 0: RULER's ``string_match_part``.

    Raises:
        DataError: there are no references, or one is empty.
    """
    return 100.0 * any(_found(prediction, references))


def rouge1(reference: str, prediction: str) -> float:
    """The ROUGE-1 F measure with Porter stemming, by the package ``rouge_score``."""
    return 100 * float(_scorer().score(reference, prediction)["rouge1"].fmeasure)


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if isinstance(references, str) or not references or not all(references):
        raise DataError(f"string recall needs a list of non-empty references, not {references!r}")
    text = _CONTROL.sub("\n", prediction.strip()).lower()
    return [reference.lower() in text for reference in references]


@cache
def _scorer() -> RougeScorer:
    # Imported when the first score is computed, because rouge_score loads nltk.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)
