"""The method in CONTRIBUTING.md is complete: its two files, as printed there, run beside full attention."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_documented_method_runs_from_one_file_and_one_yaml(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, yaml = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    assert code
    assert yaml
    package = tmp_path / "site"
    (package / "random_rows_example").mkdir(parents=True)
    (package / "random_rows_example" / "__init__.py").write_text(code.group(1))
    conf = tmp_path / "conf" / "method"
    conf.mkdir(parents=True)
    target = yaml.group(1).replace("methods.random_rows.RandomRows", "random_rows_example.RandomRows")
    assert target != yaml.group(1)
    (conf / "random_rows.yaml").write_text(target)

    command = [
        sys.executable, "-m", "pqbench", "model=tiny", "method=[full,random_rows]", "threads=1",
        "benchmark.lengths=[512]", "benchmark.depths=[50]", f"results={tmp_path / 'results'}",
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("results/needle/tiny/random_rows-*/records.jsonl")
    [record] = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["status"] == "ok"
    assert record["attended_tokens"] == 64  # the floor of the default budget, of 512 tokens
    assert 0 < record["mass"] < 1
