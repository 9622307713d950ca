"""What pages link to and name is there, and their picture is what the tool draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from moefx.cli.inspect import inspect

ROOT = Path(__file__).parent.parent.parent


def test_the_picture_is_what_the_tool_draws():
    *_, drawn = re.findall(r"^```mermaid\n(.*?)^```$", (ROOT / "docs/concepts.md").read_text(), re.DOTALL | re.MULTILINE)
    report = inspect(Qwen3MoeConfig(), 8)
    assert drawn == report.diagram("Qwen3MoeDecoderLayer", after="expert_parallel")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
    ],
)
def test_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text()
    linked = [(ROOT / page).parent / name for name in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [
        ROOT / name
        for name in re.findall(r"`((?:docs|examples|tests|benchmarks|passes|moefx)/[\w/-]+\.(?:py|md|json|png))`", text)
    ]
    assert [str(p) for p in linked + named if not p.exists()] == []
