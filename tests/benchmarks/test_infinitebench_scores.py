"""Expected values were worked out by hand from the official rules; every row was also run through the official scorer.

The official scorer is ``src/compute_scores.py`` of OpenBMB/InfiniteBench (commit 88b3daa), run outside this repository
with HF evaluate's rouge metric on rouge-score 0.1.2. It raises an exception on rows marked "official: raises".
"""

# ruff: noqa: RUF001 (full-width marks are what the Chinese rule is about)

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqbench.benchmarks.infinitebench_scores import SCORERS, score
from pqbench.errors import DataError

Case = tuple[str, list[str], float]

FIRST_INTEGER: list[Case] = [
    ("71432", ["71432"], 100),
    (" 71432. Remember it. 71432", ["71432"], 100),
    ("The pass key is 71432.", ["71432"], 100),
    ("The pass key is 7143", ["71432"], 0),
    ("714321", ["71432"], 0),
    ("12 and then 71432", ["71432"], 0),
    ("71432 and then 12", ["71432"], 100),
    ("7 1 4 3 2", ["71432"], 0),
    ("71,432", ["71432"], 0),
    ("00123", ["00123"], 100),
    ("123", ["00123"], 0),
    ("-71432", ["71432"], 100),
    ("key71432key", ["71432"], 100),
    ("71432.0", ["71432"], 100),
    ("1. 71432", ["71432"], 0),
    ("\n\n71432\n", ["71432"], 100),
    ("", ["71432"], 0),
    ("no digits here", ["71432"], 0),
    ("٧١٤٣٢ 71432", ["71432"], 100),  # only ASCII digits count
    ("The sequence of digits is 0006677723.", ["0006677723"], 100),
    ("6677723", ["0006677723"], 0),
    ("71432", ["71432", "99999"], 100),
]

UUID = "c14cb8ba-002b-43be-bdc7-8a83f0fe1ac8"
KV: list[Case] = [
    (UUID, [UUID], 100),
    (f'"{UUID}"', [UUID], 100),
    (f'The value is: "{UUID}".', [UUID], 100),
    (f"value:{UUID},", [UUID], 100),
    (f"{{{UUID}}}", [UUID], 100),
    (f"x\n{UUID}\ny", [UUID], 100),
    (f"{UUID}?!", [UUID], 100),
    (f"'{UUID}'", [UUID], 100),
    (f"other {UUID}", [UUID], 100),
    (f"{UUID}x", [UUID], 0),
    (f"x{UUID}", [UUID], 0),
    (UUID[:-1], [UUID], 0),
    (UUID.upper(), [UUID], 0),
    (UUID.replace("-", " "), [UUID], 0),
    (f"({UUID})", [UUID], 0),  # brackets are not in the official list
    (f"`{UUID}`", [UUID], 0),
    (f"{UUID};", [UUID], 0),
    (f"\t{UUID}\t", [UUID], 100),
    ("", [UUID], 0),
    ("84fe443f-dcff-48dd-8b2e-ae4daff8b278", [UUID], 0),
    (UUID, [UUID, "x"], 100),
    ("x", [UUID, "x"], 0),
]

MATH_FIND: list[Case] = [
    ("88", ["88"], 100),
    (" 88\n", ["88"], 100),
    ("The number is 88.", ["88"], 100),
    ("88. [gMASK]", ["88"], 100),
    ("8", ["88"], 0),
    ("888", ["88"], 0),
    ("87 88", ["88"], 0),
    ("-88", ["88"], 100),
    ("088", ["88"], 100),
    ("88,5", ["88"], 100),
    ("eighty-eight", ["88"], 0),
    ("", ["88"], 0),
    ("88.0", ["88"], 100),  # official: raises
    ("88.5", ["88"], 0),  # official: raises
    ("49.5", ["49.5"], 100),
    ("49.50", ["49.5"], 100),
    ("49", ["49.5"], 0),
    ("49", ["49.0"], 100),
    ("49.0", ["49.0"], 100),
    ("The median is 49.5", ["49.5"], 100),
    (".5", ["5.0"], 100),
    ("1e2", ["1.0"], 100),
    ("0", ["0"], 100),
]

