"""The import arrows and the house rules, read from the source with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
METHODS |= {path.name for path in (ROOT / "methods").iterdir() if (path / "__init__.py").exists()}

# The rooms that a room may import, from the ground up: a room imports only rooms above it in this table. A loose module
# of pqbench/ counts as a room; pqbench/__init__.py only re-exports names. CONTRIBUTING.md describes each room.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "terminal": set(),
    "kernels": set(),
    "typed": {"errors"},
    "budget": {"errors", "typed"},
    "method": {"budget", "errors", "kernels", "typed"},
    "models": {"errors", "typed"},
    "benchmarks": {"errors", "models"},
    "records": {"errors"},
    "costs": {"errors"},
    "progress": {"errors", "records", "terminal"},
    "tables": {"benchmarks", "errors", "records", "terminal"},
    "config": {"budget", "errors", "kernels", "method", "models", "records", "typed"},
    "store": {"errors", "kernels", "method", "typed"},
    "engine": {"errors", "kernels", "method", "models", "store", "typed"},
    "support": {"config", "engine", "errors", "method", "models", "records", "terminal"},
    "measure": {"benchmarks", "engine", "errors", "kernels", "method", "models", "records", "store", "terminal"},
    "integrations": {"config", "engine", "errors", "method", "records", "support", "terminal"},
    "lm_eval_model": {"integrations"},
    "__main__": {"benchmarks", "config", "errors", "measure", "method", "records", "support", "tables", "terminal"},
}
MOST_LOOSE = 8  # modules in pqbench/ itself
MOST_LINES = 400  # of a file
MOST_METHODS = 15  # of a class
MOST_BODY = 50  # lines of a function, its signature and its docstring aside
MANY_METHODS = {"pqbench.kernels.backend.Kernels"}  # the list of all operations, not a class that does things


def files(room: str) -> list[Path]:
    """Python files of a room."""
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, room
    return found


def module(path: Path) -> str:
    """Dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, types: bool = True) -> set[str]:
    """The modules that a file imports, by full name; ``from a import b`` counts as a and, if that is a module, as a.b.
    Without ``types``, imports that only a type checker sees are left out."""
    found = set()
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names if _is_module(f"{base}.{alias.name}")}
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def ours(path: Path, room: str = "pqbench") -> set[str]:
    """The second part of the names of our modules that a file imports: ``pqbench.measure.scored`` gives measure."""
    return {name.split(".")[1] for name in imports(path) if name.startswith(f"{room}.")}


def uses(path: Path, package: str) -> bool:
    """Whether a file imports a top-level package."""
    return any(name.split(".")[0] == package for name in imports(path))


@pytest.mark.parametrize("name", ARROWS)
def test_a_room_imports_only_rooms_that_it_may(name: str) -> None:
    place = ROOT / "pqbench" / name
    for path in files(f"pqbench/{name}") if place.is_dir() else [place.with_suffix(".py")]:
        assert ours(path) - {name} <= ARROWS[name], module(path)


