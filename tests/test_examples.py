"""The examples run as they stand."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "command,text",
    [
        (["examples/inspect_graph.py"], "moefx.route"),
        (["examples/custom_pass.py"], "gated_linear: 2 made, 0 missed"),
        (["examples/custom_backend.py"], "four lines of my own"),
        ([*TORCHRUN, "examples/train_ep.py", "--steps", "3"], "last loss"),
        (["examples/quickstart.py", "--steps", "32", "--no-compile", "--out", "{tmp}"], "as it should be"),
    ],
    ids=["inspect_graph", "custom_pass", "custom_backend", "train_ep", "quickstart"],
)  # fmt: skip
def test_example(command, text, tmp_path):
    done = subprocess.run(
        [sys.executable, *(a.format(tmp=tmp_path) for a in command)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert text in done.stdout


def run(tmp_path, *command):
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("loss", "grad_norm", "eval_loss", "router"))]


def test_trainer(tmp_path):
    """One process and two ranks agree; two ranks go on from where one process stopped."""
    one, example = run(tmp_path, str(ROOT / "examples/trainer.py"), "--out", "one"), str(ROOT / "examples/trainer.py")
    assert [line.split()[0] for line in one] == ["loss", "grad_norm", "eval_loss", "router/max_load"]
    run(tmp_path, example, "--out", "two", "--steps", "4")
    two = run(tmp_path, *TORCHRUN, example, "--out", "two", "--resume")
    assert one == two
    assert (tmp_path / "two/checkpoint-6/model.safetensors").is_file()


def test_accelerate(tmp_path):
    example = str(ROOT / "examples/accelerate_loop.py")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    one = run(tmp_path, *launch, "--dynamo_backend", "no", example, "--steps", "3")
    assert len(one) == 3
    assert one == run(tmp_path, *TORCHRUN, example, "--steps", "3")


def test_sft(tmp_path):
    """TRL with packing and PEFT: without moefx, and with it over two ranks."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    example = str(ROOT / "examples/sft.py")
    plain = run(tmp_path, example, "--plain", "--out", "plain")
    assert len(plain) == 1 and plain == run(tmp_path, *TORCHRUN, example, "--out", "two")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        logits = [PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / n).eval()(ids).logits for n in ("plain", "two")]
        base = model(ids).logits
    assert torch.allclose(*logits, atol=1e-3) and not torch.allclose(base, logits[0], atol=1e-2)