MATH_CALC: list[Case] = [
    ("1, 3, 5, 4", ["1", "3", "5", "4"], 100),
    ("[1, 3, 5, 4]", ["1", "3", "5", "4"], 100),
    ("1 3 5 4", ["1", "3", "5", "4"], 100),
    ("1, 3, 5", ["1", "3", "5", "4"], 75),
    ("1, 3", ["1", "3", "5", "4"], 50),
    ("1", ["1", "3", "5", "4"], 25),
    ("", ["1", "3", "5", "4"], 0),
    ("3, 5, 4", ["1", "3", "5", "4"], 0),
    ("0, 1, 3, 5, 4", ["1", "3", "5", "4"], 0),  # the first number is dropped for GPT-4 only
    ("1, 3, 9, 4", ["1", "3", "5", "4"], 50),
    ("1, 3, 5, 4, 7, 8", ["1", "3", "5", "4"], 100),
    ("01, 003, 5, 4", ["1", "3", "5", "4"], 100),
    ("1, -3, 5, 4", ["1", "3", "5", "4"], 100),
    ("1.3.5.4", ["1", "3", "5", "4"], 100),
    ("Step 1: 3", ["1", "3"], 100),
    ("0", ["0"], 100),
    ("000", ["0"], 100),
    ("no numbers", ["1"], 0),
    ("1, 3", ["1", "3", "5"], 100 * 2 / 3),
    ("13, 5", ["1", "3", "5"], 0),
    ("7\n8\n9", ["7", "8", "1"], 100 * 2 / 3),
]

CODE_RUN: list[Case] = [
    ("4", ["4"], 100),
    ("The return value is 4", ["4"], 100),
    ("The return value is: 4.", ["4"], 100),
    ("4\n", ["4"], 100),
    ("`4`", ["4"], 100),
    ("'4'", ["4"], 100),
    ('"4"', ["4"], 100),
    ("func_1(2):4", ["4"], 100),
    ("-4", ["-4"], 100),
    ("-4", ["4"], 0),
    ("- 4", ["-4"], 0),
    ("+4", ["4"], 100),
    ("4.0", ["4"], 0),  # the point splits words
    ("4.0", ["0"], 100),
    ("4 is the value", ["4"], 0),
    ("4, 5", ["5"], 100),
    ("5,4", ["4"], 0),
    ("=4", ["4"], 0),
    ("1_0", ["10"], 100),
    ("four", ["4"], 0),
    ("", ["4"], 0),
    (" . : ", ["4"], 0),
]

DEBUG = ["cmd_gen", "C"]
CODE_DEBUG: list[Case] = [
    ("C.", DEBUG, 100),
    ("C:", DEBUG, 100),
    ("C. cmd_gen", DEBUG, 100),
    ("  C. cmd_gen", DEBUG, 100),
    ("C", DEBUG, 0),  # a bare letter
    ("C cmd_gen", DEBUG, 0),
    ("cmd_gen", DEBUG, 0),
    ("A. cmd_gen", DEBUG, 0),
    ("The answer is: C", DEBUG, 100),
    ("The answer is:C", DEBUG, 0),  # one character is skipped
    ("The answer is: cmd_gen", DEBUG, 100),
    ("The answer is: `cmd_gen`", DEBUG, 100),  # the quote becomes a space, and two spaces one
    ("The answer is: **C**", DEBUG, 100),
    ("The error is: C", DEBUG, 100),
    ("Answer: C", DEBUG, 0),  # case matters
    ("answer: C", DEBUG, 100),
    ("answer: Option C", DEBUG, 100),
    ("The correct option is: C", DEBUG, 100),
    ("The answer is: A. The other answer is: C", DEBUG, 0),
    ("answer: C, though the error is: A", DEBUG, 0),  # "is:" is looked for before "answer:"
    ("The answer is:", DEBUG, 0),
    ("The answer is C", DEBUG, 0),
    ("The answer is: Cmd", DEBUG, 100),  # starts with the letter
    ("", DEBUG, 0),
]

