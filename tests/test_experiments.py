"""Every experiment composes in both scales, names only existing things, and says which part of the paper it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pqbench.benchmarks.base import Benchmark
from pqbench.config.keys import KEYED
from pqbench.measure.base import Measurement
from pqbench.method import BudgetError, CompensatedBudget, Method, PaperBudget, compensated
from pqbench.records.file import run_key

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
EVICTING = {"h2o", "snapkv", "pyramidkv", "streaming_llm", "tova"}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composed(*overrides: str, hydra: bool = False) -> Any:
    return compose("config", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_names_what_exists(name: str, scale: str) -> None:
    config = composed(f"experiment={name}", f"scale={scale}")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    assert plain["model"]["name"] == {"small": "smollm2", "paper": "llama31_8b"}[scale]
    methods = {name: instantiate(node) for name, node in config.methods.items()}
    assert methods
    assert all(isinstance(method, Method) for method in methods.values())
    benchmark = instantiate(config.benchmark)
    assert isinstance(benchmark, Benchmark | Measurement)
    if isinstance(benchmark, Measurement):
        assert benchmark.needs_model
    instantiate(config.store)


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_swept_setting_exists_and_takes_every_value(name: str, scale: str) -> None:
    hydra = composed(f"experiment={name}", f"scale={scale}", hydra=True).hydra
    assert bool(hydra.sweeper.params) == (hydra.mode is not None)
    for path, values in (hydra.sweeper.params or {}).items():
        for value in str(values).split(","):
            config = composed(f"experiment={name}", f"scale={scale}", f"{path}={value}")
            assert str(OmegaConf.select(config, path)).lower() == value
            instantiate(config.store)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_scales_have_keys_of_their_own_and_leave_others_alone(name: str) -> None:
    def key(*overrides: str) -> str:
        plain: Any = OmegaConf.to_container(composed(*overrides), resolve=True)
        return run_key({part: plain[part] for part in KEYED})

    assert key(f"experiment={name}", "scale=small") != key(f"experiment={name}", "scale=paper")
    assert key(f"experiment={name}") == key(f"experiment={name}", "scale=small")


def test_without_an_experiment_the_scale_changes_only_the_model() -> None:
    plain: Any = OmegaConf.to_container(composed(), resolve=True)
    paper: Any = OmegaConf.to_container(composed("scale=paper"), resolve=True)
    assert {part for part in KEYED if plain[part] != paper[part]} == {"model"}
    assert composed("scale=paper", "model=tiny").model.name == "tiny"


def test_every_experiment_is_documented_with_its_part_of_the_paper() -> None:
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert f"experiment={name}`" in page, name
        first, second = (ROOT / f"conf/experiment/{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
        assert first == "# @package _global_"
        assert second.startswith("# ")


def test_make_paper_runs_all_experiments_but_those_that_need_data() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    listed = next(line for line in text.splitlines() if line.startswith("EXPERIMENTS ?=")).split("=")[1].split()
    assert sorted(listed) == [name for name in EXPERIMENTS if not name.startswith("longbench")]


@pytest.mark.parametrize(("reading", "share"), [("kv", 1 / 256), ("keys", 1 / 128)])
def test_compensation_gives_evicting_methods_the_bytes_of_an_index(reading: str, share: float) -> None:
    config = composed("experiment=longbench_1_10", f"budget.reading={reading}")
    methods = {name: instantiate(node) for name, node in config.methods.items()}
    prompt, plain = 12832, PaperBudget(ratio=0.1)
    for name, method in methods.items():
        split = compensated(method).split(prompt + 1, prompt)
        if name == "full":
            assert split is None
            continue
        assert split is not None
        extra = split.total - plain.resolve(prompt + 1, prompt).total
        expected = share * (prompt - 32) if name in EVICTING else 0
        assert extra == pytest.approx(expected, abs=2), name
    assert compensated(methods["h2o"]).budget.label == {"kv": "10.4 % (C)", "keys": "10.8 % (C)"}[reading]  # type: ignore[union-attr]
    assert methods["pqcache"].budget.label == "10 %"


def test_compensation_refuses_what_it_does_not_know() -> None:
    with pytest.raises(BudgetError, match=r"budget\.reading is 'both': use kv or keys"):
        CompensatedBudget(reading="both")
    with pytest.raises(BudgetError, match=r"budget\.communication is 2"):
        CompensatedBudget(communication=2)
    full = CompensatedBudget(ratio=0.999, communication=1.0).for_evicting
    assert full.ratio == 1.0  # never more than everything
