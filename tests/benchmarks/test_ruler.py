from __future__ import annotations

import importlib
import random
import re
import sys
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks import ruler_library
from pqbench.benchmarks.base import Prompter, Sample
from pqbench.benchmarks.prose import speeches
from pqbench.benchmarks.ruler import Ruler
from pqbench.benchmarks.ruler_tasks import GROUPS, TASKS, largest
from pqbench.errors import ConfigError, DataError
from tests.benchmarks.bpe import byte_bpe

NIAH = [name for name in TASKS if name.startswith("niah")]
OFFICIAL_NEW_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
LENGTH = 3000


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from two speeches."""
    return byte_bpe(speeches()[:2], 1500)


def prompter(max_length: int = 20_000) -> Prompter:
    return Prompter(tokenizer(), max_length)


def text_of(sample: Sample) -> str:
    return str(tokenizer().decode(sample.input_ids))


def draw(task: str, **options: Any) -> list[Sample]:
    return list(Ruler(tasks=[task], **{"lengths": [LENGTH], "per_cell": 3, **options}).samples(prompter()))


def split(sample: Sample) -> tuple[str, str, str]:
    """Split a prompt into context (with an example, if any), question and lead-in."""
    prompt, lead_in = text_of(sample).split("<|end|>\n<|assistant|>\n")
    opening = {"niah": "\nWhat ", "qa": "\nQuestion:"}.get(sample.task.partition("_")[0], "\nQuestion:")
    context, _, question = prompt.rpartition(opening)
    return context, question, lead_in


@pytest.mark.parametrize("task", NIAH)
def test_needles_answer_the_question(task: str) -> None:
    for sample in draw(task):
        context, question, lead_in = split(sample)
        found: dict[str, list[str]] = {}
        for key, value in re.findall(r"One of the special magic (?:numbers|uuids) for (.+?) is: (\S+)\.", context):
            found.setdefault(key, []).append(value)
        kind, asked = re.findall(r"special magic (\w+) for (.+) mentioned in the provided text\?", question)[0]
        keys = re.split(r", and |, ", asked)
        assert [sorted(found[key]) for key in keys] == [sorted(values) for values in batches(sample.references, keys)]
        text = text_of(sample)
        assert all(text.count(value) == 1 for value in sample.references)
        several = len(sample.references) > 1
        assert kind in ("numbers", "uuids") if several else kind in ("number", "uuid")
        assert lead_in == (
            f"The special magic {kind} for {asked} mentioned in the provided text {'are' if several else 'is'}"
        )


def batches(references: list[str], keys: list[str]) -> list[list[str]]:
    """The references grouped by key; they are listed key by key."""
    each = len(references) // len(keys)
    return [references[i : i + each] for i in range(0, len(references), each)]


@pytest.mark.parametrize(
    ("task", "needles", "references"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_number_of_needles(task: str, needles: int, references: int) -> None:
    (sample,) = draw(task, per_cell=1)
    assert text_of(sample).count("One of the special magic") == needles
    assert len(sample.references) == references


def test_needle_haystacks() -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        (sample,) = draw(task, per_cell=1)
        lines = split(sample)[0].splitlines()[2:]
        assert len(lines) == sample.metadata["units"] + 1
        assert all(line.startswith("One of the special magic ") for line in lines)
    (noise,) = draw("niah_single_1", per_cell=1)
    assert text_of(noise).count("\nThe grass is green. The sky is blue.") == noise.metadata["units"]


def test_essays_are_the_prose() -> None:
    flat = [" ".join(speech.split()) for speech in speeches()]
    samples = draw("niah_single_2")
    openings = [split(sample)[0].partition("afterwards.\n")[2] for sample in samples]
    openings = [re.sub(r"^One of the special magic .+?\. ", "", opening)[:80] for opening in openings]
    assert all(any(speech.startswith(opening) for speech in flat) for opening in openings)


def test_variables_can_be_tracked() -> None:
    for sample in draw("vt", per_cell=6):
        context, question, lead_in = split(sample)
        example, _, main = context.rpartition("Memorize and track")
        value = re.findall(r"assigned the value (\d+) in", question)[0]
        assert assigned(main, value) == set(sample.references)
        assert len(set(sample.references)) == 5
        assert lead_in.endswith(f"5 variables are assigned the value {value}, they are:")
        other = re.findall(r"assigned the value (\d+) in", example)[0]
        assert other != value
        assert assigned(example, value) == set()
        solved = example.rpartition("they are: ")[2].split()
        assert assigned(example, other) == set(solved)
        assert len(solved) == 5


def assigned(text: str, value: str) -> set[str]:
    """The variables that have ``value`` after all assignments; each statement has a line of its own."""
    statements = [line.split(" = ") for line in text.splitlines() if line.startswith("VAR ")]
    assert text.count("VAR ") == sum(1 + right.count("VAR ") for _, right in statements)
    known: set[str] = set()
    for _ in statements:
        for left, right in statements:
            source = right.strip().removeprefix("VAR ")
            if source == value or source in known:
                known.add(left.removeprefix("VAR "))
    return known


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (6000, 30, 3)])
def test_common_words_can_be_counted(length: int, often: int, seldom: int) -> None:
    for sample in draw("cwe", lengths=[length]):
        context, _, lead_in = split(sample)
        example, _, main = context.rpartition("Below is a numbered list")
        counts = numbered(main)
        assert {word for word, count in counts.items() if count == often} == set(sample.references)
        assert {count for word, count in counts.items() if word not in sample.references} == {seldom}
        assert len(set(sample.references)) == 10
        assert lead_in == "Answer: The top 10 words that appear most often in the list are:"
        words, _, solved = example.partition("\nQuestion:")
        top = numbered(words).most_common(11)
        assert {word for word, _ in top[:10]} == set(numbered(solved.partition("list are:")[2]))
        assert top[9][1] > top[10][1]


def numbered(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+\. (.+?)(?=\s+\d+\. |\s*$)", text))


def test_frequent_words_can_be_counted() -> None:
    for length in (900, LENGTH):
        for sample in draw("fwe", lengths=[length]):
            coded = split(sample)[0].partition("coded words. ")[2].split()
            counts = Counter(word for word in coded if set(word) != {"."})
            assert [word for word, _ in counts.most_common(3)] == sample.references
            assert counts.most_common(4)[2][1] > counts.most_common(4)[3][1]
            assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts)


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(GROUPS["offline"]),
    # From 4096 on, cwe repeats its words more often: its shortest prompt is then above 4096 tokens of this tokenizer.
    length=st.integers(2200, 4095) | st.integers(5000, 7000),
    seed=st.integers(0, 99),
    chat=st.booleans(),
)
def test_prompt_and_answer_fit_the_length(task: str, length: int, seed: int, chat: bool) -> None:
    (sample,) = draw(task, lengths=[length], per_cell=1, seed=seed, chat=chat)
    assert sample.max_new_tokens == OFFICIAL_NEW_TOKENS[task]
    total = len(sample.input_ids) + sample.max_new_tokens
    assert length - 250 < total <= length, "at most about one unit is missing"
    assert 0 < sample.question_tokens < 300
    assert ("<|user|>" in text_of(sample)) == chat


def test_plain_prompt_goes_on_into_the_lead_in() -> None:
    for task in GROUPS["offline"]:
        (chat,), (plain,) = draw(task, per_cell=1), draw(task, per_cell=1, chat=False)
        lead_in = split(chat)[2]
        assert re.search(rf"[?.] {re.escape(lead_in.split(' for ')[0])}", text_of(plain)[-600:])


def test_question_tokens_cover_the_question() -> None:
    starts = {"niah": "What ", "vt": "Question:", "cwe": "Question:", "fwe": "Question:"}
    for task in GROUPS["offline"]:
        (sample,) = draw(task, per_cell=1)
        tail = str(tokenizer().decode(sample.input_ids[-sample.question_tokens :])).strip()
        assert tail.startswith(starts[task.partition("_")[0]])


@pytest.mark.parametrize("task", GROUPS["offline"])
def test_reproducible_and_different(task: str) -> None:
    first = draw(task, per_cell=4)
    random.seed(1)
    assert draw(task, per_cell=4) == first
    assert draw(task, per_cell=2, lengths=[2500, LENGTH])[2:] == first[:2], "another grid changes no sample"
    assert len({tuple(sample.input_ids) for sample in first}) == 4
    assert len({tuple(sample.references) for sample in first}) == 4
    assert [sample.id for sample in first] == [f"{task}-{LENGTH}-{i}" for i in range(4)]
    assert all(a.references != b.references for a, b in zip(first, draw(task, per_cell=4, seed=5), strict=True))


def test_global_state_is_left_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).random_sample()
    for task in GROUPS["offline"]:
        draw(task, per_cell=1)
    assert (random.random(), np.random.random_sample()) == expected


def test_library_is_loaded_without_download_or_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    import wonderwords

    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("downloads nltk data"))
    known = set(sys.modules)
    find, words = nltk.data.find, wonderwords.RandomWord
    ruler_library.library.cache_clear()
    module = ruler_library.library("prepare_niah")
    assert (nltk.data.find, wonderwords.RandomWord) == (find, words)
    assert not any(name.startswith("lm_eval.tasks.ruler") for name in set(sys.modules) - known)
    assert module.WORDS == [], "six million strings stay unmade"
    random.seed(0)
    assert all(re.fullmatch(r"[^ ]+-.+", module.generate_random_word()) for _ in range(100))


def test_niah_template_is_the_librarys() -> None:
    assert ruler_library.niah_template().count("{") == 5
    assert "{context}" in ruler_library.niah_template()


@pytest.mark.parametrize(
    ("task", "prediction", "references", "expected"),
    [
        ("niah_single_2", " 1234567.", ["1234567"], 100),
        ("niah_multivalue", "1, 2, 3", ["1", "2", "3", "9"], 75),
        ("vt", "abc DEF", ["ABC", "DEF", "GHI", "JKL", "MNO"], 40),
        ("cwe", "1. a1 2. b2", [f"{c}{i}" for c in "ab" for i in range(1, 6)], 20),
        ("fwe", "aaaaaa bbbbbb", ["aaaaaa", "bbbbbb", "cccccc"], 200 / 3),
        ("qa_1", "It is 412 long", ["412 miles", "412"], 100),
        ("qa_2", "none", ["yes", "no way"], 0),
        ("qa_1", "", ["412"], 0),
    ],
)
def test_official_scores(task: str, prediction: str, references: list[str], expected: float) -> None:
    score = Ruler().score({"task": task, "prediction": prediction, "references": references, "metadata": {}})
    assert score == {"score": pytest.approx(expected)}


def test_groups() -> None:
    assert len(TASKS) == 13
    assert Ruler(tasks=["all"]).tasks == list(TASKS)
    assert len(Ruler(tasks=["offline"]).tasks) == 11
    assert Ruler(tasks=["vt", "offline"]).tasks[:2] == ["vt", "niah_single_1"]
    assert Ruler(tasks="vt").tasks == ["vt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["niah"]}, "niah; choose from niah_single_1, .*qa_2, or a group: all, offline"),
        ({"tasks": []}, "no task"),
        ({"tasks": [3]}, "benchmark.tasks has 3"),
        ({"lengths": []}, "benchmark.lengths"),
        ({"lengths": 4096}, "benchmark.lengths"),
        ({"lengths": [-5]}, "benchmark.lengths"),
        ({"per_cell": 0}, "benchmark.per_cell"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ruler(**options)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    ruler_library.library.cache_clear()
    with pytest.raises(DataError, match=re.escape("pip install 'lm-eval[ruler]==0.4.13'")):
        draw("cwe")


@settings(max_examples=200, deadline=None)
@given(
    least=st.integers(1, 50),
    most=st.integers(50, 5000),
    fixed=st.integers(0, 500),
    unit=st.floats(0.6, 60),
    budget=st.integers(1, 20_000),
    noise=st.integers(0, 5),
)
def test_largest(least: int, most: int, fixed: int, unit: float, budget: int, noise: int) -> None:
    calls = []

    def size(n: int) -> int:
        calls.append(n)
        return int(fixed + unit * n) + (n * 7919 % 11) * noise // 11

    found = largest(size, least, most, budget)
    if found is None:
        assert size(least) > budget
        return
    assert least <= found <= most
    assert size(found) <= budget
    slack = 2 * unit + 2 * noise + 3
    assert found == most or budget - size(found) <= slack
    assert len(calls) < 60
