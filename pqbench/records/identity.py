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
INSTALLED = ("site-packages", "dist-packages")  # folders in which unrelated packages lie side by side


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
    """Twelve hex digits that depend on the source of a method, of its base classes outside the harness, and of the
    methods in its fields."""
    own = type(method).__module__
    modules = dict.fromkeys(base.__module__ for base in type(method).__mro__)
    reached = {own, *_sources(own)}
    bases = [name for name in modules if name not in reached and _outside(name)]
    inner = [getattr(method, field.name) for field in fields(method)]
    others = [one for one in inner if is_dataclass(one) and _top(type(one).__module__) != OWN]
    codes = [*map(source_code, [own, *bases]), *map(method_code, others)]
    return codes[0] if len(codes) == 1 else _digest(codes)


@cache
def harness_code() -> str:
    """Twelve hex digits that depend on the source of the whole harness. Records of failures hold them."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return _digest([_plain(ast.parse(path.read_text(encoding="utf-8"))) for path in files])


@cache
def source_code(module: str) -> str:
    """Twelve hex digits that depend on the source of a module and of the modules that it imports, directly or
    indirectly, from the same package. For a module that is in no package they are those in the same folder. Comments,
    docstrings, layout and the places of imported modules do not count. The result is ``unknown`` if there is no source
    file."""
    found = _sources(module)
    return _digest(sorted(found.values())) if found else "unknown"


def _sources(module: str) -> dict[str, str]:
    """The plain source of all modules that :func:`source_code` takes, by name; empty if there is no source file."""
    found = getattr(sys.modules.get(module), "__file__", None)
    if found is None or not Path(found).is_file():
        return {}
    path = Path(found)
    root = path.parents[module.count(".") + (path.name == "__init__.py")]
    single = "." not in module and path.name != "__init__.py" and root.name not in INSTALLED
    seen: dict[str, str] = {}
    waiting = [(module, path)]
    while waiting:
        name, path = waiting.pop()
        if name in seen:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imported(tree, package):
            if _outside(imported) if single else _top(imported) == _top(module) != imported:
                waiting += [(imported, place) for place in _places(root, imported)]
        seen[name] = _plain(tree)
    return seen


def _top(module: str) -> str:
    """The package or module at the beginning of a dotted name."""
    return module.partition(".")[0]


def _outside(module: str) -> bool:
    """Whether a module belongs neither to the harness nor to Python itself."""
    return _top(module) not in {"", OWN, *sys.stdlib_module_names}


def _places(root: Path, module: str) -> list[Path]:
    """The files of a module under the folder ``root``."""
    place = root.joinpath(*module.split("."))
    return [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Names of all modules that a module of ``package`` may import; for ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


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
