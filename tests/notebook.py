"""Runs the code cells of a notebook in order in one namespace, like Jupyter, and stores their output.

``python -m tests.notebook docs/pqcache.ipynb`` writes text and figures into the notebook. Jupyter is not needed.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

Output = dict[str, Any]


def execute(path: Path) -> tuple[dict[str, Any], list[list[Output]]]:
    """The namespace after the last code cell, and the outputs of each cell: the value of the last expression, and
    figures."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    plt.switch_backend("Agg")
    for i, cell in enumerate(cells, 1):
        value = _run("".join(cell["source"]), names, f"{path.name}, cell {i}")
        outputs.append([*_result(value, i), *_figures()])
    return names, outputs


def store(path: Path) -> None:
    """Execute a notebook and write its outputs into it."""
    book = json.loads(path.read_text())
    _, outputs = execute(path)
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for i, (cell, shown) in enumerate(zip(code, outputs, strict=True), 1):
        cell["execution_count"], cell["outputs"] = i, shown
    path.write_text(json.dumps(book, indent=1) + "\n")


def _run(source: str, names: dict[str, Any], label: str) -> Any:
    tree = ast.parse(source, label)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, label, "exec"), names)
    return eval(compile(ast.Expression(last.value), label, "eval"), names) if isinstance(last, ast.Expr) else None


def _result(value: Any, count: int) -> list[Output]:
    if value is None:
        return []
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "to_html"):
        data["text/html"] = value.to_html().splitlines(keepends=True)
    return [{"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}]


def _figures() -> list[Output]:
    """Open figures as png; they are closed afterwards."""
    found = []
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        found.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return found


if __name__ == "__main__":
    store(Path(sys.argv[1]))
