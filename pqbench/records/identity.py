"""What makes two runs the same: class names, settings and the source of the method, but never the path of a module.

Moving a file therefore loses no results. A method whose code was edited gets new records, and the older ones remain.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

OWN = __name__.partition(".")[0]  # the harness, whose code does not count as code of a method


def class_names(settings: Any) -> Any:
    """The settings with every ``_target_: package.module.Name`` shortened to ``Name``."""
    if isinstance(settings, Mapping):
        return {
            name: str(value).rpartition(".")[2] if name == "_target_" else class_names(value)
            for name, value in settings.items()
        }
    return [class_names(value) for value in settings] if isinstance(settings, list | tuple) else settings


def class_name(target: Any) -> str:
    """The class that a ``_target_`` names: ``Name`` for ``package.module.Name`` and also for its constructor
    ``package.module.Name.preset``."""
    names = str(target).split(".")
    return next((name for name in reversed(names) if name[:1].isupper()), names[-1])


def method_code(method: Any) -> str:
    """Twelve hex digits that depend on the source of a method and of the methods in its fields."""
    inner = [getattr(method, field.name) for field in fields(method)]
    others = [one for one in inner if is_dataclass(one) and type(one).__module__.partition(".")[0] != OWN]
    codes = [source_code(type(method).__module__), *map(method_code, others)]
    return codes[0] if len(codes) == 1 else _digest(codes)


@cache
def harness_code() -> str:
    """Twelve hex digits that depend on the source of the whole harness. Records of failures hold them."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return _digest([_plain(ast.parse(path.read_text(encoding="utf-8"))) for path in files])


@cache
def source_code(module: str) -> str:
    """Twelve hex digits that depend on the source of a module and of the modules of the same package that it imports,
    directly or indirectly. Comments, docstrings, layout and the places of imported modules do not count. The result is
    ``unknown`` if there is no source file."""
    found = getattr(sys.modules.get(module), "__file__", None)
    if found is None or not Path(found).is_file():
        return "unknown"
    root = Path(found).parents[module.count(".") - (Path(found).name != "__init__.py")] if "." in module else None
    seen: dict[str, str] = {}
    waiting = [(module, Path(found))]
    while waiting:
        name, path = waiting.pop()
        if name in seen:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if root is not None:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting += _siblings(tree, package, module.partition(".")[0], root)
        seen[name] = _plain(tree)
    return _digest([seen[name] for name in sorted(seen, key=seen.__getitem__)])


def _siblings(tree: ast.Module, package: str, top: str, root: Path) -> Iterator[tuple[str, Path]]:
    """The modules of the package ``top`` that a module of ``package`` imports. ``root`` is the folder of ``top``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = root.joinpath(*name.split(".")[1:])
            if name.partition(".")[0] == top and name != top:
                for path in (place.with_suffix(".py"), place / "__init__.py"):
                    if path.is_file():
                        yield name, path


class _Bare(ast.NodeTransformer):
    """Removes docstrings and imports from a tree, and collects the imported names without their modules."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_imports(self, node: ast.Import | ast.ImportFrom) -> ast.AST:
        """Replace an import by a statement that does nothing."""
        self.names |= {f"{alias.name.rpartition('.')[2]} as {alias.asname or alias.name}" for alias in node.names}
        return ast.Pass()

    visit_Import = visit_ImportFrom = visit_imports  # noqa: N815 - the names that ast calls

    def visit_documented(self, node: ast.AST) -> ast.AST:
        """Remove the docstring of a module, class or function."""
        if ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            node.body[:1] = [ast.Pass()]  # type: ignore[attr-defined]
        return self.generic_visit(node)

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = visit_documented  # noqa: N815


def _plain(tree: ast.Module) -> str:
    """Source text without comments, docstrings, layout and the modules from which names are imported."""
    bare = _Bare()
    lines = ast.unparse(bare.visit(tree)).splitlines()
    return "\n".join([*sorted(bare.names), *(line for line in lines if line.strip() != "pass")])


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
