"""README, docs and examples on a GPU machine: each command and code block as it is written.

Fresh environment variables, models loaded on the CPU and moved. Over ranks: one on each GPU, or two that share the only one
(NCCL 2.30 and later).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefx.internals import nccl
from tests.support.pages import PROGRAMS, ROOT, Command, blocks, code_of, commands, error_of, script

GPUS = torch.cuda.device_count()
SHARED = GPUS == 1 and nccl.version() >= (2, 30)
RANKS = 4 if SHARED else max(GPUS, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def shell(command: str, folder: Path) -> str:
    """What a new user's shell prints: none of the tests' own variables."""
    ours = (
        "TRITON_",
        "TORCH",
        "MOEFX_",
        "OMP_",
        "PYTEST_",
        "CUDA_VISIBLE_DEVICES",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "NCCL_MULTI",
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    if SHARED and Command("", command).over_ranks:
        env |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_NCHANNELS": "2"}
    for name in ("examples", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=150, env=env)
    if SHARED and "invalid device ordinal" in done.stderr:
        pytest.skip("it calls torch.cuda.set_device(LOCAL_RANK), itself or by accelerate: needs two GPUs")
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-1000:]}\n{error_of(done.stderr)}"
    return done.stdout


def placed(cases: list) -> list:
    """With an id each; those that accelerate starts one after the other: it takes a fixed port."""
    return [pytest.param(c, id=f"{c.where}: {getattr(c, 'text', 'code')}", marks=_group(c)) for c in cases]


def _group(case) -> pytest.MarkDecorator:
    text = getattr(case, "text", "")
    return pytest.mark.xdist_group("accelerate" if text.startswith("accelerate") else case.where + text)


@pytest.mark.parametrize("command", placed(commands()))
def test_command(command, checkpoint, tmp_path):
    text = command.here(RANKS, str(checkpoint))
    if text.startswith("skip: "):
        pytest.skip(text.removeprefix("skip: "))
    shell(text, tmp_path)


@pytest.mark.parametrize("block", placed(blocks()))
def test_code_block(block, checkpoint, tmp_path):
    ranks = RANKS if block.over_ranks else 1
    if ranks == 1 and block.over_ranks:
        pytest.skip("one rank can be had")
    path = tmp_path / "block.py"
    path.write_text(script(block, ranks, "cuda"))
    start = f"torchrun --standalone --nproc-per-node {ranks}" if ranks > 1 else "python"
    assert "trained" in shell(f"{start} {path} {checkpoint} cuda", tmp_path)


@pytest.mark.parametrize("page", PROGRAMS)
def test_program(page, tmp_path):
    (tmp_path / "program.py").write_text("\n".join(code_of(page)))
    shell("python program.py", tmp_path)


@pytest.mark.parametrize("command", ["moefx doctor", "python examples/custom_pass.py", "python examples/train_ep.py --steps 2"])
def test_command_without_a_visible_gpu(command, tmp_path):
    """PyTorch is built for CUDA, and the GPU is hidden: people debug on the CPU of such a machine."""
    shell(f"CUDA_VISIBLE_DEVICES= {command}", tmp_path)
