"""One script trains alike in one process without torchrun, and in one and two that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefx
from tests.support.families import build
from tests.support.spawn import run_script

SCRIPT = Path(__file__).parent / "one_script.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def test_one_script(tmp_path):
    one = run_script(SCRIPT, ["--out", "one", "--ep-size", "1"], folder=tmp_path)
    assert one.startswith("losses and norms:") and len(one.splitlines()) == 5
    assert run_script(SCRIPT, ["--out", "torchrun-1", "--ep-size", "1"], folder=tmp_path, torchrun=True) == one
    command = [sys.executable, *TORCHRUN, "2", str(SCRIPT), "--out", str(tmp_path / "torchrun-2"), "--ep-size", "2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == one
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("one", "torchrun-2")]
    assert all(torch.allclose(t, states[1][n], atol=1e-4) for n, t in states[0].items())


@pytest.mark.parametrize(
    ("sizes", "world_size", "said"),
    [
        (
            {"ep_size": 2},
            None,
            "ep_size=2 needs a process group and none is initialized: start with torchrun --nproc-per-node 2",
        ),
        ({"dp_replicate": 2}, None, "dp_replicate=2 needs a process group"),
        ({}, "2", "WORLD_SIZE=2, but no process group is initialized: call torch.distributed.init_process_group"),
    ],
)
def test_several_ranks_need_a_process_group(sizes, world_size, said, monkeypatch):
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(moefx.MoefxError, match=said):
        moefx.parallelize(build("qwen3_moe"), **sizes)


def test_policies_that_one_process_ignores():
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="ignores mp_policy's param_dtype=torch.bfloat16"):
        model = moefx.parallelize(build("qwen3_moe"), mp_policy=policy, compile=False)
    with pytest.raises(AttributeError, match="set_gradient_divide_factor"):  # it would change gradients
        model.set_gradient_divide_factor(2.0)