CHOICE = ["Walking Georgie", "B"]
LONGBOOK_CHOICE: list[Case] = [
    ("B", CHOICE, 100),
    ("B. Walking Georgie", CHOICE, 100),
    ("  B", CHOICE, 100),
    ("Because of this, A", CHOICE, 100),
    ("A", CHOICE, 0),
    ("All of them, but B", CHOICE, 0),
    ("Walking Georgie", CHOICE, 100),
    ("walking Georgie", CHOICE, 0),
    ("The answer is: B", CHOICE, 100),
    ("The answer is B", CHOICE, 100),
    ("The answer is: A", CHOICE, 0),
    ("The answer is: Walking Georgie", CHOICE, 100),
    ("The answer is:B", CHOICE, 0),  # one character is skipped
    ("The answer is:", CHOICE, 0),
    ("The option is B", CHOICE, 100),
    ("my answer: B", CHOICE, 100),
    ('The answer is "B"', CHOICE, 100),
    ("The answer is A but option is B", CHOICE, 0),
    ("I think B is right", CHOICE, 100),
    ("I think A or B", CHOICE, 0),
    ("It says AB, so B", CHOICE, 0),  # "AB" is a substring of "ABCD"
    ("(B)", CHOICE, 0),
    ("b", CHOICE, 0),
    ("", CHOICE, 0),
    ("Alice", ["Alice", "C"], 0),  # even the right text, when it starts with another letter
]

DIALOGUE = ["ACE", "ACE ROTHSTEIN"]
LONGDIALOGUE: list[Case] = [
    ("ACE", DIALOGUE, 100),
    ("Ace", DIALOGUE, 100),
    ("ace", DIALOGUE, 100),
    ("Ace Rothstein", DIALOGUE, 100),
    ("Rothstein", DIALOGUE, 0),
    ("It is Ace.", DIALOGUE, 100),
    ('"Ace"', DIALOGUE, 100),
    ("Ace's wife", DIALOGUE, 100),
    ("Ace: yes", DIALOGUE, 100),
    ("Face", DIALOGUE, 0),
    ("Aces", DIALOGUE, 0),
    ("{ACE}", DIALOGUE, 100),
    ("(ACE)", DIALOGUE, 0),
    ("Nicky\nAce", DIALOGUE, 100),
    ("Ace-Rothstein", DIALOGUE, 0),
    ("NICKY SANTORO", DIALOGUE, 0),
    ("Ace Rothstein", ["ACE ROTHSTEIN"], 0),  # two words are never one word
    ("Remo", ["Remo"], 0),  # words are upper-cased, labels are not
    ("Gaggi", ["GAGGI", "Remo"], 100),
    ("Remo", ["GAGGI", "REMO"], 0),
    ("", DIALOGUE, 0),
]

QA_ENGLISH: list[Case] = [
    ("Paris", ["Paris"], 100),
    ("paris", ["Paris"], 100),
    ("The Paris.", ["paris"], 100),
    ("  Paris \n", ["Paris"], 100),
    ("London", ["Paris"], 0),
    ("", ["Paris"], 0),
    ("the", ["the"], 0),
    ("in Paris", ["Paris"], 100 * 2 / 3),
    ("Paris", ["in Paris"], 100 * 2 / 3),
    ("in Paris", ["to Paris"], 50),
    ("Paris Paris", ["Paris"], 100 * 2 / 3),
    ("old Paris town", ["Paris"], 50),
    ("a cat and a dog", ["cat dog"], 80),
    ("dog cat", ["cat dog"], 100),
    ("London", ["Paris", "London"], 100),
    ("big London", ["London", "big"], 100 * 2 / 3),
    ("a-b", ["ab"], 100),  # punctuation goes before articles
    ("a-b", ["b"], 0),
    ("U.S.A.", ["USA"], 100),
    ("an apple", ["The apple!"], 100),
    ("it's", ["its"], 100),
    ("“Paris”", ["Paris"], 0),  # only ASCII punctuation
]

