"""``python -m pqbench.config.page > docs/configuration.md``: every configuration key, from the comments in the
yamls."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pqbench.records.classes import conf_folder

# Group -> what one chooses with it.
GROUPS = {
    "budget": "How many tokens a KV head may attend to. `budget=paper`, `budget.ratio=0.2`.",
    "method": "The KV-cache methods: `method=pqcache`, several with `method=[full,pqcache]`. Each lies under its own "
    "name: `methods.pqcache.m=2`.",
    "model": "`model=smollm2`, `model.dtype=bfloat16`.",
    "store": "Where keys and values lie. `store=host store.cache_tokens=4096`.",
    "benchmark": "`benchmark=needle benchmark.lengths=[1024]`.",
}
_KEY = re.compile(r"(\w+):(?: +(.*?))??(?: +# *(.*))?$")
_SKIPPED = ("_target_", "defaults", "hydra")


@dataclass
class Page:
    """The contents of one yaml: its notes above or between the keys, the yamls it builds on, and its keys with default
    and meaning."""

    name: str
    target: str = ""
    notes: list[str] = field(default_factory=list)
    builds_on: list[str] = field(default_factory=list)
    keys: list[tuple[str, str, str]] = field(default_factory=list)


def main() -> int:
    """Write the reference to stdout. Returns the exit code."""
    sys.stdout.write(reference(conf_folder()))
    return 0


def reference(folder: Path) -> str:
    """The whole page as markdown."""
    lines = [
        "# Configuration",
        "",
        "Generated from the comments in `conf/` by `python -m pqbench.config.page > docs/configuration.md`.",
        "Every key can be set on the command line: `python -m pqbench method=[full,pqcache] budget.ratio=0.2`.",
        "",
        "## Run",
        "",
        *_table(page(folder / "config.yaml")),
    ]
    for group, text in GROUPS.items():
        lines += ["", f"## {group}", "", text]
        for path in sorted((folder / group).glob("*.yaml")):
            lines += ["", *_section(page(path), group)]
    return "\n".join(lines) + "\n"


def page(path: Path) -> Page:
    """Read the top-level keys of one yaml file. Comments on lines of their own are notes. A key without a comment gets
    the meaning that it has in the yaml on which this one builds. A key that interpolates a group refers to that
    group."""
    text = path.read_text(encoding="utf-8")
    found = Page(path.stem)
    fields = yaml.safe_load(text) or {}
    found.target = str(fields.get("_target_", ""))
    found.builds_on = [name for name in fields.get("defaults", []) if isinstance(name, str) and name != "_self_"]
    for line in text.splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            found.notes.append(line.removeprefix("#").strip())
    known = {name: meaning for base in found.builds_on for name, _, meaning in page(path.parent / f"{base}.yaml").keys}
    for name, value, meaning in _keys(text):
        if name not in _SKIPPED:
            group = re.fullmatch(r"\$\{(\w+)\}", value)
            shared = f"the group {group[1]}, or fields of its own" if group else ""
            found.keys.append((name, value, meaning or known.get(name, "") or shared))
    return found


def _keys(text: str) -> Iterator[tuple[str, str, str]]:
    for line in text.splitlines():
        match = _KEY.fullmatch(line)
        if match:
            yield match[1], match[2] or "", match[3] or ""


def _section(found: Page, group: str) -> list[str]:
    prefix = f"methods.{found.name}." if group == "method" else f"{group}."
    facts = [f"`{found.target}`"] if found.target else []
    facts += [f"builds on `{name}`" for name in found.builds_on]
    lines = [f"### {group}={found.name}", "", *([", ".join(facts)] if facts else [])]
    if found.notes:
        lines += ["", " ".join(found.notes)]
    return lines + (["", *_table(found, prefix)] if found.keys else [])


def _table(found: Page, prefix: str = "") -> list[str]:
    rows = [f"| `{prefix}{name}` | {_code(value)} | {_cell(text)} |" for name, value, text in found.keys]
    return ["| key | default | meaning |", "|---|---|---|", *rows]


def _code(value: str) -> str:
    return f"`{_cell(value)}`" if value else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
