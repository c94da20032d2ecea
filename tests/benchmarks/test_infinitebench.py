from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks import infinitebench
from pqbench.benchmarks.base import Prompter, Sample
from pqbench.benchmarks.infinitebench import TASKS, InfiniteBench
from pqbench.benchmarks.infinitebench_generators import OFFICIAL, Place, generate
from pqbench.benchmarks.templates import fill, load_task
from pqbench.errors import ConfigError, DataError
from tests.benchmarks.bpe import byte_bpe

OPTIONS = ["red house", "blue boat", "green tree", "old road"]
REAL_ROW = {"id": 7, "context": "One day it rained. " * 50, "input": "Who came?", "answer": ["Ann"], "options": OPTIONS}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one token per digit, learnt from a few prompts."""
    return byte_bpe([generate(task, 20, Place(0, 4), "0").context for task in OFFICIAL], 600, digits=True)


def prompter(max_length: int = 100_000, *, chat: bool = True) -> Prompter:
    return Prompter(tokenizer(), max_length, chat=chat)


def text_of(sample: Sample) -> str:
    return str(tokenizer().decode(sample.input_ids))


def write(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row_for(task: str, **changes: Any) -> dict[str, Any]:
    if task in OFFICIAL:
        made = generate(task, 20, Place(1, 4), "0")
        row = {"id": 7, "context": made.context, "input": made.input, "answer": made.answer, "options": []}
    else:
        row = {**REAL_ROW, "answer": [OPTIONS[2]] if TASKS[task].options else ["Ann"]}
    return {**row, **changes}


def official(folder: Path, task: str, **options: Any) -> InfiniteBench:
    return InfiniteBench(tasks=[task], source="official", data_dir=str(folder), **options)


# ---- prompts


@pytest.mark.parametrize("task", [task for task in TASKS if task != "math_calc"])
def test_the_prompt_is_the_filled_template_of_lm_eval(task: str, tmp_path: Path) -> None:
    write(tmp_path, task, [row_for(task)])
    (sample,) = official(tmp_path, task, chat=False).samples(prompter())
    config = load_task(f"infinitebench/infinitebench_{TASKS[task].template}.yaml")
    assert text_of(sample) == fill(config, row_for(task))
    assert sample.max_new_tokens == config["generation_kwargs"]["max_gen_toks"]
    assert sample.metadata["prompt"] == "lm-eval"
    assert sample.end_tokens == ()


def test_math_calc_is_asked_in_our_own_wording_and_says_so() -> None:
    (sample,) = InfiniteBench(tasks=["math_calc"], limit=1).samples(prompter())
    assert sample.metadata["prompt"] == "own wording"
    assert sample.max_new_tokens < 1024
    assert InfiniteBench().score(record(sample, ", ".join(sample.references))) == {"score": 100}


def test_official_math_calc_generates_30000_tokens(tmp_path: Path) -> None:
    write(tmp_path, "math_calc", [row_for("math_calc", answer=[[5, 7, 12]])])
    (sample,) = official(tmp_path, "math_calc").samples(prompter())
    assert sample.max_new_tokens == 30000
    assert sample.references == ["5", "7", "12"]


@pytest.mark.parametrize("task", TASKS)
def test_question_tokens_are_what_follows_the_context(task: str, tmp_path: Path) -> None:
    write(tmp_path, task, [row_for(task)])
    (sample,) = official(tmp_path, task).samples(prompter())
    question = text_of(sample).rpartition(row_for(task)["context"])[2]
    assert question.endswith("<|assistant|>\n")
    # At both ends of the context a newline may form one token with its neighbour.
    assert abs(len(prompter().encode(question)) - sample.question_tokens) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_the_question_can_go_first_where_that_makes_sense(task: str, tmp_path: Path) -> None:
    row = row_for(task)
    write(tmp_path, task, [row])
    (sample,) = official(tmp_path, task, question_first=True).samples(prompter())
    (plain,) = official(tmp_path, task).samples(prompter())
    moved = TASKS[task].question_first
    assert sample.metadata["question_first"] == moved
    if moved:
        assert text_of(sample).endswith(row["context"] + "<|end|>\n<|assistant|>\n")
        assert text_of(plain).rpartition(row["context"])[2].partition("<|end|>")[0].strip() in text_of(sample)
        assert sample.question_tokens == len(prompter().encode(prompter().frame().after))
    else:
        assert sample.input_ids == plain.input_ids


@pytest.mark.parametrize("chat", [True, False])
def test_lead_in_begins_the_answer_and_counts_in_the_length(chat: bool) -> None:
    for task in OFFICIAL:
        for sample in InfiniteBench(tasks=[task], lead_in=True, chat=chat).samples(prompter()):
            assert 900 < len(sample.input_ids) <= 1024
            last = text_of(sample).rpartition("\n")[2]
            key = text_of(sample).rpartition('Key: "')[2].partition('"')[0]
            assert last == TASKS[task].lead_in.replace("{key}", key)


def test_answer_length_of_infllm() -> None:
    samples = InfiniteBench(answer_length="infllm", limit=1).samples(prompter())
    assert [sample.max_new_tokens for sample in samples] == [32, 32, 100]


# ---- generated


@pytest.mark.parametrize("task", OFFICIAL)
@pytest.mark.parametrize("options", [{}, {"chat": False}, {"lead_in": True}, {"question_first": True}])
def test_generated_lengths_are_met_within_a_unit(task: str, options: dict[str, Any]) -> None:
    bench = InfiniteBench(tasks=task, length=[1200, 2400], per_length=6, **options)
    samples = list(bench.samples(prompter()))
    assert Counter(sample.metadata["length"] for sample in samples) == {1200: 6, 2400: 6}
    unit = {"math_find": 5, "math_calc": 5, "code_run": 400, "kv_retrieval": 100}.get(task, 60)
    for sample in samples:
        assert 0 <= sample.metadata["length"] - len(sample.input_ids) < unit
        assert len(sample.input_ids) == sample.metadata["full_tokens"]
        assert not sample.metadata["truncated"]
    for short, long in zip(samples[:6], samples[6:], strict=True):
        assert short.metadata["units"] < long.metadata["units"]


def test_generated_samples_are_reproducible_different_and_json() -> None:
    bench = InfiniteBench(tasks=["synthetic"], per_length=3)
    samples = list(bench.samples(prompter()))
    assert samples == list(bench.samples(prompter()))
    assert [sample.task for sample in samples[::3]] == list(OFFICIAL)
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({tuple(sample.input_ids) for sample in samples}) == len(samples)
    assert all(json.loads(json.dumps(sample.metadata)) == sample.metadata for sample in samples)
    assert {sample.metadata["source"] for sample in samples} == {"generated"}
    other = InfiniteBench(tasks=["synthetic"], per_length=3, seed=1).samples(prompter())
    assert all(one.input_ids != two.input_ids for one, two in zip(samples, other, strict=True))


def test_depths_sweep_the_context_and_a_limit_keeps_the_sweep() -> None:
    bench = InfiniteBench(tasks=["passkey"], per_length=9, length=2000)
    samples = list(bench.samples(prompter()))
    assert [round(sample.metadata["depth"], 1) for sample in samples] == [0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.9, 1]
    limited = InfiniteBench(tasks=["passkey"], per_length=9, length=2000, limit=3).samples(prompter())
    assert list(limited) == samples[::3]


# ---- official files


def record(sample: Sample, prediction: str) -> dict[str, Any]:
    return {"task": sample.task, "prediction": prediction, "references": sample.references, "metadata": sample.metadata}


@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_of_official_rows_score_100_and_empty_ones_0(task: str, tmp_path: Path) -> None:
    write(tmp_path, task, [row_for(task)] * 3)
    bench = official(tmp_path, task)
    samples = list(bench.samples(prompter()))
    assert [sample.id for sample in samples] == [f"{task}-{i}" for i in range(3)]
    assert samples[0].metadata["source"] == "official"
    assert samples[0].metadata["row"] == 7
    gold = {"code_debug": "C.", "longbook_choice_eng": "C", "math_calc": ", ".join(samples[0].references)}
    if task == "longdialogue_qa_eng":
        samples[0].references[0] = "ANN"
    assert bench.score(record(samples[0], gold.get(task, samples[0].references[0]))) == {"score": 100}
    assert bench.score(record(samples[0], "")) == {"score": 0}
    assert 0 <= bench.score(record(samples[0], "7 " * 50_000))["score"] <= 100


@pytest.mark.parametrize(
    ("task", "answer", "references"),
    [
        ("passkey", "71432", ["71432"]),
        ("passkey", ["71432"], ["71432"]),
        ("passkey", 71432, ["71432"]),
        ("math_find", 49.5, ["49.5"]),
        ("math_find", [88], ["88"]),
        ("code_run", -4, ["-4"]),
        ("math_calc", [1, 3, 5], ["1", "3", "5"]),
        ("longbook_qa_eng", ["Ann", "Anna"], ["Ann", "Anna"]),
        ("code_debug", "blue boat", ["blue boat", "B"]),
        ("code_debug", ["blue boat"], ["blue boat", "B"]),
        ("longbook_choice_eng", ["blue boat", "B"], ["blue boat", "B"]),
    ],
)
def test_answers_of_mixed_types_are_accepted(task: str, answer: Any, references: list[str], tmp_path: Path) -> None:
    write(tmp_path, task, [row_for(task, answer=answer, options=OPTIONS)])
    (sample,) = official(tmp_path, task).samples(prompter())
    assert sample.references == references


@pytest.mark.parametrize("answer", [{"text": "Ann"}, [{"text": "Ann"}], None, [], True, [[]]])
def test_answers_of_other_types_are_refused(answer: Any, tmp_path: Path) -> None:
    write(tmp_path, "longbook_qa_eng", [row_for("longbook_qa_eng"), row_for("longbook_qa_eng", answer=answer)])
    with pytest.raises(DataError, match=r"longbook_qa_eng.jsonl, line 2: field 'answer' must be a string, a number or"):
        list(official(tmp_path, "longbook_qa_eng").samples(prompter()))


def test_an_answer_that_is_no_option_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "code_debug", [row_for("code_debug", answer="pink")])
    with pytest.raises(DataError, match=r"code_debug.jsonl, row 1: answer \['pink'\] is none of the options"):
        list(official(tmp_path, "code_debug").samples(prompter()))


def test_official_depth_is_where_the_answer_stands(tmp_path: Path) -> None:
    write(tmp_path, "passkey", [row_for("passkey", context="x" * 30 + "71432" + "x" * 65, answer="71432")])
    (sample,) = official(tmp_path, "passkey").samples(prompter())
    assert sample.metadata["depth"] == 0.3


def test_a_limit_spreads_over_the_official_rows(tmp_path: Path) -> None:
    write(tmp_path, "passkey", [row_for("passkey", id=i) for i in range(10)])
    samples = official(tmp_path, "passkey", limit=4).samples(prompter())
    assert [sample.metadata["row"] for sample in samples] == [0, 2, 5, 7]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("limit", [400, 401, 555])
def test_long_prompts_are_cut_in_the_middle(chat: bool, limit: int, tmp_path: Path) -> None:
    row = row_for("longbook_qa_eng", context="\n".join(f"line {i} of the 书" for i in range(400)))
    write(tmp_path, "longbook_qa_eng", [row])
    bench = official(tmp_path, "longbook_qa_eng", chat=chat, max_length=limit)
    (sample,) = bench.samples(prompter())
    (whole,) = official(tmp_path, "longbook_qa_eng", chat=chat).samples(prompter())
    room = limit - 40 - len(prompter().framed(prompter().frame(chat=chat), ""))
    assert limit - 20 <= len(sample.input_ids) + 40 <= limit
    assert sample.metadata["truncated"]
    assert sample.metadata["full_tokens"] == len(whole.input_ids)
    half = room // 2 - 8  # a character cut in two takes some tokens
    assert sample.input_ids[:half] == whole.input_ids[:half]
    assert sample.input_ids[-half:] == whole.input_ids[-half:]
    assert "Who came?" in text_of(sample)


def test_the_models_own_limit_holds_when_it_is_the_shorter_one(tmp_path: Path) -> None:
    write(tmp_path, "longbook_qa_eng", [row_for("longbook_qa_eng", context="word " * 2000)])
    (sample,) = official(tmp_path, "longbook_qa_eng", max_length=10**6).samples(prompter(300))
    assert len(sample.input_ids) <= 260


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": False}, r"has \d+ prompt tokens .* may take 300 together: set benchmark.truncate=true"),
        ({"max_length": 90}, "may take 90 together: leave the task out, or use a longer benchmark.max_length"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "longbook_qa_eng", [row_for("longbook_qa_eng", context="word " * 2000)])
    with pytest.raises(DataError, match=message):
        list(official(tmp_path, "longbook_qa_eng", **options).samples(prompter(300)))


def test_a_generated_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(DataError, match=r"passkey-1024-0of4 .* may take 1000 together: lower benchmark.length"):
        list(InfiniteBench().samples(prompter(1000)))


@pytest.mark.parametrize("task", OFFICIAL)
def test_a_length_too_short_for_one_unit_is_refused(task: str) -> None:
    with pytest.raises(ConfigError, match=rf"{task}: benchmark.length=20 is too short: the shortest prompt has \d+"):
        list(InfiniteBench(tasks=[task], length=20).samples(prompter()))


def test_missing_data_says_what_to_download_and_which_option_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"download passkey.jsonl from https://hugg.*InfiniteBench .*benchmark.data_dir"
    ):
        list(official(tmp_path, "passkey").samples(prompter()))
    with pytest.raises(ConfigError, match=r"does not exist: download passkey.jsonl .*benchmark.source=generated"):
        list(official(tmp_path / "none", "passkey").samples(prompter()))


def test_an_unreachable_hub_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(
        DataError, match=r"from the hub \(.+\): download code_debug.jsonl .* and set benchmark.data_dir=FOLDER$"
    ):
        list(InfiniteBench(tasks=["code_debug"], source="official").samples(prompter()))


def test_the_hub_is_asked_for_a_pinned_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, asked = write(tmp_path, "passkey", [row_for("passkey")]), []

    def download(repository: str, filename: str, *, remedy: str, revision: str) -> Path:
        asked.append((repository, filename, len(revision)))
        return path

    monkeypatch.setattr(infinitebench, "hub_file", download)
    assert len(list(InfiniteBench(tasks=["passkey"], source="official").samples(prompter()))) == 1
    assert asked == [("xinrongzhang2022/InfiniteBench", "passkey.jsonl", 40)]


def cut_last_line(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")


def drop_context(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    del rows[1]["context"]
    write(path.parent, path.stem, rows)


def three_options(path: Path) -> None:
    write(path.parent, path.stem, [row_for(path.stem), row_for(path.stem, options=OPTIONS[:3])])


def spoil_encoding(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"Who came?", b"Who \xff?"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_last_line, "line 2: not a whole JSON object"),
        (drop_context, "line 2: field 'context' is missing"),
        (three_options, "line 2: field 'options' must be a list of four strings"),
        (spoil_encoding, "line 1: byte .* is not UTF-8"),
    ],
)
def test_damaged_files_are_refused_with_the_line(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(write(tmp_path, "code_debug", [row_for("code_debug"), row_for("code_debug")]))
    with pytest.raises(DataError, match=rf"code_debug\.jsonl, {message}"):
        list(official(tmp_path, "code_debug").samples(prompter()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["passkey", "niah"]}, r"names niah; tasks: passkey, .*math_calc; groups: all, synthetic"),
        ({"tasks": []}, r"names nothing; tasks: passkey"),
        ({"tasks": "all"}, r"longbook_sum_eng, .* cannot be generated: set benchmark.source=official or"),
        ({"source": "hub"}, r"benchmark.source=hub is unknown: choose generated or official"),
        ({"answer_length": "long"}, r"benchmark.answer_length=long is unknown"),
        ({"length": 0}, r"benchmark.length=0 must be a whole number"),
        ({"length": [512, "1k"]}, r"benchmark.length=1k must be"),
        ({"length": []}, r"benchmark.length is empty"),
        ({"per_length": 0}, r"benchmark.per_length=0 must be"),
        ({"limit": -1}, r"benchmark.limit=-1 must be"),
        ({"data_dir": "folder"}, r"benchmark.data_dir is read with benchmark.source=official only"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InfiniteBench(**options)


def test_group_all_is_the_twelve_tasks_once_each(tmp_path: Path) -> None:
    for task in TASKS:
        write(tmp_path, task, [row_for(task)])
    bench = InfiniteBench(tasks=["all", "passkey"], source="official", data_dir=str(tmp_path))
    assert [sample.task for sample in bench.samples(prompter())] == list(TASKS)
