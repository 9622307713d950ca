"""The documents' code runs as it stands, and their pictures are what the tool draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from moefx.cli.inspect import inspect

ROOT = Path(__file__).parent.parent.parent


def test_the_code_of_extending_runs(capsys):
    pieces = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(pieces) == 5
    names: dict = {"__name__": "extending"}
    for i, piece in enumerate(pieces):
        exec(compile(piece, f"docs/extending.md, piece {i + 1}", "exec", dont_inherit=True), names)
    said = capsys.readouterr().out
    assert "cap_router_logits: 2 made, 0 missed" in said and "flowchart TB" in said


def test_the_readmes_picture_is_what_the_tool_draws():
    (drawn,) = re.findall(r"^```mermaid\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    report = inspect(Qwen3MoeConfig(), 8)
    assert drawn == report.diagram("Qwen3MoeDecoderLayer", after="expert_parallel")


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))), "benchmarks/README.md"]
)
def test_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text()
    linked = [(ROOT / page).parent / name for name in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [
        ROOT / name
        for name in re.findall(r"`((?:docs|examples|tests|benchmarks|passes|moefx)/[\w/-]+\.(?:py|md|json|png))`", text)
    ]
    assert [str(p) for p in linked + named if not p.exists()] == []