QA_CHINESE: list[Case] = [
    ("北京", ["北京"], 100),
    ("北京。", ["北京"], 100),
    ("“北京”", ["北京"], 100),
    ("北 京\n", ["北京"], 100),
    ("上海", ["北京"], 0),
    ("", ["北京"], 0),
    ("北", ["北京"], 100 * 2 / 3),
    ("北京市", ["北京"], 80),
    ("东京", ["北京"], 50),
    ("京北", ["北京"], 100),
    ("北北", ["北京"], 50),
    ("上海", ["北京", "上海"], 100),
    ("海", ["北京", "上海"], 100 * 2 / 3),
    ("ABC", ["abc"], 100),
    ("（北京）", ["北京"], 100),
    ("【北京】、《上海》", ["北京上海"], 100 * 8 / 9),  # the opening double angle bracket stays
    ("北京，上海；", ["北京上海"], 100),
    ("a.b!c?", ["abc"], 100),
    ("。！", ["北京"], 0),
    ("北京…", ["北京"], 100),
    ("北京．", ["北京"], 80),  # the full-width stop stays
    ("３号", ["3号"], 50),
]

SUM: list[Case] = [
    ("the cat sat", ["the cat sat"], 100),
    ("The CAT sat!", ["the cat sat"], 100),
    ("the cat", ["the cat sat"], 80),
    ("the cat sat", ["the cat"], 80),
    ("the dog sat", ["the cat sat"], 100 * 2 / 3),
    ("sat cat the", ["the cat sat"], 100 / 3),
    ("dog", ["the cat sat"], 0),
    ("", ["the cat sat"], 0),
    ("...", ["the cat sat"], 0),
    ("cats", ["cat"], 0),  # no stemming
    ("running", ["run"], 0),
    ("a b\nc d", ["a b\nc d"], 100),
    ("c d\na b", ["a b\nc d"], 100),  # lines are matched separately
    ("c d a b", ["a b c d"], 50),  # one line is not
    ("a b c d", ["a b\nc d"], 100),
    ("c d a b", ["a b\nc d"], 100),
    ("a b\nc d", ["a b c d"], 100),
    ("a\nb", ["a b"], 100),
    ("a a a", ["a"], 50),
    ("cat dog", ["bird", "cat dog"], 100),
    ("a b c d", ["a c"], 100 * 2 / 3),
    ("e-mail", ["e mail"], 100),
    ("book 7", ["book 8"], 50),
]

TABLES: dict[str, list[Case]] = {
    "passkey": FIRST_INTEGER,
    "number_string": FIRST_INTEGER,
    "kv_retrieval": KV,
    "math_find": MATH_FIND,
    "math_calc": MATH_CALC,
    "code_run": CODE_RUN,
    "code_debug": CODE_DEBUG,
    "longbook_choice_eng": LONGBOOK_CHOICE,
    "longdialogue_qa_eng": LONGDIALOGUE,
    "longbook_qa_eng": QA_ENGLISH,
    "longbook_qa_chn": QA_CHINESE,
    "longbook_sum_eng": SUM,
}


@pytest.mark.parametrize("task", SCORERS)
def test_every_rule_gives_the_official_value_on_its_table(task: str) -> None:
    assert len(TABLES[task]) >= 20
    wrong = [
        (prediction, references, expected, found)
        for prediction, references, expected in TABLES[task]
        if (found := score(task, prediction, references)) != pytest.approx(expected, abs=1e-9)
    ]
    assert not wrong


