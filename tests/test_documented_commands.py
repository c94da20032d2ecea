"""Every command line of the README and of docs/ runs at small size, succeeds, and makes the promised files.

A command keeps its options; only the model and the lengths become small. Commands that cannot run here are listed with
the reason, and this list must not contain commands that the pages no longer show.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import plots.__main__
import plots.report.__main__
import pqbench.progress.command
import pqbench.tables.command
from pqbench.__main__ import main as pqbench_main
from pqbench.models.sources import byte_tokenizer
from pqbench.records.file import read_all

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The beginning of a command, and the reason why it is not run here.
NOT_HERE = {
    "make setup": "installs packages",
    "make test": "runs this suite",
    "make paper": "runs for an hour; tests/test_experiments.py composes all of its experiments",
    "make gpu-check": "is a step of CI of its own",
    "make gpu-wheels": "downloads packages",
    ".venv/bin/": "runs parts of this suite, or the formatter",
    "lm_eval ": "downloads its task; tests/integrations/test_lm_eval.py runs the command with a local one",
    "python -m pqbench.lm_eval_model ": "downloads its task; tests/integrations/test_lm_eval.py tests the command",
    "python -m pqbench model=llama31_8b ": "needs the hub",
    "python -m pqbench benchmark=latency model=llama31_8b model.weights=random": "needs a GPU",
    "python -m pqbench experiment=": "takes minutes; tests/test_experiments.py composes every experiment",
    "python -m pqbench benchmark=longbench": "needs data; tests/benchmarks/test_longbench.py runs it on its own",
    "python -m pqbench benchmark=code_word": "tests/test_docs.py runs this example",
    "python -m pqbench method=[full,random_rows": "tests/test_docs.py runs this example",
    "make bench METHOD=random_rows": "tests/test_docs.py runs this example",
    "python -m pqbench -m method=full,h2o hydra/launcher=": "needs a cluster, or is run by tests/test_sweeps.py",
    "python -m plots results/ cache pareto": "needs records of experiments; tests/plots draws every figure",
    "python -m pqbench.progress results/ --watch": "does not end by itself",
}
SMALL = {
    "needle": ["benchmark.lengths=[512]", "benchmark.depths=[50]", "benchmark.max_new_tokens=3"],
    "infinitebench": ["benchmark.tasks=[passkey]", "benchmark.length=512", "benchmark.per_length=1"],
    "infinitebench_quick": ["benchmark.tasks=[passkey]", "benchmark.length=512", "benchmark.per_length=1"],
    "ruler_quick": ["benchmark.tasks=[niah_single_2]", "benchmark.lengths=[1024]"],
    "fidelity": ["benchmark.lengths=[512]", "benchmark.documents=1", "benchmark.steps=2", "benchmark.ratios=[0.5]"],
    "latency": ["benchmark.contexts=[256]", "benchmark.new_tokens=3", "benchmark.repeats=1"],
    "attention": ["benchmark.contexts=[512]", "benchmark.budgets=[64]", "benchmark.repeats=1", "benchmark.steps=1"],
}


def commands() -> dict[str, str]:
    """Every command line in a code block without a language, with the first page that shows it."""
    found: dict[str, str] = {}
    for page in PAGES:
        language, lines = None, list[str]()
        for line in page.read_text(encoding="utf-8").splitlines():
            if not line.startswith("```"):
                lines += [line] if language == "" else []
            elif language is None:
                language = line.removeprefix("```")
            else:
                language = None
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            bare = re.split(r"\s+#\s", line)[0].strip()
            if bare and not bare.endswith("..."):
                found.setdefault(re.sub(r"\s+", " ", bare), page.name)
    assert len(found) > 30
    return found


def reason(command: str) -> str | None:
    """The reason why a command is not run here; None if it is run."""
    return next((why for start, why in NOT_HERE.items() if command.startswith(start.rstrip())), None)


def expanded(command: str) -> list[str]:
    """The Python commands that a `make` target would run, according to make; any other command is returned
    unchanged."""
    if not command.startswith("make "):
        return [command]
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.strip().lstrip("@") for line in done.stdout.splitlines()]
    found = [
        line.replace(".venv/bin/python", "python")
        for line in lines
        if re.match(r"\.venv/bin/python -m pq|.*plots", line)
    ]
    assert found, command
    return found


RUN = [command for command in commands() if reason(command) is None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **shape)).save_pretrained(
        found
    )
    tokenizer.save_pretrained(found)
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a main function in an empty folder; returns its output."""

    def call(main: Callable[..., object], arguments: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        try:
            code = main() if main is pqbench_main else main(arguments)
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        assert code == 0, f"{shlex.join(arguments)}\n{output.out}{output.err}"
        return output.out + output.err

    return call


def smaller(words: list[str], saved: Path) -> list[list[str]]:
    """The arguments of a `pqbench` command, with a small model and short prompts: a list for each of its benchmarks."""
    given = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("+"))
    model = {"model": "tiny"} if given.get("model") != "hf" else {"model.path": str(saved), "model.device": "cpu"}
    swept = given.get("benchmark", "needle").split(",")
    found = []
    for benchmark in swept:
        options = dict(word.split("=", 1) for word in SMALL[benchmark])
        values = given | model | options | {"benchmark": benchmark, "threads": "1", "results": "results"}
        others = [word for word in words if "=" not in word or word.startswith("+")]
        found.append([*others, *(f"{name}={value}" for name, value in values.items())])
    return found


