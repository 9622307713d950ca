"""The site builds without a warning (a broken link is one), and its reference has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import moefx
from moefx import ops, passes
from moefx.cli import main
from moefx.ir.graph import op_name

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def documented(site) -> set[str]:
    """The names that the reference has, as other projects' documentation would link to them."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(inventory).decode().splitlines()}


def test_the_reference_has_every_public_name(documented):
    wanted = {f"moefx.{name}" for name in moefx.__all__ if name != "passes"}
    wanted |= {f"moefx.passes.{name}" for name in passes.__all__ if name not in moefx.__all__}
    wanted |= {f"moefx.trainer.{name}" for name in ("Trainer", "TrainerMixin", "RouterBias")}
    assert wanted - documented == set()


def test_the_reference_has_every_operation(site):
    page = (site / "reference/operations/index.html").read_text()
    headings = set(re.findall(r"<h2[^>]*>\s*(?:<[^>]+>\s*)*(\w+)", page))
    own = [op for op, body in ops.BODIES.items() if body.__module__.startswith("moefx")]  # other tests define some too
    wanted = {op_name(op).split(".")[1] for op in own} | {"dispatch", "combine", "grouped_mlp"}
    assert wanted - headings == set()


@pytest.mark.parametrize("command", ["inspect", "models", "doctor"])
def test_the_reference_has_every_option(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    page = (ROOT / "docs/reference/cli.md").read_text()
    section = page.split(f"## moefx {command}")[1].split("\n## ")[0]
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))


def test_the_reference_has_every_environment_variable():
    source = "".join(p.read_text() for p in [*(ROOT / "moefx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
    page = (ROOT / "docs/reference/environment.md").read_text()
    assert set(re.findall(r'"(MOEFX_[A-Z_]+)"', source)) == set(re.findall(r"^\| `(MOEFX_[A-Z_]+)`", page, re.MULTILINE))
