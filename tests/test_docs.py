"""The Python examples on the pages in docs/ run as they are printed there, among them the method and the benchmark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, kind: str) -> list[str]:
    """Code blocks of a page in docs/."""
    found = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found, (page, kind)
    return found


def run_example(page: str, group: str, name: str, target: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Put the Python and yaml of a page into the places of user code, run them on the tiny model, and return the
    records."""
    [code], [yaml] = blocks(page, "python"), blocks(page, "yaml")
    package, conf = folder / "site" / f"{name}_example", folder / "conf" / group
    package.mkdir(parents=True)
    conf.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    own = yaml.replace(f"_target_: {target}.", f"_target_: {name}_example.")
    assert own != yaml
    (conf / f"{name}.yaml").write_text(own)
    command = [
        sys.executable,
        "-m",
        "pqbench",
        "model=tiny",
        "threads=1",
        *overrides,
        f"results={folder / 'results'}",
        f"hydra.searchpath=[file://{folder / 'conf'}]",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder / 'site'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    paths = sorted(folder.glob("results/**/records.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_the_documented_method_runs_from_one_file_and_one_yaml(tmp_path: Path) -> None:
    records = run_example(
        "add_a_method.md",
        "method",
        "random_rows",
        "methods.random_rows",
        tmp_path,
        "method=[full,random_rows]",
        "benchmark.lengths=[512]",
        "benchmark.depths=[50]",
    )
    [record] = [record for record in records if record["method"] == "random_rows"]
    assert record["status"] == "ok"
    assert record["attended_tokens"] == 64  # the floor of the default budget, of 512 tokens
    assert 0 < record["mass"] < 1


def test_the_documented_benchmark_runs_from_one_file_and_one_yaml(tmp_path: Path) -> None:
    records = run_example(
        "add_a_benchmark.md",
        "benchmark",
        "code_word",
        "pqbench.benchmarks.code_word",
        tmp_path,
        "benchmark=code_word",
        "method=[streaming_llm]",
        "benchmark.lines=20",
        "benchmark.count=2",
        "question=select",
    )
    assert [(r["benchmark"], r["sample_id"], r["status"]) for r in records] == [
        ("code_word", "20-0", "ok"),
        ("code_word", "20-1", "ok"),
    ]
    # The scores of answers that were written by hand.
    name = "code_word_example"
    sys.path.insert(0, str(tmp_path / "site"))
    try:
        benchmark = __import__(name).CodeWord()
    finally:
        sys.path.remove(str(tmp_path / "site"))
        del sys.modules[name]
    right = records[0]["references"][0]
    assert benchmark.score({"prediction": f"It is {right.upper()}.", "references": [right]}) == {"score": 100.0}
    assert benchmark.score({"prediction": "I do not know", "references": [right]}) == {"score": 0.0}


def test_the_other_python_examples_run() -> None:
    [code] = blocks("quick_start.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["tokens"].shape == (1, 8)
    [code] = blocks("latency_model.md", "python")
    names = {}
    exec(code, names)
    assert 0.001 < names["full"] < names["pq"] < 1


def test_pages_link_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_no_figure_lies_in_docs_that_no_page_shows() -> None:
    text = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    figures = [path for kind in ("png", "svg") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    assert figures
    assert [path.name for path in figures if path.name not in text] == []


def test_the_readme_is_short_and_lists_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    listed = set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE))
    presets = {"paper_longbench", "paper_infinitebench"}  # settings of pqcache, not methods
    assert listed == {path.stem for path in (ROOT / "conf/method").glob("*.yaml")} - presets


def test_the_map_of_the_rooms_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map")[2].partition("## Where")[0]
    rooms = {path for path in (ROOT / "pqbench").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    missing = {path.stem for path in rooms if not re.search(rf"`(pqbench/)?{path.stem}/?`", text)} - {"__init__"}
    assert missing == set()
    for name in re.findall(r"^\| `([\w/]+/)` ", text, re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_modules_that_pages_name_exist() -> None:
    """Paths and dotted names of our files, in the README, CONTRIBUTING.md and docs/."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        found = re.findall(r"\b(?:pqbench|methods|plots|gpucheck|conf|tests)/[\w/]+\.(?:py|yaml)\b", text)
        own = [name for name in found if not re.search(r"random_rows|code_word|mine|NAME", name)]
        assert [name for name in own if not (ROOT / name).exists()] == [], page.name
        for name in re.findall(r"python -m ((?:pqbench|plots|gpucheck)[\w.]*)", text):
            place = ROOT.joinpath(*name.split("."))
            assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), (page.name, name)
