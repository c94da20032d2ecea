"""Methods and settings that do not support captured steps or selection ahead are refused by name before anything
runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from methods.full import Full
from methods.pqcache import PQCache
from pqbench.__main__ import main
from pqbench.engine.decode import generate
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.method import Method
from pqbench.store.tiers import HostTier
from tests.engine.test_generation import SMALL, methods
from tests.support import SHAPE, left_padded, prompt_of, tiny_model

CAPTURED, AHEAD = Setting(graphs=True), Setting(select_ahead=True)
ABLE = {"full", "pqcache"}


@pytest.mark.parametrize("setting", [CAPTURED, AHEAD], ids=["graphs", "select_ahead"])
def test_methods_that_cannot_are_named(llama: PreTrainedModel, setting: Setting) -> None:
    able = ABLE if setting.graphs else {"pqcache"}
    for name, method in methods(SMALL).items():
        if name not in able:
            with pytest.raises(ConfigError, match=rf"(graphs|select_ahead)=true: {type(method).__name__} "):
                generate(llama, prompt_of(20), method, max_new_tokens=2, setting=setting)


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        (Full(), Setting(HostTier(link="local"), graphs=True), "attends to the whole context"),
        (PQCache(m=2, b=4, codes_on="host"), CAPTURED, "set codes_on=device"),
        (PQCache(m=2, b=4, codes_on="host"), AHEAD, "set codes_on=device"),
    ],
)
def test_options_that_cannot_are_named(llama: PreTrainedModel, method: Method, setting: Setting, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(llama, prompt_of(20), method, max_new_tokens=2, setting=setting)


def test_models_that_cannot_are_named() -> None:
    with pytest.raises(ConfigError, match="sliding windows"):
        generate(tiny_model("gemma3"), prompt_of(20), Full(), max_new_tokens=2, setting=CAPTURED)
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rotary)).eval()
    with pytest.raises(ConfigError, match="depends on the length"):
        generate(model, prompt_of(20), Full(), max_new_tokens=2, setting=CAPTURED)


def test_batches_of_several_lengths_are_refused(llama: PreTrainedModel) -> None:
    ids, mask = left_padded(prompt_of(20), prompt_of(30))
    with pytest.raises(ConfigError, match="prompts of one length"):
        generate(llama, ids, Full(), mask, 2, setting=CAPTURED)


@pytest.mark.parametrize("value", [1.5, -2, float("nan")])
def test_a_correction_is_a_cosine(value: float) -> None:
    with pytest.raises(ConfigError, match="correction is"):
        Setting(correction=value)


RUN = ("method=h2o", "model=tiny", "benchmark=needle", "benchmark.lengths=[256]", "benchmark.max_new_tokens=3")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["graphs=true"], "graphs=true: h2o has steps of changing shape"),
        (["select_ahead=true"], "select_ahead=true: h2o does not select"),
        (["graphs=maybe"], "graphs is 'maybe': use true or false"),
        (["correction=close"], "correction is 'close': use a number"),
        (["correction=3"], "correction is 3: it is a cosine"),
    ],
)
def test_the_command_says_so_in_one_line(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pqbench", *RUN, f"results={tmp_path}", *options])
    with pytest.raises(SystemExit) as end:
        main()
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert [words in line for line in errors] == [True]
    assert not any(path.stat().st_size for path in tmp_path.rglob("records.jsonl"))


@pytest.mark.parametrize(
    ("options", "kept"),
    [([], []), (["graphs=true"], ["graphs"]), (["select_ahead=true"], ["select_ahead", "correction"])],
)
def test_the_key_of_a_run_holds_an_option_that_is_on(
    options: list[str], kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both options off, the key is the same as before the options existed, so older results are found."""
    words = [*RUN[1:], "method=pqcache", "methods.pqcache.b=4", "kernels=reference", "threads=1", f"results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["pqbench", *words, *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    (config,) = tmp_path.rglob("config.yaml")
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert [name for name in ("graphs", "select_ahead", "correction") if name in written] == kept
