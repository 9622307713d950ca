"""Which modules a fresh process has imported after ``import moefx``, and after the command line's quick answers."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import moefx

HEAVY = {"torch", "transformers", "sympy", "triton", "numpy", "accelerate", "rich", "tqdm"}


def imported(code: str) -> set[str]:
    """The modules that a fresh process has imported after ``code``."""
    listing = "import sys\n{}\nprint('MODULES', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing.format(code)], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def heavy(modules: set[str]) -> set[str]:
    return {m.partition(".")[0] for m in modules} & HEAVY


def test_import_moefx_loads_nothing_heavy():
    found = imported("import moefx")
    assert heavy(found) == set() and {m for m in found if m.startswith("moefx.")} == set()


def test_import_moefx_adds_nothing_to_torch_and_transformers():
    assert imported("import torch, transformers, moefx") - imported("import torch, transformers") == {"moefx"}


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_quick_answers_of_the_command_line_load_nothing_heavy(flag):
    code = f"from moefx.cli import main\ntry:\n    main(['{flag}'])\nexcept SystemExit as end:\n    assert end.code == 0"
    assert heavy(imported(code)) == set()


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("moefx.cli").main(["--version"])
    said = capsys.readouterr().out
    for package in ("torch", "transformers"):
        assert f"{package} {importlib.metadata.version(package)}" in said
    assert said.startswith(f"moefx {moefx.__version__} (")


def test_type_checkers_and_programs_see_the_same_names():
    """The imports under TYPE_CHECKING, the table of lazy imports and ``__all__`` agree."""
    tree = ast.parse(Path(moefx.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        typed |= {a.asname or a.name: (statement.module, a.name) for a in statement.names}
    assert typed.pop("passes") == ("moefx", "passes")
    assert typed == moefx._SOURCES
    assert {*typed, "passes"} == set(moefx.__all__)


def test_lazy_names_are_those_of_their_modules():
    for name, (module, attribute) in moefx._SOURCES.items():
        assert getattr(moefx, name) is getattr(importlib.import_module(module), attribute)
    namespace = {}
    exec("from moefx import *", namespace)
    assert set(moefx.__all__) <= set(namespace) and set(moefx.__all__) <= set(dir(moefx))
    with pytest.raises(AttributeError, match="module 'moefx' has no attribute 'optimise'"):
        moefx.optimise  # noqa: B018
