"""Our methods as an lm-eval model, compared with lm-eval's own ``hf`` model. Tasks, data and model are made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import lm_eval.__main__
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import pqbench.integrations.lm_eval
from pqbench.engine.prefilled import Prefilled
from pqbench.errors import ConfigError, DataError
from pqbench.integrations.lm_eval import PqbenchLM, composed, main
from pqbench.models.sources import Random

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [f"Line {i}: " + "the quick brown fox jumps over the lazy dog. " * (2 * i + 1) + "Answer:" for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its byte tokenizer, saved."""
    path = tmp_path_factory.mktemp("model")
    loaded = Random("tiny", context=1024, seed=3).load()
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generate_until and a multiple_choice task over a local jsonl file."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": prompt, "answer": "x", "choices": [" yes", " no, never", " \n"], "label": i % 3}
        for i, prompt in enumerate(PROMPTS)
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "dataset_kwargs": {"data_files": {"test": str(path / "data.jsonl")}, "cache_dir": str(path / "cache")},
    }
    generate = common | {
        "task": "local_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    choose = common | {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (generate, choose):
        (path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return path


@pytest.fixture(scope="module")
def hf(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=512)


def ours(folder: Path, method: str = "full", **settings: Any) -> PqbenchLM:
    return PqbenchLM(pretrained=str(folder), method=method, max_length=512, **settings)


def generated(lm: HFLM, prompts: list[str], **options: Any) -> list[str]:
    given = {"until": ["\n\n"], "max_gen_toks": 24} | options
    requests = [Instance("generate_until", {}, (prompt, given), i) for i, prompt in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


def scored(lm: HFLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def test_full_generates_what_hf_generates(folder: Path, hf: HFLM) -> None:
    prompts = [*PROMPTS, "much longer than the model's room " * 30]  # cut on the left, as hf does
    expected = generated(hf, prompts)
    assert len(set(expected)) > 3
    assert generated(ours(folder), prompts) == expected
    assert generated(ours(folder, chunk=100), prompts) == expected
    assert generated(ours(folder, batch_size=3), prompts) == expected


def test_stop_strings_end_the_answer(folder: Path, hf: HFLM) -> None:
    (whole,) = generated(hf, PROMPTS[:1], max_gen_toks=60)
    stop = whole[20:22]
    for until in ([stop], ["absent", stop], stop):
        (expected,) = generated(hf, PROMPTS[:1], until=until, max_gen_toks=60)
        assert expected == whole[: whole.index(stop)]
        assert generated(ours(folder), PROMPTS[:1], until=until, max_gen_toks=60) == [expected]


def test_generation_ends_at_the_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = ours(folder)
    produced: list[torch.Tensor] = []
    original = lm._model_generate

    def keep(*arguments: Any, **options: Any) -> torch.Tensor:
        produced.append(original(*arguments, **options))
        return produced[-1]

    monkeypatch.setattr(lm, "_model_generate", keep)
    (whole,) = generated(lm, PROMPTS[:1], max_gen_toks=60)
    generated(lm, PROMPTS[:1], until=[whole[5:7]], max_gen_toks=60)
    prompt = len(PROMPTS[0])
    assert produced[0].shape[1] == prompt + 60
    assert produced[1].shape[1] < prompt + 20


@pytest.mark.parametrize("method", ["pqcache", "h2o", "streaming_llm"])
def test_methods_generate_their_own_answer(folder: Path, hf: HFLM, method: str) -> None:
    exact = ours(folder, method, **{"budget.ratio": 1.0})
    narrow = ours(folder, method, **{"budget.ratio": 0.1, "budget.minimum": 40})
    assert generated(exact, PROMPTS) == generated(hf, PROMPTS)
    assert generated(narrow, PROMPTS) != generated(hf, PROMPTS)


PAIRS = [
    *((prompt, choice) for prompt in PROMPTS[:2] for choice in (" yes", " no, never", "x")),
    ("", "no context"),
    ("ends in a space ", "word"),
    ("far too long for the model " * 40, " end"),
    ("short", " a long continuation " * 10),
]


def test_full_scores_what_hf_scores(folder: Path, hf: HFLM) -> None:
    expected = scored(hf, PAIRS)
    lm = ours(folder)
    for mine, theirs in zip(scored(lm, PAIRS), expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3)
        assert mine[1] is theirs[1]
    (answer,) = generated(hf, [PROMPTS[1]], max_gen_toks=6)
    tokens = torch.tensor([hf.tok_encode(PROMPTS[1])])
    greedy = hf.model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :].tolist()
    request = ((PROMPTS[1], answer), tokens[0].tolist(), greedy)
    assert lm._loglikelihood_tokens([request], disable_tqdm=True)[0][1] is True


@pytest.mark.parametrize(
    ("continuation", "words"),
    [([], "has no tokens of its own"), ([5] * 513, "has 513 tokens, but the model takes 512")],
)
def test_what_hf_does_not_score_is_refused_before_anything_runs(
    folder: Path, hf: HFLM, continuation: list[int], words: str
) -> None:
    """lm-eval's own model fails with an assertion. A continuation that disappears when its tokenizer merges it with the
    context would otherwise have probability 1."""
    good, bad = (("a", "b"), [1], [2]), (("a", "b"), [3], continuation)
    with pytest.raises(AssertionError):
        hf._loglikelihood_tokens([good, bad], disable_tqdm=True)
    with pytest.raises(DataError, match=words):
        ours(folder)._loglikelihood_tokens([good, bad], disable_tqdm=True)


def test_rolling_likelihoods_equal_those_of_hf(folder: Path, hf: HFLM) -> None:
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate((PROMPTS[0], PROMPTS[4][:90]))
    ]
    mine = ours(folder).loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(hf.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)


def test_one_prefill_serves_all_choices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, original = [], pqbench.integrations.lm_eval.prefill

    def counting(*arguments: Any, **options: Any) -> Prefilled:
        count.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(pqbench.integrations.lm_eval, "prefill", counting)
    lm = ours(folder, "pqcache")
    together = scored(lm, PAIRS[:6])
    assert len(count) == 2
    assert together == [scored(lm, [pair])[0] for pair in PAIRS[:6]]


def test_simple_evaluate_runs_both_kinds_of_task(folder: Path, tasks: Path, hf: HFLM) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names: list[Any] = ["local_generate", "local_choice"]
    expected = simple_evaluate(hf, tasks=names, task_manager=manager, bootstrap_iters=0)
    results = {}
    for method in ("full", "pqcache"):
        arguments = {"pretrained": str(folder), "max_length": 512, "method": method, "budget.ratio": 0.2}
        results[method] = simple_evaluate("pqbench", arguments, tasks=names, task_manager=manager, bootstrap_iters=0)
    samples = {name: [row["resps"] for row in expected["samples"][name]] for name in names}
    assert [row["resps"] for row in results["full"]["samples"]["local_generate"]] == samples["local_generate"]
    assert results["full"]["results"]["local_choice"]["acc,none"] == expected["results"]["local_choice"]["acc,none"]
    assert len(results["pqcache"]["samples"]["local_generate"]) == len(PROMPTS)
    assert "PQCache" in results["pqcache"]["config"]["method"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "nope"}, "there is no method 'nope': use one of full"),
    ({"model": "nope"}, "there is no model 'nope': use one of hf"),
    ({"budget": "nope"}, "there is no budget 'nope': use one of compensated, default, paper"),
    ({"question": "select"}, "there is no 'question': use one of model, method"),
    ({"budget.typo": 1}, "typo"),
    ({"methods.pqcache.typo": 1}, "typo"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PqbenchLM(**{"model": "tiny"} | arguments)
    assert "\n" not in str(caught.value)


def test_settings_reach_the_method() -> None:
    config = composed(
        "tiny", "pqcache", {"budget.ratio": "null", "budget.tokens": 99, "methods.pqcache.m": 4, "chunk": 7}
    )
    assert (config.methods.pqcache.budget.tokens, config.methods.pqcache.budget.ratio) == (99, None)
    assert (config.methods.pqcache.m, config.chunk) == (4, 7)
    assert composed("tiny", "pqcache", {"budget": "paper"}).methods.pqcache.budget._target_.endswith("PaperBudget")


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 0.7}, {"repetition_penalty": 1.2}, {"num_beams": 4}]
)
def test_only_greedy_decoding(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pqbench decodes greedily"):
        generated(ours(folder), PROMPTS[:1], **options)


def command(*line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-m", *line], env=given, capture_output=True, text=True, check=False)


def test_the_plain_command_knows_the_model_once_installed(folder: Path, tasks: Path, hf: HFLM, tmp_path: Path) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = tmp_path / "pqbench_entry-0.0.dist-info"  # what pip leaves of pyproject.toml's entry points
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pqbench-entry\nVersion: 0.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in found.items()) for group, found in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    output = tmp_path / "out"
    run = command(
        "lm_eval",
        "--model",
        "pqbench",
        "--model_args",
        f"pretrained={folder},max_length=512,method=full,budget.ratio=0.5",
        "--tasks",
        str(tasks / "local_generate.yaml"),
        "--output_path",
        str(output),
        "--log_samples",
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )
    assert run.returncode == 0, run.stderr
    (path,) = output.rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in rows] == generated(hf, PROMPTS)


@pytest.mark.parametrize(("error", "code"), [(None, 0), (ConfigError("no such thing"), 1)])
def test_the_wrapper_command_explains_errors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception | None, code: int
) -> None:
    def command() -> None:
        assert model_registry.get("pqbench") is PqbenchLM
        if error:
            raise error

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", command)
    assert main() == code
    assert caplog.messages == ([str(error)] if error else [])


def test_registering_costs_nothing_where_lm_eval_is_not_used() -> None:
    code = """
import sys
import pqbench.integrations.lm_eval_plugin
pqbench.integrations.lm_eval_plugin.register()
assert not {"torch", "lm_eval", "transformers", "numpy"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