WORD = st.text("bcdefgh", min_size=2, max_size=8)
GOLD = {
    "passkey": st.from_regex("[0-9]{5}", fullmatch=True).map(lambda key: (key, [key])),
    "number_string": st.from_regex("[0-9]{10}", fullmatch=True).map(lambda key: (key, [key])),
    "kv_retrieval": st.uuids().map(str).map(lambda value: (value, [value])),
    "math_find": st.integers(0, 198).map(lambda twice: (str(twice / 2), [str(twice / 2)])),
    "math_calc": st.lists(st.integers(0, 99).map(str), min_size=1).map(lambda values: (", ".join(values), values)),
    "code_run": st.integers(-200, 200).map(lambda value: (str(value), [str(value)])),
    "code_debug": st.tuples(WORD, st.sampled_from("ABCD")).map(lambda gold: (f"{gold[1]}. {gold[0]}", list(gold))),
    "longbook_choice_eng": st.tuples(WORD, st.sampled_from("ABCD")).map(lambda gold: (gold[1], list(gold))),
    "longdialogue_qa_eng": WORD.map(lambda name: (name.title(), [name.upper()])),
    "longbook_qa_eng": st.lists(WORD, min_size=1).map(" ".join).map(lambda text: (text, [text])),
    "longbook_qa_chn": st.text("北京上海书人", min_size=1).map(lambda text: (text, [text])),
    "longbook_sum_eng": st.lists(WORD, min_size=1, max_size=20).map("\n".join).map(lambda text: (text, [text])),
}


@pytest.mark.parametrize("task", SCORERS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_gold_answers_score_100_and_an_empty_prediction_0(task: str, data: st.DataObject) -> None:
    prediction, references = data.draw(GOLD[task])
    assert score(task, prediction, references) == pytest.approx(100)
    assert score(task, "", references) == 0
    assert score(task, f" \n{prediction}\n ", references) == pytest.approx(100)


@pytest.mark.parametrize("task", SCORERS)
@settings(deadline=None, max_examples=50)
@given(data=st.data(), prediction=st.text(max_size=60))
def test_any_prediction_scores_between_0_and_100(task: str, data: st.DataObject, prediction: str) -> None:
    _, references = data.draw(GOLD[task])
    assert 0 <= score(task, prediction, references) <= 100


@settings(deadline=None)
@given(st.lists(WORD, min_size=1, max_size=6), st.lists(WORD, min_size=1, max_size=6))
def test_f1_is_symmetric_and_ignores_case_space_and_articles(left: list[str], right: list[str]) -> None:
    one, two = " ".join(left), " ".join(right)
    expected = pytest.approx(score("longbook_qa_eng", one, [two]))
    assert score("longbook_qa_eng", two, [one]) == expected
    assert score("longbook_qa_eng", f"The {one.upper()}  .\n", [f"a {two}!"]) == expected


@pytest.mark.parametrize("task", SCORERS)
@pytest.mark.parametrize("unit", ["7", "word ", "answer is: ", "{\n", "书", "a\u0301\x00"])
def test_a_prediction_of_100k_characters_is_scored(task: str, unit: str) -> None:
    prediction = (unit * (100_000 // len(unit) + 1))[:100_000]
    references = {"code_debug": DEBUG, "longbook_choice_eng": CHOICE}.get(task, ["7"])
    assert 0 <= score(task, prediction, references) <= 100


def test_an_unknown_task_is_refused_with_the_list() -> None:
    with pytest.raises(DataError, match=r"no task 'passkeys'; tasks: passkey, number_string"):
        score("passkeys", "1", ["1"])


@pytest.mark.parametrize(
    ("task", "references"),
    [
        ("math_find", ["many"]),
        ("math_calc", ["none"]),
        ("code_debug", ["only a name"]),
        ("code_run", ["four"]),
        ("passkey", []),
    ],
)
def test_references_that_do_not_fit_the_rule_are_refused(task: str, references: list[str]) -> None:
    with pytest.raises(DataError, match=task):
        score(task, "12", references)
