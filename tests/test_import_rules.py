"""The house rules that a machine can check: who may import whom, where, and how files are kept.

Each rule is a function from a folder of sources to the lines that break it, and each is tested on a small tree in which
it is broken: a rule that finds nothing there would find nothing here.
"""

import ast
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("paged", "reference")

# Integers only: these rooms are read without knowing torch, and run in microseconds.
INTEGER_ROOMS = (
    "paged.blocks",
    "paged.kv_cache_manager",
    "paged.request",
    "paged.scheduler",
    "paged.step",
    "paged.step_draft",
)
# Only the rooms that compare may know the reference.
MAY_IMPORT_REFERENCE = ("paged.demo", "paged.oracle", "paged.traces", "paged.bench", "paged.course")
# Imports inside functions keep `paged --help` and pytest's start quick; nowhere else.
MAY_IMPORT_LATE = ("paged.cli", "paged.__init__", "paged.pytest_plugin")
# Their classes say what is wrong with them; their methods are steps of one kernel, which says what those are.
MUTANTS = "paged.oracle.mutants."
# Arrows go one way: no room may import one of a line above its own. The most exact name counts.
LAYERS = (
    ("paged.cli", "paged.demo", "paged.server", "paged.bench"),
    ("paged.llm", "paged.async_engine", "paged.memory", "paged.oracle"),
    ("paged.engine",),
    ("paged.answers",),
    ("paged.model", "paged.memory.events"),
    ("paged.batch", "paged.scheduler"),
    ("paged.kv_cache_manager", "paged.beam_search", "paged.step_draft"),
    ("paged.wishes",),
    ("paged.step", "paged.request"),
    ("paged.kv_pool", "paged.attention", "paged.sampling", "paged.outputs", "paged.config", "paged.blocks"),
    ("paged.sampling_params", "paged.quantisation", "paged.transfer"),
)

Rule = Callable[[Path], list[str]]


def modules(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """Name, file and syntax tree of every module of both packages; a package's own file keeps `.__init__`."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            yield name, path, ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full, from the package on"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, rooms: tuple[str, ...]) -> bool:
    """Whether a module is one of the rooms or inside one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def forbidden(root: Path, rooms: tuple[str, ...], targets: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    """Imports of `targets` in `rooms`, those in the rooms `but` left out."""
    return [
        f"{name}:{line} imports {what}"
        for name, _, tree in modules(root)
        if within(name, rooms) and not within(name, but)
        for line, what in imports(tree)
        if within(what, targets)
    ]


def torch_in_integer_rooms(root: Path) -> list[str]:
    return forbidden(root, INTEGER_ROOMS, ("torch", "numpy", "transformers"))


def reference_knows_paged(root: Path) -> list[str]:
    return forbidden(root, ("reference",), ("paged",))


def engine_knows_reference(root: Path) -> list[str]:
    return forbidden(root, ("paged",), ("reference",), but=MAY_IMPORT_REFERENCE)


def late_imports(root: Path) -> list[str]:
    return [
        f"{name}:{line} imports {what} inside {node.name}"
        for name, _, tree in modules(root)
        if name not in MAY_IMPORT_LATE
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for line, what in imports(node)
    ]


def module_globals(root: Path) -> list[str]:
    return [
        f"{name}:{node.lineno} global {', '.join(node.names)}"
        for name, _, tree in modules(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which module imports which, among those of both packages."""
    known = {name.removesuffix(".__init__") for name, _, _ in modules(root)}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, _, tree in modules(root):
        module = name.removesuffix(".__init__")
        for _, what in imports(tree):
            target = what if what in known else what.rpartition(".")[0]
            if target in known and target != module:
                graph[module].add(target)
    return graph


def circles(root: Path) -> list[str]:
    """Every import that closes a circle; a package's own file may import its modules, which import one another."""
    graph, found, done = import_graph(root), [], set()

    def visit(module: str, path: list[str]) -> None:
        for target in sorted(graph[module]):
            if target in path:
                found.append(" -> ".join([*path[path.index(target) :], target]))
            elif target not in done:
                visit(target, [*path, target])
        done.add(module)

    for module in sorted(graph):
        if module not in done:
            visit(module, [module])
    return found


def layer_of(module: str) -> int | None:
    rooms = [(len(room), i) for i, rooms in enumerate(LAYERS) for room in rooms if within(module, (room,))]
    return max(rooms)[1] if rooms else None


def arrows_upwards(root: Path) -> list[str]:
    found = []
    for module, targets in import_graph(root).items():
        for target in sorted(targets):
            here, there = layer_of(module), layer_of(target)
            if here is not None and there is not None and there < here:
                found.append(f"{module} imports {target}")
    return found


def long_functions(root: Path) -> list[str]:
    """Functions of more than 60 lines, docstrings, comments and blank lines not counted."""
    found = []
    for name, path, tree in modules(root):
        lines = path.read_text().splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                body = [line.strip() for line in lines[node.lineno - 1 : node.end_lineno]]
                docstring = ast.get_docstring(node, clean=False)
                length = sum(bool(line) and not line.startswith("#") for line in body)
                length -= sum(bool(line.strip()) for line in docstring.splitlines()) if docstring else 0
                if length > 60:
                    found.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    return found


def undocumented(root: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    found = []
    for name, _, tree in modules(root):
        nodes: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [(name, tree)]
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                nodes.append((f"{name}.{node.name}", node))
                if isinstance(node, ast.ClassDef) and not name.startswith(MUTANTS):
                    nodes += [
                        (f"{name}.{node.name}.{method.name}", method)
                        for method in node.body
                        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                    ]
        found += [label for label, node in nodes if ast.get_docstring(node) is None]
    return found


# Each rule beside a tree that breaks it, and what it has to say about it.
RULES: list[tuple[Rule, dict[str, str], str]] = [
    (torch_in_integer_rooms, {"paged/blocks/pool.py": "from torch import Tensor"}, "imports torch.Tensor"),
    (reference_knows_paged, {"reference/cache.py": "import paged.kv_pool"}, "imports paged.kv_pool"),
    (engine_knows_reference, {"paged/engine.py": "from reference import engine"}, "imports reference.engine"),
    (late_imports, {"paged/engine.py": "def f():\n    import os"}, "imports os inside f"),
    (module_globals, {"paged/engine.py": "n = 0\ndef f():\n    global n\n    n = 1"}, "global n"),
    (circles, {"paged/a.py": "import paged.b", "paged/b.py": "from paged.a import x"}, "paged.a -> paged.b -> paged.a"),
    (
        arrows_upwards,
        {"paged/blocks/pool.py": "from paged.scheduler import S", "paged/scheduler.py": ""},
        "paged.blocks.pool imports paged.scheduler",
    ),
    (long_functions, {"paged/a.py": "def f():\n" + "    x = 1\n" * 61}, "f has 62 lines"),
    (undocumented, {"paged/a.py": '"""A."""\nclass A:\n    """A."""\n    def f(self): ...'}, "paged.a.A.f"),
]


@pytest.mark.parametrize(("rule", "broken", "message"), RULES, ids=[rule.__name__ for rule, _, _ in RULES])
def test_rule(rule, broken, message, tmp_path):
    assert rule(ROOT) == []
    for name, source in broken.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source + "\n")
    found = rule(tmp_path)
    assert any(message in line for line in found), found


@pytest.mark.parametrize("module", ["paged", "paged.blocks", "paged.scheduler", "paged.cli"])
def test_imports_no_torch_and_is_quick(module):
    """Not by a detour either; and in under half a second, best of three, since the machine may be busy."""
    program = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
