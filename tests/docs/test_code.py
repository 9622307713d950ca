"""The code of README and docs runs, on small models and over two ranks where it needs several; see tests/support/pages.py."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.families import EXAMPLES
from tests.support.pages import PROGRAMS, blocks, code_of, script
from tests.support.spawn import run_script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(EXAMPLES, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.where) for b in blocks()])
def test_block(block, checkpoint, tmp_path):
    if "cuda_graph(" in block.code:
        pytest.skip("a CUDA graph needs a GPU: tests/gpu/test_readme.py runs it")
    ranks = 2 if block.over_ranks else 1
    (tmp_path / "block.py").write_text(script(block, ranks, "cpu"))
    assert "trained" in run_script(tmp_path / "block.py", [checkpoint, "cpu"], ranks, folder=tmp_path)


@pytest.mark.parametrize("page", PROGRAMS)
def test_program(page, tmp_path):
    (tmp_path / "program.py").write_text("\n".join(code_of(page)))
    run_script(tmp_path / "program.py", [], folder=tmp_path)
