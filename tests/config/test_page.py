"""docs/configuration.md lists every key of every yaml with its meaning, and is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pqbench.config.page import GROUPS, page, reference

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGES = [CONF / "config.yaml", *(path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml")))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_its_default_and_a_meaning(path: Path) -> None:
    fields = yaml.safe_load(path.read_text()) or {}
    found = page(path)
    assert {name: yaml.safe_load(value) for name, value, _ in found.keys} == {
        name: value for name, value in fields.items() if name not in ("_target_", "defaults", "hydra")
    }
    assert [name for name, _, meaning in found.keys if not meaning] == []
    assert found.target == fields.get("_target_", "")


def test_the_page_is_current() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert text == reference(CONF), "run `python -m pqbench.config.page > docs/configuration.md`"


def test_comments_become_cells(tmp_path: Path) -> None:
    group = tmp_path / "benchmark"
    group.mkdir()
    (group / "base.yaml").write_text(
        "_target_: a.B\n# Why it is so.\nkind: x   # x | y, {curly: braces}\nlist: [1, 2] # many\n"
    )
    (group / "quick.yaml").write_text("defaults: [base, _self_]\n\nkind: y\nown: ${budget}\n")
    (tmp_path / "config.yaml").write_text("debug: false # on or off\n")
    text = reference(tmp_path)
    assert "| `debug` | `false` | on or off |" in text
    assert "Why it is so." in text
    assert r"| `benchmark.kind` | `x` | x \| y, {curly: braces} |" in text
    assert "| `benchmark.list` | `[1, 2]` | many |" in text
    assert "`builds on" not in text
    assert "builds on `base`" in text
    assert "| `benchmark.own` | `${budget}` | the group budget, or fields of its own |" in text
