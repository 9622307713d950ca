"""The rules of the tree, checked on the source: layers, import cycles, imports inside functions, docstrings of public names."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import moefx

ROOT = Path(__file__).parents[1]
#: Packages that need not be installed, or that `import moefx` and quick commands do without: their users are imported when called.
OPTIONAL_OR_HEAVY = {"triton", "rich", "quack", "flash_attn", "transformer_engine", "deep_ep", "nccl", "peft", "accelerate"}
#: Other imports inside functions: (module, imported module) -> the reason.
LATE = {
    ("moefx", "moefx.*"): "public names are imported when they are first used",
    ("moefx.cli", "moefx.*"): "help, version and the doctor answer without torch",
    ("moefx.cli.*", "moefx.*"): "a subcommand imports what it runs",
    ("moefx.backends", "moefx.backends.*"): "tables of the built-in backends, read when backends are first listed",
    ("moefx.kernels.attention", "moefx.kernels.flash_attention_4"): "by FlashAttention 4, an optional package, where that pays",
    ("moefx.analysis.report", "moefx.analysis.*"): "costs, diagrams and timelines are made when a report is asked for them",
}
#: Public functions whose docstrings do not yet describe their arguments, or what they raise.
WITHOUT_ARGS = {
    "restore", "clip_grad_norm_", "save_checkpoint", "load_checkpoint", "watch_ranks", "report", "explain", "verify",
    "rewrite", "op", "resolve",
}  # fmt: skip
WITHOUT_RAISES = {"clip_grad_norm_", "explain"}
WITHOUT_DOCSTRING = {"Verification.raise_if_wrong"}


def _modules() -> dict[str, Path]:
    found = {}
    files = [p.relative_to(ROOT) for p in (ROOT / "moefx").rglob("*.py") if "passes" not in p.parts]  # a link
    files += [Path("moefx", p.relative_to(ROOT)) for p in (ROOT / "passes").rglob("*.py")]
    for path in sorted(files):
        parts = path.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ROOT / path
    return found


MODULES = _modules()


@dataclass(frozen=True)
class Import:
    """One name that ``module`` imports; ``function`` is the innermost function around it, if there is one."""

    module: str
    imported: str
    function: str | None
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.imported}" + (f" in {self.function}" if self.function else "")


def imports(name: str) -> Iterator[Import]:
    """All imports of a module, but those for type checkers."""

    def visit(nodes: list[ast.stmt], function: str | None) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from visit(node.orelse, function)
                continue
            if isinstance(node, ast.Import):
                yield from (Import(name, a.name, function, node.lineno) for a in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (Import(name, t, function, node.lineno) for t in _targets(name, node))
            inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            for _, value in ast.iter_fields(node):
                if isinstance(value, list):
                    statements = [
                        s for v in value for s in (v.body if isinstance(v, (ast.ExceptHandler, ast.match_case)) else [v])
                    ]
                    yield from visit([s for s in statements if isinstance(s, ast.stmt)], inner)

    yield from visit(ast.parse(MODULES[name].read_text(encoding="utf-8")).body, None)


def _targets(name: str, node: ast.ImportFrom) -> set[str]:
    """The modules that a ``from ... import`` names: the submodule where there is one, else the module that holds the name."""
    base = node.module or ""
    if node.level:
        package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}


IMPORTS = [i for name in MODULES for i in imports(name)]


def test_the_layers_of_the_house():
    """What `make lint` checks: a file imports from its own layer and from those below."""
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_import_cycles():
    """Strongly connected components of the imports at module level (Tarjan's algorithm); a package's __init__ is a module too."""
    graph = {m: {i.imported for i in IMPORTS if i.module == m and not i.function} & MODULES.keys() - {m} for m in MODULES}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                cycles.append(stack[at:])
            del stack[at:]

    for module in graph:
        if module not in index:
            visit(module)
    assert cycles == []


def test_imports_inside_functions_have_a_reason():
    """Those of moefx's own modules: for an optional or heavy package that the imported module needs, or listed in LATE."""
    top = {m: {i.imported for i in IMPORTS if i.module == m and not i.function} for m in MODULES}

    def needs_optional(module: str, seen: set[str]) -> bool:
        seen.add(module)
        return any(
            t.split(".")[0] in OPTIONAL_OR_HEAVY or (t in MODULES and t not in seen and needs_optional(t, seen))
            for t in top.get(module, ())
        )

    late = [i for i in IMPORTS if i.function and i.imported.split(".")[0] == "moefx"]
    without = [i for i in late if not any(fnmatch(i.module, a) and fnmatch(i.imported, b) for a, b in LATE)]
    assert [str(i) for i in without if not needs_optional(i.imported, set())] == []


_EACH_ALONE = """
import contextlib, gc, importlib, os, sys, traceback
names, others = (a.split(",") for a in sys.argv[1:])
for name in others:  # what they all share, once
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not [m for m in sys.modules if m.startswith("moefx")]
gc.freeze()
for name in names:
    if os.fork() == 0:
        gc.disable()
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_each_package_imports_alone():
    """Each in a process that has imported none of moefx, forked from one that has all other packages. All modules would take half a
    minute; with no cycle among them, an import order can matter only by what packages import when their modules are imported."""
    names = [n for n, path in MODULES.items() if path.name == "__init__.py" or n.count(".") == 1]
    others = {i.imported for i in IMPORTS if not i.function and i.imported.split(".")[0] != "moefx"}
    command = [sys.executable, "-c", _EACH_ALONE, ",".join(names), ",".join(sorted(others))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_no_name_hides_a_module():
    """``import moefx.ops.norm as n`` must give the module, not a function that the package exports under its name."""
    for name in MODULES:
        if not name.endswith("__main__"):
            assert isinstance(importlib.import_module(name), ModuleType)
    hidden = []
    for name in MODULES:
        package, _, attribute = name.rpartition(".")
        if package and not name.endswith("__main__"):
            found = getattr(importlib.import_module(package), attribute, None)
            hidden += [] if found is None or found is sys.modules[name] else [name]
    assert hidden == []


PUBLIC = {n: o for n in moefx.__all__ if not isinstance(o := getattr(moefx, n), ModuleType)}
FUNCTIONS = [n for n, o in PUBLIC.items() if inspect.isfunction(o)]


def test_public_names_have_docstrings():
    """Functions, classes, and the public methods that a class defines."""
    methods = {
        f"{n}.{m}": f
        for n, o in PUBLIC.items()
        if inspect.isclass(o)
        for m, f in vars(o).items()
        if inspect.isfunction(f) and not m.startswith("_")
    }
    assert {n for n, o in {**PUBLIC, **methods}.items() if not (o.__doc__ or "").strip()} - WITHOUT_DOCSTRING == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_describe_arguments_and_errors(name):
    function = inspect.unwrap(PUBLIC[name])
    doc = inspect.getdoc(function) or ""
    described = doc.partition("Args:")[2].partition("Returns:")[0].partition("Raises:")[0]
    if name not in WITHOUT_ARGS:
        assert [
            p for p in inspect.signature(function).parameters if f"{p}:" not in described and f"{p} (" not in described
        ] == []
    body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(n, ast.Raise) for n in ast.walk(body)) and name not in WITHOUT_RAISES:
        assert "Raises:" in doc


def test_every_pass_has_a_test_file_of_its_name():
    passes = {p.stem for p in (ROOT / "passes").glob("*.py")} - {"__init__"}
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests/passes").glob("test_*.py")}
    assert passes == tested
