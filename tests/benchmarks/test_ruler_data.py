from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks.base import Prompter, Sample
from pqbench.benchmarks.ruler import Ruler
from pqbench.benchmarks.ruler_tasks import TASKS
from pqbench.errors import ConfigError, DataError

SQUAD: dict[str, Any] = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Amber is a river. It is 412 miles long and ends in Lake Orn.",
                    "qas": [
                        {
                            "question": "How long is the Amber?",
                            "answers": [{"text": "412 miles"}, {"text": "412"}],
                            "is_impossible": False,
                        },
                        {"question": "Who owns the Amber?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "The Bell rises near Torvald. Ships go up to the town of Hask.",
                    "qas": [{"question": "Where does the Bell rise?", "answers": [{"text": "near Torvald"}]}],
                },
            ],
        },
        {
            "title": "Hills",
            "paragraphs": [
                {
                    "context": "Mount Cray is the highest hill of the island.",
                    "qas": [
                        {
                            "question": "Which hill is highest?",
                            "answers": [{"text": "Mount Cray"}],
                            "is_impossible": False,
                        }
                    ],
                }
            ],
        },
    ]
}
HOTPOT = [
    {
        "question": "In which land is the town of Ann Lee?",
        "answer": "Norland",
        "context": [["Ann Lee", ["Ann Lee lives in Hask.", " She sings."]], ["Hask", ["Hask is a town in Norland."]]],
    },
    {
        "question": "Who built the bridge of Torvald?",
        "answer": "Jon Ek",
        "context": [["Torvald", ["Torvald has a bridge by Jon Ek."]], ["Jon Ek", ["Jon Ek built bridges."]]],
    },
]


def prompter() -> Prompter:
    """A prompter whose tokenizer has one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return Prompter(PreTrainedTokenizerFast(tokenizer_object=letters), 20_000)


def text_of(sample: Sample) -> str:
    return prompter().decode(sample.input_ids)


def draw(task: str, **options: Any) -> list[Sample]:
    return list(Ruler(tasks=[task], **{"lengths": [3000], "per_cell": 3, **options}).samples(prompter()))


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT), encoding="utf-8")
    return str(tmp_path)


def test_questions_of_squad(data_dir: str) -> None:
    samples = draw("qa_1", data_dir=data_dir)
    assert [sample.references for sample in samples] == [["412 miles", "412"], ["near Torvald"], ["Mount Cray"]]
    paragraphs = [p["context"] for article in SQUAD["data"] for p in article["paragraphs"]]
    for sample, gold in zip(samples, paragraphs, strict=True):
        text = text_of(sample)
        documents = re.findall(r"Document \d+:\n(.+)", text)
        assert gold in documents
        assert set(documents) <= set(paragraphs)
        assert len(documents) == sample.metadata["units"] > 10, "few documents are repeated, as officially"
        assert text.endswith(" Answer:")
        assert "Who owns" not in text


def test_questions_of_hotpot(data_dir: str) -> None:
    samples = draw("qa_2", data_dir=data_dir, per_cell=2, lengths=[1500])
    assert [sample.references for sample in samples] == [["Norland"], ["Jon Ek"]]
    for sample, row in zip(samples, HOTPOT, strict=True):
        text = text_of(sample)
        assert all(f"{title}\n{''.join(parts)}" in text for title, parts in row["context"])
        assert f"Question: {row['question']}" in text


@pytest.mark.parametrize("task", list(TASKS))
def test_impossible_lengths(task: str, data_dir: str) -> None:
    with pytest.raises(ConfigError, match="has 40000, but the model takes 20000 tokens"):
        Ruler(tasks=[task], lengths=[40_000], data_dir=data_dir).samples(prompter())
    with pytest.raises(ConfigError, match=rf"has 60, too short for sample 0 of {task}: it takes \d+ tokens"):
        Ruler(tasks=[task], lengths=[60], data_dir=data_dir).samples(prompter())


def broken(data_dir: str, content: bytes) -> DataError:
    (Path(data_dir) / "dev-v2.0.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        draw("qa_1", data_dir=data_dir)
    assert "\n" not in str(error.value)
    assert "dev-v2.0.json" in str(error.value)
    return error.value


def test_damaged_data(data_dir: str) -> None:
    whole = json.dumps(SQUAD).encode()
    assert "line 1: not whole JSON" in str(broken(data_dir, whole[: len(whole) // 2]))
    assert "not whole JSON" in str(broken(data_dir, b""))
    assert "byte 4 is not UTF-8" in str(broken(data_dir, b'{"a\xff": 1}'))
    schemas: list[Any] = [[1], {"data": [{}]}, {"data": 3}, HOTPOT]
    for wrong in schemas:
        assert "SQuAD's schema" in str(broken(data_dir, json.dumps(wrong).encode()))
    number = json.loads(whole)
    number["data"][0]["paragraphs"][0]["qas"][0]["question"] = 7
    assert "SQuAD's schema" in str(broken(data_dir, json.dumps(number).encode()))
    assert "no question with an answer" in str(broken(data_dir, b'{"data": []}'))


def test_missing_data(tmp_path: Path) -> None:
    for task, name in (("qa_1", "dev-v2.0.json"), ("qa_2", "hotpot_dev_distractor_v1.json")):
        with pytest.raises(DataError, match=rf"{task} needs data: download .*{name} .*benchmark.data_dir"):
            draw(task)
        with pytest.raises(DataError, match=rf"must have {name}"):
            draw(task, data_dir=str(tmp_path))
        with pytest.raises(ConfigError, match="is no folder"):
            draw(task, data_dir=str(tmp_path / "absent"))
    for name in ("squad_a.json", "squad_b.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape("(has: squad_a.json, squad_b.json)")):
        draw("qa_1", data_dir=str(tmp_path))


def test_other_file_names_and_too_few_questions(tmp_path: Path) -> None:
    (tmp_path / "xquad.en.json").write_text(json.dumps(SQUAD), encoding="utf-8")
    assert len(draw("qa_1", data_dir=str(tmp_path))) == 3
    with pytest.raises(ConfigError, match="per_cell=4, but the data of qa_1 has 3 questions"):
        draw("qa_1", data_dir=str(tmp_path), per_cell=4)
