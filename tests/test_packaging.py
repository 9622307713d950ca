"""What `pip install .` installs: every module under its name, and the command."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moefx
from moefx.options import Options

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed project and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    for part in ("moefx", "passes"):
        shutil.copytree(ROOT / part, folder / "source" / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / part, folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(folder / "source")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_every_module_is_installed(installed):
    wanted = {p.relative_to(ROOT) for p in (ROOT / "moefx").rglob("*.py")}
    wanted |= {Path("moefx") / p.relative_to(ROOT) for p in (ROOT / "passes").rglob("*.py")}
    assert {p.relative_to(installed) for p in (installed / "moefx").rglob("*.py")} == wanted


def test_data_files_are_installed(installed):
    wanted = {"py.typed", *(f"backends/tuned/{p.name}" for p in (ROOT / "moefx/backends/tuned").glob("*.json"))}
    assert len(wanted) > 1
    assert [name for name in wanted if not (installed / "moefx" / name).is_file()] == []


def test_the_command_runs(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [installed / "bin" / "moefx", "doctor", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {r["what"]: r["state"] for r in json.loads(done.stdout)}
    assert rows["moefx"].endswith(str(installed / "moefx")) and rows["backend torch"] == "usable"


def test_optimize_takes_what_options_hold():
    """Each option stands in the signature that people read, and in the dataclass that is handed on."""
    taken = {n: p.default for n, p in inspect.signature(moefx.optimize).parameters.items() if n != "model"}
    assert taken == {f.name: f.default for f in dataclasses.fields(Options)}