def named(words: list[str]) -> set[str]:
    """The methods that a command names, or the default if it names none."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    own = {word.removeprefix("+methods.").partition("=")[0] for word in words if word.startswith("+methods.")}
    return set(given.get("method", "pqcache").strip("[]").split(",")) | own


@pytest.mark.parametrize("command", [c for c in RUN if any(" -m pqbench " in f"{e} " for e in expanded(c))])
def test_a_documented_run_measures_what_it_names(
    command: str, started: Callable[..., str], tmp_path: Path, saved: Path
) -> None:
    for line in expanded(command):
        words = shlex.split(line)
        if words[:3] != ["python", "-m", "pqbench"]:
            continue
        for small in smaller(words[3:], saved):
            printed = started(pqbench_main, small)
            benchmark = next(word for word in small if word.startswith("benchmark=")).partition("=")[2]
            records = [r for r in read_all(tmp_path / "results") if r["benchmark"] == benchmark.removesuffix("_quick")]
            for method in named(small):
                assert method in printed
                mine = [record for record in records if record["method"] == method]
                assert mine, method
                assert [r.get("error") for r in mine if r["status"] != "ok"] == []


@pytest.fixture
def results(started: Callable[..., str], tmp_path: Path, saved: Path) -> Path:
    """A results folder with at least needle records at two lengths, as `make bench` makes it."""
    words = [*smaller(["method=[full,pqcache]"], saved)[0], "benchmark.lengths=[256,512]"]
    started(pqbench_main, list({word.partition("=")[0]: word for word in words}.values()))
    return tmp_path / "results"


def test_documented_commands_on_results_make_what_they_promise(started: Callable[..., str], results: Path) -> None:
    mains: dict[str, Callable[..., object]] = {
        "pqbench.tables": pqbench.tables.command.main,
        "pqbench.progress": pqbench.progress.command.main,
        "plots": plots.__main__.main,
        "plots.report": plots.report.__main__.main,
    }
    seen = set()
    for command in RUN:
        for line in expanded(command):
            words = shlex.split(line)
            if words[2] not in mains:
                continue
            seen.add(words[2])
            printed = started(mains[words[2]], words[3:])
            if words[2] in ("pqbench.tables", "pqbench.progress"):
                assert "needle" in printed
                assert "pqcache" in printed
            if "--csv" in words:
                assert "pqcache" in (results.parent / words[words.index("--csv") + 1]).read_text()
    assert seen == set(mains)
    assert (results / "figures" / "needle_pqcache.png").exists()
    assert "pqcache" in (results / "report" / "index.html").read_text()


def test_every_documented_command_is_run_or_has_a_reason() -> None:
    known = {"pqbench", "pqbench.tables", "pqbench.progress", "plots", "plots.report"}
    for command, page in commands().items():
        if reason(command) is None:
            modules = {shlex.split(line)[2] for line in expanded(command)}
            assert modules <= known, f"{page}: {command}: run it in this file, or say why not"
    shown = list(commands())
    unused = [start for start in NOT_HERE if not any(command.startswith(start.rstrip()) for command in shown)]
    assert unused == []
