"""LongBench's metrics against results of the official scorer, and the properties that every scorer must have."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqbench.benchmarks import longbench_metrics as metrics
from pqbench.benchmarks.longbench import LongBench
from pqbench.errors import DataError

TABLE = json.loads(Path(__file__).with_name("longbench_metric_cases.json").read_text(encoding="utf-8"))
CASES = [
    pytest.param(task, *case, id=f"{task}-{n}")
    for task, cases in TABLE["cases"].items()
    for n, case in enumerate(cases)
]
QUICK = settings(max_examples=150, deadline=None, derandomize=True)

# Few letters, digits and separators that the rules treat differently, so that random texts often share words.
TEXT = st.text(alphabet="ab .,\n#Aé12中国会议。", max_size=60)
WORDS = st.lists(st.sampled_from(["one", "two", "three", "The", "four.", ".", "five"]), max_size=40).map(" ".join)


def score(task: str, prediction: str, references: list[str], **metadata: Any) -> float:
    record = {"task": task, "prediction": prediction, "references": references, "metadata": metadata}
    return LongBench().score(record)["score"]


@pytest.mark.parametrize(("task", "prediction", "references", "expected"), CASES)
def test_official_figure(task: str, prediction: str, references: list[str], expected: float) -> None:
    metadata = {"all_classes": TABLE["classes"][task]} if task in TABLE["classes"] else {}
    assert score(task, prediction, references, **metadata) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "task",
    ["narrativeqa", "multifieldqa_zh", "gov_report", "vcsum", "trec", "passage_count", "passage_retrieval_en"]
    + ["passage_retrieval_zh", "lcc"],
)
def test_every_metric_has_twenty_cases(task: str) -> None:
    assert len(TABLE["cases"][task]) >= 20


@QUICK
@given(TEXT)
def test_identity_scores_100(text: str) -> None:
    line = "x" + text.replace("\n", "").replace("#", "")
    assert metrics.code_similarity(line, line) == 1
    assert metrics.qa_f1("word " + text, "word " + text) == 1
    assert metrics.qa_f1_zh("会议 " + text, "会议 " + text) == 1
    assert metrics.rouge_l("word " + text, "word " + text) == pytest.approx(1, abs=1e-7)
    assert metrics.rouge_l_zh("会议 " + text, "会议 " + text) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("task", TABLE["cases"])
def test_an_empty_prediction_scores_0(task: str) -> None:
    answer = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落1"}.get(task, "word")
    assert score(task, "", [answer], all_classes=["word", "other"]) == 0


@QUICK
@given(TEXT, TEXT)
def test_scores_stay_within_0_and_100(prediction: str, reference: str) -> None:
    for task in ("narrativeqa", "multifieldqa_zh", "gov_report", "vcsum", "triviaqa", "samsum", "passage_count", "lcc"):
        assert 0 <= score(task, prediction, [reference]) <= 100


@QUICK
@given(WORDS, WORDS)
def test_english_f1_ignores_case_punctuation_and_whitespace(prediction: str, reference: str) -> None:
    value = metrics.qa_f1(prediction, reference)
    assert metrics.qa_f1(prediction.upper(), reference) == value
    assert metrics.qa_f1(prediction.replace(" ", " \n\t"), reference) == value
    assert metrics.qa_f1(f"!{prediction}?", reference) == value
    assert metrics.qa_f1(reference, prediction) == pytest.approx(value)


@QUICK
@given(WORDS, WORDS)
def test_rouge_ignores_whitespace_but_not_case(prediction: str, reference: str) -> None:
    assert metrics.rouge_l(prediction.replace(" ", "\n\t "), reference) == metrics.rouge_l(prediction, reference)
    assert metrics.rouge_l("WORD", "word") == 0


@QUICK
@given(WORDS, WORDS)
def test_code_and_few_shot_scores_depend_on_the_first_line_only(prediction: str, rest: str) -> None:
    line = "x" + prediction
    assert score("lcc", f"\n\n{line}\n{rest}", ["x one"]) == score("lcc", line, ["x one"])
    assert score("triviaqa", f"\n{line}\n{rest}", ["x one"]) == score("triviaqa", line, ["x one"])


@QUICK
@given(st.one_of(TEXT, WORDS), st.one_of(TEXT, WORDS))
def test_rouge_equals_the_package(prediction: str, reference: str) -> None:
    rouge = pytest.importorskip("rouge").Rouge()
    try:
        expected = rouge.get_scores(prediction, reference)[0]["rouge-l"]["f"]
    except ValueError:  # the package refuses empty texts, which the official scorer counts as 0
        expected = 0.0
    assert metrics.rouge_l(prediction, reference) == expected


@QUICK
@given(TEXT, TEXT)
def test_code_similarity_equals_the_package(prediction: str, reference: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher.__module__ != "difflib":
        pytest.skip("python-Levenshtein changes the package's figures")
    line = prediction.replace("\n", "").replace("#", "")
    assert metrics.code_similarity(line, reference) == fuzz.ratio(line, reference) / 100


def test_no_reference_scores_0() -> None:
    assert metrics.best(metrics.qa_f1, "word", []) == 0


@pytest.mark.parametrize("metric", [metrics.retrieval, metrics.retrieval_zh])
def test_a_retrieval_answer_without_a_number_is_named(metric: metrics.Metric) -> None:
    with pytest.raises(DataError, match="names no"):
        metric("3", "Section 3")


RUNAWAY = {
    "one word": "a" * 100_000,
    "words": "word " * 20_000,
    "sentences": "a. " * 33_333,
    "different words": " ".join(map(str, range(17_000))),
    "chinese": "中国经济发展会议。" * 11_111,
}


@pytest.mark.parametrize("text", RUNAWAY.values(), ids=RUNAWAY)
@pytest.mark.parametrize(
    "task",
    ["narrativeqa", "multifieldqa_zh", "gov_report", "vcsum", "trec", "passage_count", "passage_retrieval_en", "lcc"],
)
def test_a_prediction_of_100k_characters_is_scored_in_seconds(task: str, text: str) -> None:
    metrics.qa_f1_zh("中", "中")  # jieba's dictionary loads once
    reference = {"lcc": "a a b c " * 20, "passage_retrieval_en": "Paragraph 7"}.get(task, "word a 经济发展 7. " * 100)
    started = time.perf_counter()
    assert 0 <= score(task, text, [reference], all_classes=["word", "a"]) <= 100
    assert time.perf_counter() - started < 20
