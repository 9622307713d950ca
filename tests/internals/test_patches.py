"""What moefx replaces in other packages stands in one file a package, with the versions in which it was seen and a symptom."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import moefx
from moefx.internals import torch_patches, transformers_patches
from moefx.internals.patches import Patch

ROOT = Path(moefx.__file__).parent
FILES = {ROOT / "internals" / f"{name}.py" for name in ("patches", "torch_patches", "transformers_patches")}
FOREIGN = {"torch", "transformers", "triton", "peft", "accelerate"}


def imported_from_elsewhere(tree: ast.AST) -> set[str]:
    """The names that a module imports from other packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names if a.name.partition(".")[0] in FOREIGN}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in FOREIGN:
            found |= {a.asname or a.name for a in node.names}
    return found


def root_of(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def replacements(file: Path) -> list[str]:
    """Where a file assigns to an attribute of another package's module or class, or makes a Patch."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    foreign, found = imported_from_elsewhere(tree), []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
        hit = any(isinstance(t, ast.Attribute) and root_of(t) in foreign for t in targets)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            replaces = node.func.id in ("setattr", "delattr") and root_of(node.args[0]) in foreign
            hit = replaces or node.func.id == "Patch"
        if hit:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def test_patches_stand_in_their_files():
    assert [where for file in sorted(ROOT.rglob("*.py")) if file not in FILES for where in replacements(file)] == []
    assert len(replacements(ROOT / "internals" / "torch_patches.py")) >= 3


@pytest.mark.parametrize("module", [torch_patches, transformers_patches])
def test_each_patch_says_where_it_was_seen_and_how_it_breaks(module):
    patches = [v for v in vars(module).values() if isinstance(v, Patch)]
    assert patches
    for patch in patches:
        assert patch.seen.startswith(module.__name__.rpartition(".")[2].removesuffix("_patches")) and patch.symptom
        assert callable(getattr(patch.owner, patch.name))
    for name in ("extend_dtensor", "intercept_attention", "intercept_masks", "distributed_loading"):
        if hasattr(module, name):
            text = inspect.getdoc(getattr(module, name))
            assert "Seen in" in text and "Symptom: " in text
