"""The import arrows and the house rules, read from the source with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
CORE = {"method", "budget", "errors"}
TIMING = CORE | {
    "timing",
    "devices",
    "run",
    "generation",
    "prompt",
    "group",
    "cache",
    "store",
    "kernels",
    "records",
    "models",
    "benchmarks",
    "environment",
    "batch",
    "terminal",
    "timings",
    "clock",
    "graphs",
    "rehearsal",
}
METHODS |= {path.name for path in (ROOT / "methods").iterdir() if (path / "__init__.py").exists()}


def files(room: str) -> list[Path]:
    """Python files of a room."""
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, room
    return found


def module(path: Path) -> str:
    """Dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules a file imports, by full name; ``from a import b`` counts as a and, where that is a module, a.b."""
    found = set()
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    """Second part of the names of our modules that a file imports: ``pqbench.measure.scored`` gives run."""
    return {name.split(".")[1] for name in imports(path) if name.startswith(f"{room}.")}


def uses(path: Path, package: str) -> bool:
    """Whether a file imports a top-level package."""
    return any(name.split(".")[0] == package for name in imports(path))


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("methods", {"method", "errors", "kernels"}),
        ("plots", {"folders", "records", "tables", "summaries", "timings", "terminal", "errors", "costs", "cost_fit"}),
        ("pqbench/kernels", {"kernels"}),
        ("pqbench/store", {"store", "kernels"} | CORE),
        ("pqbench/graphs", {"graphs", "group", "cache", "kernels", "store"} | CORE),
        ("pqbench/benchmarks", {"benchmarks", "errors", "models"}),
        ("pqbench/timing", TIMING),
        ("pqbench/fidelity", TIMING | {"fidelity", "attention", "probe", "summaries"}),
    ],
)
def test_rooms_import_only_what_they_may(room: str, allowed: set[str]) -> None:
    for path in files(room):
        assert ours(path) <= allowed, module(path)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("errors", set()),
        ("budget", {"errors"}),
        ("method", {"budget", "errors", "kernels"}),
        ("lengths", {"errors"}),
        ("weights", set()),
        ("devices", {"errors"}),
        ("models", {"errors", "devices", "lengths", "weights"}),
        ("attention", CORE | {"kernels", "cache"}),  # the cache as a type only, see below
        ("clock", set()),
        ("beside", {"clock", "kernels"}),
        ("rehearsal", CORE | {"attention", "batch", "cache", "group", "store"}),
        ("rotary", CORE | {"attention", "batch", "cache", "kernels", "lengths"}),
        ("group", CORE | {"kernels", "store", "clock"}),
        ("cache", CORE | {"kernels", "store", "attention", "group"}),
        ("batch", CORE | {"group", "lengths"}),
        ("setting", CORE | {"store", "clock", "graphs"}),
        (
            "prompt",
            CORE
            | {"setting", "attention", "cache", "batch", "group", "kernels", "store", "clock", "beside", "graphs"}
            | {"lengths", "rehearsal", "rotary"},
        ),
        ("generation", CORE | {"attention", "cache", "batch", "group", "prompt", "clock", "graphs"}),
        ("custom_generate", CORE | {"generation", "prompt"}),
        ("probe", CORE | {"attention", "cache", "batch", "group", "prompt", "kernels", "store"}),
    ],
)
def test_modules_import_only_what_they_may(name: str, allowed: set[str]) -> None:
    assert ours(ROOT / "pqbench" / f"{name}.py") <= allowed


def test_attention_knows_the_cache_as_a_type_only() -> None:
    tree = ast.parse((ROOT / "pqbench/engine/attention.py").read_text(encoding="utf-8"))
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "pqbench.engine.layers" not in top


def loaded_with() -> dict[str, set[str]]:
    """Which of our modules each of ours loads when it is imported: imports at the top of the file, types excepted."""
    graph: dict[str, set[str]] = {}
    for path in files("pqbench"):
        found = graph.setdefault(module(path), set())
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pqbench"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if _is_module(name) else node.module for name in names}
    return graph


def test_there_is_no_cycle_of_imports() -> None:
    graph = loaded_with()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        for target in graph.get(name, ()):
            visit(target, (*trail, name))

    for name in graph:
        visit(name, ())


def test_records_and_tables_load_nothing_that_runs_a_model() -> None:
    graph, reached, todo = loaded_with(), set(), ["pqbench.records.file", "pqbench.tables.document"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += graph[name] - reached
    running = {
        "run",
        "generation",
        "prompt",
        "group",
        "attention",
        "cache",
        "batch",
        "probe",
        "custom_generate",
        "models",
        "method",
    }
    assert reached & {f"pqbench.{name}" for name in running} == set()
    assert not any(name.startswith(("pqbench.store", "pqbench.kernels")) for name in reached)


def test_tables_and_figures_start_without_torch() -> None:
    code = (
        "import sys, pqbench.tables.command, plots.__main__;sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


def test_the_gpu_check_starts_with_nothing_but_python() -> None:
    """It is the one that says which packages are missing; steps are processes of their own and may need everything."""
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
    """``full`` is the dense reference that tables and figures compare with; it may be looked for, but nothing else."""
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
    assert {name: length for name, length in lengths.items() if length > 400} == {}


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
