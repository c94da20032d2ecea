"""LongBench: prompts equal to the official ones, official truncation, and errors that say what to do."""

import hashlib
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks.averages import EXTENDED, GROUPS, PQCACHE_TABLE2, TASKS, averages
from pqbench.benchmarks.base import Prompter, Sample
from pqbench.benchmarks.longbench import LongBench, bucket, fill_prompt, template
from pqbench.errors import ConfigError, DataError

OFFICIAL = json.loads(Path(__file__).with_name("longbench_prompt_hashes.json").read_text(encoding="utf-8"))
QUESTION_SETS = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
] + ["qmsum", "passage_retrieval_en", "passage_retrieval_zh"]


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    """A prompter whose tokenizer has one token per byte, a chat template and a BOS token."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = "USER<{{ messages[0]['content'] }}>ASSISTANT:"
    return Prompter(wrapped, max_length=4000)


def row(**changes: Any) -> dict[str, Any]:
    values = {"_id": "0123456789abcdef", "input": "Who?", "context": "Some text. ", "answers": ["Ann", "Bob"]}
    return values | {"length": 2, "all_classes": None, "dataset": "any", "language": "en"} | changes


def write(folder: Path, task: str, *rows: dict[str, Any]) -> str:
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def text(prompter: Prompter, sample: Sample) -> str:
    return prompter.decode(sample.input_ids)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_length_are_official(task: str) -> None:
    prompt = fill_prompt(task, OFFICIAL["row"]["context"], OFFICIAL["row"]["input"]).text
    assert hashlib.sha256(prompt.encode()).hexdigest() == OFFICIAL["sha256"][task]
    assert template(task)["generation_kwargs"]["max_gen_toks"] == OFFICIAL["max_new_tokens"][task]


def test_the_suite_is_complete() -> None:
    assert sorted(TASKS) == sorted(OFFICIAL["sha256"])
    assert (len(TASKS), len(EXTENDED), len(PQCACHE_TABLE2)) == (21, 13, 14)
    assert LongBench()._selected == list(TASKS)
    assert LongBench(tasks=["code", "lcc", "qasper"])._selected == ["lcc", "repobench-p", "qasper"]
    assert LongBench(tasks="pqcache_table2")._selected == list(PQCACHE_TABLE2)
    assert sorted(LongBench(extended=True)._selected) == sorted(EXTENDED)
    assert LongBench(tasks=["single_doc"], extended=True)._selected == ["qasper", "multifieldqa_en"]


def test_the_configuration_builds_the_default_suite() -> None:
    path = Path(__file__).parents[2] / "conf" / "benchmark" / "longbench.yaml"
    assert asdict(instantiate(OmegaConf.load(path))) == asdict(LongBench(tasks=["all"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["hotpot"]}, ["no 'hotpot'", "hotpotqa", "single_doc", "pqcache_table2"]),
        ({"tasks": ["narrativeqa"], "extended": True}, ["LongBench-E has no 'narrativeqa'", "qasper"]),
        ({"tasks": []}, ["benchmark.tasks is empty"]),
        ({"limit": 0}, ["benchmark.limit=0"]),
        ({"max_length": -1}, ["benchmark.max_length=-1"]),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        LongBench(**options)
    assert all(word in str(caught.value) for word in words)


def test_a_sample_is_what_the_official_scripts_see(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "hotpotqa", row(), row(_id="second", input="Why?"))
    first, second = LongBench(tasks=["hotpotqa"], data_dir=folder).samples(prompter)
    assert text(prompter, first) == f"USER<{fill_prompt('hotpotqa', 'Some text. ', 'Who?').text}>ASSISTANT:"
    assert (first.id, second.id) == ("hotpotqa/0-01234567", "hotpotqa/1-second")
    assert (first.task, first.references, first.max_new_tokens) == ("hotpotqa", ["Ann", "Bob"], 32)
    assert (first.end_tokens, first.min_new_tokens) == ((), 0)
    assert first.metadata == {"row": "0123456789abcdef", "length": 2, "truncated": False}
    tail = prompter.decode(first.input_ids[-first.question_tokens :])
    assert tail == fill_prompt("hotpotqa", "", "Who?").tail + ">ASSISTANT:"


@pytest.mark.parametrize("task", TASKS)
def test_the_chat_template_is_left_out_where_official(tmp_path: Path, prompter: Prompter, task: str) -> None:
    folder = write(tmp_path, task, row(all_classes=["Ann", "Zoe"]))
    [sample] = LongBench(tasks=[task], data_dir=folder).samples(prompter)
    plain = task in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert text(prompter, sample).startswith("USER<") != plain
    newline = tuple(prompter.encode("\n")[-1:])
    assert (sample.end_tokens, sample.min_new_tokens) == ((newline, 1) if task == "samsum" else ((), 0))
    assert sample.metadata.get("all_classes") == (["Ann", "Zoe"] if task in ("trec", "lsht") else None)


@pytest.mark.parametrize("limit", [101, 500, 1200])
def test_a_long_prompt_is_cut_in_the_middle_before_the_template(tmp_path: Path, prompter: Prompter, limit: int) -> None:
    context = " ".join(map(str, range(900)))
    folder = write(tmp_path, "qasper", row(context=context))
    [sample] = LongBench(tasks=["qasper"], data_dir=folder, max_length=limit).samples(prompter)
    full, half = fill_prompt("qasper", context, "Who?").text, limit // 2
    assert text(prompter, sample) == f"USER<{full[:half]}{full[-half:]}>ASSISTANT:"
    assert sample.metadata["truncated"]
    assert sample.question_tokens == min(half, len(fill_prompt("qasper", "", "Who?").tail)) + len(">ASSISTANT:")


@pytest.mark.parametrize("pad", range(3))
def test_by_default_a_prompt_fills_the_model_and_leaves_room_to_answer(
    tmp_path: Path, prompter: Prompter, pad: int
) -> None:
    # Cut characters of three bytes come back as replacement characters, which take more tokens.
    folder = write(tmp_path, "qasper", row(context="x" * pad + "谁" * 3000, input="?" * pad))
    [sample] = LongBench(tasks=["qasper"], data_dir=folder).samples(prompter)
    assert prompter.max_length - 8 <= len(sample.input_ids) + sample.max_new_tokens <= prompter.max_length


def test_a_long_prompt_is_an_error_when_truncation_is_off(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "qasper", row(), row(context="x" * 5000))
    samples = LongBench(tasks=["qasper"], data_dir=folder, truncate=False).samples(prompter)
    assert not next(samples).metadata["truncated"]
    with pytest.raises(DataError, match=r"sample qasper/1-01234567 has 5713 prompt tokens, more than .*truncate=true"):
        next(samples)


def test_a_limit_the_model_has_no_room_for_is_an_error(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "gov_report", row(context="x" * 5000))
    with pytest.raises(ConfigError, match=r"4000 tokens leave 3\d+ for the prompt.*lower benchmark.max_length"):
        list(LongBench(tasks=["gov_report"], data_dir=folder, max_length=3800).samples(prompter))
    with pytest.raises(ConfigError, match="too few for a prompt: raise"):
        list(LongBench(tasks=["gov_report"], data_dir=folder, max_length=1).samples(prompter))
    with pytest.raises(ConfigError, match="take a model with a longer context"):
        list(LongBench(tasks=["gov_report"], data_dir=folder).samples(Prompter(prompter.tokenizer, 512)))


@pytest.mark.parametrize("task", TASKS)
def test_question_first_moves_the_question_where_there_is_one(task: str) -> None:
    official = fill_prompt(task, "CONTEXT", "QUESTION {{x}}")
    moved = fill_prompt(task, "CONTEXT", "QUESTION {{x}}", question_first=True)
    assert moved.question_first == (task in QUESTION_SETS)
    if not moved.question_first:
        assert moved == official
        return
    assert moved.text.index("QUESTION {{x}}") < moved.text.index("CONTEXT")
    assert moved.head.endswith(official.head)
    assert moved.tail.strip()
    assert official.tail.endswith(moved.tail)
    assert sorted(moved.text.split()) == sorted(official.text.split())


def test_question_first_is_told_in_the_metadata(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "hotpotqa", row())
    write(tmp_path, "trec", row(all_classes=["Ann"]))
    samples = LongBench(tasks=["hotpotqa", "trec"], data_dir=folder, question_first=True).samples(prompter)
    assert [sample.metadata["question_first"] for sample in samples] == [True, False]


def test_the_extended_sets_are_scored_by_bucket(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "qasper_e", *[row(length=n) for n in (0, 3999, 4000, 7999, 8000)])
    benchmark = LongBench(tasks=["qasper"], data_dir=folder, extended=True)
    samples = list(benchmark.samples(prompter))
    assert [sample.metadata["bucket"] for sample in samples] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]
    assert samples[0].task == "qasper_e"
    record = {**asdict(samples[2]), "prediction": "Ann Lee"}
    assert benchmark.score(record) == pytest.approx({"score": 200 / 3, "4-8k": 200 / 3})
    assert bucket(8000) == "8k+"


def test_records_are_scored_without_the_data(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "trec", row(answers=["Food"], all_classes=["Food", "City"]))
    [sample] = LongBench(tasks=["trec"], data_dir=folder).samples(prompter)
    record = json.loads(json.dumps({**asdict(sample), "prediction": "\nFood or City\nCity"}))
    assert LongBench().score(record) == {"score": 50.0}
    assert LongBench().score(record | {"prediction": ""}) == {"score": 0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": None}, "lacks prediction"),
        ({"task": "trec"}, "lacks metadata.all_classes"),
        ({"task": "passkey"}, "unknown task 'passkey'"),
        ({"prediction": 5}, "no text as prediction"),
        ({"references": "Ann"}, "no list as references"),
    ],
)
def test_a_broken_record_is_an_error(changes: dict[str, Any], words: str) -> None:
    record = {"task": "qasper", "prediction": "Ann", "references": ["Ann"], "metadata": {}}
    with pytest.raises(DataError, match=words):
        LongBench().score(record | changes)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("qasper", {"answers": "Ann"}, "line 2: field 'answers' must be a list of at least one string"),
        ("qasper", {"context": None}, "line 2: field 'context' must be a string"),
        ("trec", {"all_classes": None}, "line 2: field 'all_classes' must be a list of strings"),
    ],
)
def test_a_malformed_row_is_named(
    tmp_path: Path, prompter: Prompter, task: str, changes: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path, task, row(all_classes=["Ann"]), row(all_classes=["Ann"]) | changes)
    with pytest.raises(DataError, match=rf"{task}\.jsonl, {words}"):
        list(LongBench(tasks=[task], data_dir=folder).samples(prompter))
    assert len(list(LongBench(tasks=[task], data_dir=folder, limit=1).samples(prompter))) == 1


def test_a_missing_set_is_found_out_before_the_first_sample(tmp_path: Path, prompter: Prompter) -> None:
    folder = write(tmp_path, "hotpotqa", row())
    samples = LongBench(tasks=["hotpotqa", "musique"], data_dir=folder).samples(prompter)
    with pytest.raises(DataError, match=r"musique\.jsonl is missing.*download data\.zip from .*THUDM/LongBench"):
        next(samples)


def test_without_a_folder_the_official_archive_is_downloaded(
    tmp_path: Path, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "hotpotqa", row())
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(Path(folder) / "hotpotqa.jsonl", "data/hotpotqa.jsonl")

    def download(repository: str, filename: str, **options: Any) -> str:
        assert (repository, filename) == ("THUDM/LongBench", "data.zip")
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(list(LongBench(tasks=["hotpotqa"]).samples(prompter))) == 1


def test_averages_are_those_of_complete_groups() -> None:
    scores = {task: float(n) for n, task in enumerate(TASKS)}
    found = averages(scores | {"passkey": 1000.0})
    groups = [fmean(scores[task] for task in tasks) for tasks in GROUPS.values()]
    assert found["longbench"] == pytest.approx(fmean(groups))
    assert found["longbench"] != pytest.approx(fmean(scores.values()))
    assert found["pqcache_table2"] == pytest.approx(fmean(scores[task] for task in PQCACHE_TABLE2))
    assert averages(dict.fromkeys(GROUPS["code"], 1.0)) == {"code": 1.0}
    assert averages({}) == {}


def test_averages_of_the_extended_sets_are_kept_apart() -> None:
    found = averages({f"{task}_e": 2.0 for task in EXTENDED} | {"qasper": 0.0})
    assert found == {f"{group}_e": 2.0 for group in [*GROUPS, "longbench"]}
