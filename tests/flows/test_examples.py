"""The examples run as they stand."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.support.families import EXAMPLES
from tests.support.spawn import run_script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("inspect_graph", "ops.route("),
        ("custom_pass", "gated_linear: 2 made, 0 missed"),
        ("custom_backend", "four lines of my own"),
    ],
)
def test_example(name, text, tmp_path):
    assert text in run_script(ROOT / f"examples/{name}.py", [], folder=tmp_path)


def test_train_ep(tmp_path):
    assert "last loss" in run_script(ROOT / "examples/train_ep.py", ["--steps", "3"], 2, folder=tmp_path)


def test_quickstart(tmp_path):
    """Its ranks are started as a user's; not compiled here: `make demo` and the GPU check do."""
    script = ROOT / "examples/quickstart.py"
    assert ": ok" in run_script(script, ["--steps", "24", "--no-compile", "--out", "demo"], folder=tmp_path)


def started(*command):
    """What it prints, started as a shell starts it."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed(name, folder, *args, ranks=1):
    """The lines of results; run in processes that have imported torch already."""
    text = run_script(ROOT / f"examples/{name}.py", [*args], ranks, folder=folder)
    return [line for line in text.splitlines() if line.startswith(("loss", "grad_norm", "eval_loss", "router"))]


def test_train(tmp_path):
    """The plain loop: one process, and two ranks from whose checkpoint four go on."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(EXAMPLES).save_pretrained(tmp_path / "base")
    one = printed("train", tmp_path, "--model", "base", "--out", "one", "--steps", "4", "--save-every", "2")
    assert [line.split()[0] for line in one] == ["loss", "loss", "eval_loss", "loss", "loss", "eval_loss"]
    options = ("--model", "base", "--out", "many", "--save-every", "2", "--ep-size", "2", "--resume", "--steps")
    two = printed("train", tmp_path, *options, "2", ranks=2)
    assert two + printed("train", tmp_path, *options, "4", "--dp-replicate", "2", ranks=4) == one
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("one", "many")]
    assert all(torch.allclose(t, states[1][n], atol=1e-4) for n, t in states[0].items())


def test_trainer(tmp_path):
    """One process and two ranks agree; two ranks go on from where one process stopped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = printed("trainer", tmp_path, "--out", "one")
    assert [line.split()[0] for line in one] == ["loss", "grad_norm", "eval_loss", "router/max_load"]
    printed("trainer", tmp_path, "--out", "two", "--steps", "4")
    broken = tmp_path / "two/checkpoint-5"  # a save that was interrupted
    broken.mkdir()
    (broken / "model.safetensors.incomplete").write_bytes(b"half")
    options = ("--out", "two", "--resume", "--report-to", "tensorboard", "--deterministic")
    two = printed("trainer", tmp_path, *options, ranks=2)
    assert one == two
    assert (tmp_path / "two/checkpoint-6/model.safetensors").is_file()
    events = EventAccumulator(str(next((tmp_path / "two").rglob("events*")).parent)).Reload()
    seen = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert len(seen["train/loss"]) == len(seen["train/router/entropy"]) == 2 and seen["train/router/dropped"] == [0, 0]


def test_accelerate(tmp_path):
    """Two ranks that ``accelerate launch`` starts, and one process."""
    one = printed("accelerate_loop", tmp_path, "--steps", "3")
    assert len(one) == 3
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    address = ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    two = started(*launch, *address, "examples/accelerate_loop.py", "--steps", "3")
    assert one == [line for line in two.splitlines() if line.startswith("loss")]


def test_sft(tmp_path):
    """TRL with packing and PEFT: without moefx, and with it over two ranks."""
    from peft import PeftModel

    plain = printed("sft", tmp_path, "--plain", "--out", "plain")
    assert len(plain) == 1 and plain == printed("sft", tmp_path, "--out", "two", ranks=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**{**EXAMPLES.to_diff_dict(), "vocab_size": 257})).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        logits = [PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / n).eval()(ids).logits for n in ("plain", "two")]
        base = model(ids).logits
    assert torch.allclose(*logits, atol=1e-3) and not torch.allclose(base, logits[0], atol=1e-2)