def test_every_room_is_in_the_table_and_no_arrow_runs_up() -> None:
    there = [path for path in (ROOT / "pqbench").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert set(ARROWS) == {path.stem for path in there} - {"__init__"}
    order = list(ARROWS)
    assert [(room, other) for room in order for other in ARROWS[room] if order.index(other) > order.index(room)] == []


def test_few_modules_lie_loose() -> None:
    assert len(list((ROOT / "pqbench").glob("*.py"))) <= MOST_LOOSE


def test_methods_and_plots_import_only_what_they_may() -> None:
    for path in files("methods"):
        assert ours(path) <= {"method", "errors", "kernels"}, module(path)
    for path in files("plots"):
        assert ours(path) <= {"records", "tables", "terminal", "errors", "costs"}, module(path)


def knows() -> dict[str, set[str]]:
    """The modules of the project that each of its modules imports, anywhere in the file. Imports for types alone do not
    count, because a method names its state, and the annotations of the state name the method."""
    rooms = ("pqbench", "methods", "plots", "gpucheck")
    return {
        module(path): {name for name in imports(path, types=False) if _is_module(name) and name.split(".")[0] in rooms}
        for room in rooms
        for path in files(room)
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: others - {name} for name, others in knows().items()}
    for name in [name for name in graph if (ROOT.joinpath(*name.split(".")) / "__init__.py").exists()]:
        graph.pop(name)  # a package re-exports names of its modules, which may name the package
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_tables_know_nothing_that_runs_a_model() -> None:
    reached: set[str] = set()
    waiting = ["tables", "records", "progress"]
    while waiting:
        room = waiting.pop()
        reached.add(room)
        waiting += ARROWS[room] - reached
    assert reached & {"config", "store", "engine", "measure", "support"} == set()


def test_tables_and_figures_start_without_torch() -> None:
    code = (
        "import sys, pqbench.tables.command, plots.__main__;sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


def test_the_gpu_check_starts_with_nothing_but_python() -> None:
    """It must be able to say which packages are missing. Steps are processes of their own and may import everything."""
    code = (
        "import sys, gpucheck.__main__, gpucheck.wheels;"
        "own = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names);"
        "sys.exit(' '.join(sorted(own - {'gpucheck', '__main__'})) or 0)"
    )
    command = [sys.executable, "-S", "-c", code]  # without the packages that are installed
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plots_read_records_and_run_nothing() -> None:
    for path in files("plots"):
        assert not any(uses(path, package) for package in ("torch", "transformers", "methods", "hydra")), module(path)


def test_methods_import_only_torch_besides() -> None:
    allowed = {"__future__", "dataclasses", "math", "typing", "collections", "functools", "torch", "pqbench", "methods"}
    for path in files("methods"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, module(path)
        own = path.relative_to(ROOT).parts[1].removesuffix(".py")  # a file, or the folder of one method
        assert ours(path, "methods") <= {own}, module(path)


def test_the_harness_imports_neither_methods_nor_plots_nor_tests() -> None:
    for path in files("pqbench"):
        if module(path) != "pqbench.__main__":
            assert not any(uses(path, room) for room in ("plots", "tests", "gpucheck")), module(path)
        assert not uses(path, "methods"), module(path)


def test_the_harness_compares_nothing_with_a_methods_name() -> None:
    """Only ``full`` may be named, because tables and figures compare with it as the dense reference."""
    names = METHODS - {"full"}
    for path in files("pqbench"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            compared: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                compared = [node.value]
            elif isinstance(node, ast.Dict):
                compared = [key for key in node.keys if key is not None]
            for value in compared:
                for part in ast.walk(value):
                    assert not (isinstance(part, ast.Constant) and part.value in names), (
                        f"{module(path)}:{value.lineno}"
                    )


def test_every_method_has_its_yaml_and_every_yaml_its_method() -> None:
    targets = set()
    for path in sorted((ROOT / "conf/method").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == f"# @package methods.{path.stem}"
        targets |= {line.split(":")[1].split(".")[1].strip() for line in lines if line.startswith("_target_")}
    assert targets == METHODS


@pytest.mark.parametrize("room", ["pqbench", "methods", "plots", "gpucheck"])
def test_nothing_prints(room: str) -> None:
    for path in files(room):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            assert not (isinstance(call.func, ast.Name) and call.func.id == "print"), f"{module(path)}:{call.lineno}"


@pytest.mark.parametrize("room", ["pqbench", "methods", "plots", "gpucheck", "tests"])
def test_no_file_is_long(room: str) -> None:
    lengths = {module(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(room)}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.parametrize("room", ["pqbench", "methods", "plots", "gpucheck"])
def test_no_class_is_large_and_no_function_long(room: str) -> None:
    large = {}
    for path in files(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and f"{module(path)}.{node.name}" not in MANY_METHODS:
                count = len([part for part in node.body if isinstance(part, ast.FunctionDef)])
                if count > MOST_METHODS:
                    large[f"{module(path)}.{node.name}"] = count
            if isinstance(node, ast.FunctionDef):
                first = node.body[min(1, len(node.body) - 1)] if ast.get_docstring(node) else node.body[0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                if lines > MOST_BODY:
                    large[f"{module(path)}.{node.name}"] = lines
    assert large == {}


def test_the_formatter_lays_out_every_line() -> None:
    left = [
        module(path)
        for room in ("pqbench", "methods", "plots", "gpucheck", "tests")
        for path in files(room)
        if "fmt: " + "skip" in path.read_text(encoding="utf-8")
    ]
    assert left == []


@pytest.mark.parametrize("room", ["pqbench", "methods", "plots", "gpucheck"])
def test_every_module_and_public_name_says_what_it_is(room: str) -> None:
    missing = []
    for path in files(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            missing.append(module(path))
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{module(path)}.{node.name}")
    assert missing == []
