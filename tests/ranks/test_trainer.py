"""The Trainer's callbacks over ranks: the bias that balances experts, and the load in the log, are those of one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from spawn import run


def start():
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))


def balanced(rank, world, folder):
    """Four steps of two micro-batches; (biases by name, what was logged)."""
    start()
    from transformers import TrainingArguments

    import moefx
    from moefx.trainer import RouterBias, Trainer
    from tests.families import batch, build

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    model = build("deepseek_v3")
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[3] = 0.3  # everybody goes to expert 3
    options = {"compile": False, "strict": True}
    model = moefx.parallelize(model, ep_size=world, **options) if world > 1 else moefx.optimize(model, **options)
    rows = [{k: v[0] for k, v in batch(1, 32, seed=s).items()} for s in range(32)]
    arguments = TrainingArguments(
        f"{folder}/{world}", max_steps=4, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, learning_rate=1e-4,
        logging_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RouterBias(5e-2)])
    trainer.train()
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    return biases, [{k: v for k, v in h.items() if k.startswith("router/")} for h in trainer.state.log_history if "loss" in h]


def test_one_process_and_two_ranks(tmp_path):
    ((one, logged),) = run(balanced, 1, str(tmp_path), timeout=200)
    ranks = run(balanced, 2, str(tmp_path), timeout=200)
    assert len(one) == 2 and len(logged) == 2 and set(logged[0]) == {"router/max_load", "router/entropy", "router/dropped"}
    for biases, log in ranks:
        assert all(torch.equal(b, one[n]) for n, b in biases.items())
        assert log == logged
    for bias in one.values():
        assert abs(float(bias[3]) - 0.1) < 1e-6  # down in each of the four steps
    assert logged[1]["router/max_load"] < logged[0]["router/max_load"]


def twice(rank, world):
    """Two runs of three steps under PyTorch's switch, over ep and FSDP; what differs in a bit."""
    start()
    import moefx
    from tests.families import batch, build

    torch.use_deterministic_algorithms(True)
    states = []
    for _ in range(2):
        model = moefx.parallelize(build("qwen3_moe"), ep_size=2, compile=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            model(**batch(2, 17 + rank, seed=10 * step + rank)).loss.backward()
            moefx.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        states.append({n: p.detach().to_local().clone() for n, p in model.named_parameters()})
    return [n for n, t in states[0].items() if not torch.equal(t, states[1][n])]


def test_two_runs_are_bitwise_equal():
    assert run(twice, 4, timeout=300) == [[]] * 4
