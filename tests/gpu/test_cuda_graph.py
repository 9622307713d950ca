"""Replayed CUDA graphs give the results of the recorded steps: in one process, and over ranks with their collectives."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefx.internals import nccl

ROOT = Path(__file__).parent.parent.parent
STEPS = 8  #: of which WARMUP run eagerly


@pytest.fixture(autouse=True)
def fixed_order():
    """Without cuDNN's attention, whose backward adds in no fixed order (kernels/attention.py): bits may differ between runs."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def batches(count, vocabulary, device, rank=0):
    """Batches of one shape; the number of items differs, as with gradient accumulation."""
    made = []
    for i in range(count):
        ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(100 * rank + i)).to(device)
        made.append({"input_ids": ids, "labels": ids, "num_items_in_batch": 40 + i})
    return made


def train(model, step, given, every=1):
    """Losses, and the weights after: an optimizer's step each ``every`` batches, whose gradients add up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    optimizer.zero_grad()  # an earlier training may have ended between two of its steps
    losses = []
    for i, batch in enumerate(given):
        losses.append(float(step(**batch)))
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().float() for n, p in model.named_parameters()
    }


def plain(model):
    def step(**batch):
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def differ(found, wanted):
    """What is not the same, bit for bit: the kernels are, and batches this small leave no sum whose order is open."""
    wrong = [f"losses {found[0]}, {wanted[0]}"] if found[0] != wanted[0] else []
    return wrong + [
        f"{n}: {float((found[1][n] - w).abs().max()):.1e}" for n, w in wanted[1].items() if not torch.equal(found[1][n], w)
    ]


@pytest.mark.parametrize(
    ("name", "every", "compile"),
    [("qwen3_moe", 1, False), ("qwen3_moe", 2, True), ("deepseek_v3", 2, False), ("gpt_oss", 1, False), ("olmoe", 3, False)],
)
def test_replayed_steps_train_as_others_do(name, every, compile):
    import moefx
    from tests.support.families import build

    # one model for both: a second one may be compiled otherwise, since Inductor chooses among its kernels by timing them
    model = moefx.optimize(build(name).to("cuda", torch.bfloat16), compile=compile)
    start = copy.deepcopy(model.state_dict())
    results = []
    for graph in (False, True):
        model.load_state_dict(start)
        step = moefx.cuda_graph(model) if graph else plain(model)
        results.append(train(model, step, batches(STEPS, model.config.vocab_size, "cuda"), every))
        if graph:
            assert (step.eager, step.replays) == (step.warmup, STEPS - step.warmup)
    assert differ(*results) == []


def test_other_kinds_of_batches_run_as_ever_and_counts_go_on():
    import moefx
    from tests.support.families import build

    model = moefx.optimize(build("qwen3_moe").to("cuda", torch.bfloat16), compile=False)
    moefx.enable_load_tracking(model)
    step, tokens = moefx.cuda_graph(model), 0
    for batch in batches(6, model.config.vocab_size, "cuda"):
        step(**batch)
        step(**{n: t[:, :9] if n != "num_items_in_batch" else t for n, t in batch.items()})
        tokens += 2 * 24 + 2 * 9
        model.zero_grad()
    assert (step.replays, len(step.recorded)) == (3, 1) and step.eager == 3 + 6
    assert {int(n.sum()) for n in moefx.expert_load(model).values()} == {tokens * model.config.num_experts_per_tok}


def test_slices_of_longer_batches_are_recorded():
    """Their strides are not those of the memory that is recorded: code that was compiled for them does not serve it."""
    import moefx
    from tests.support.families import build

    model = moefx.optimize(build("qwen3_moe").to("cuda", torch.bfloat16))
    step = moefx.cuda_graph(model)
    for batch in batches(5, model.config.vocab_size, "cuda"):
        step(**{n: t[:, :17] if n != "num_items_in_batch" else t for n, t in batch.items()})
    assert (step.eager, step.replays) == (step.warmup, 2)


def test_packed_sequences_are_others_in_each_replay():
    import moefx
    from tests.support.families import build

    results = []
    for graph in (False, True):
        model = moefx.optimize(build("qwen3_moe").to("cuda", torch.bfloat16))
        step = moefx.cuda_graph(model) if graph else plain(model)
        given = batches(STEPS, model.config.vocab_size, "cuda")
        for i, batch in enumerate(given):
            rows = [[i + 1, 23 - i], [3 * (i % 4 + 1), 10, 14 - 3 * (i % 4 + 1)]]
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).cuda()
        results.append(train(model, step, given))
    assert step.replays == STEPS - step.warmup and differ(*results) == []


def test_what_would_be_silently_wrong_is_an_error():
    import moefx
    from tests.support.families import build

    model = moefx.optimize(build("qwen3_moe").to("cuda", torch.bfloat16), compile=False)
    step = moefx.cuda_graph(model)
    for batch in batches(5, model.config.vocab_size, "cuda"):
        step(**batch)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with pytest.raises(moefx.MoefxError, match="parameters were moved in memory"):
        step(**batch)


class Waits(torch.nn.Module):
    """Reads a number back, which no recording can."""

    def forward(self, x):
        return x * float(x.sum() > -1e30)


def _record_what_reads_back(_rank):
    import moefx
    from tests.support.families import build

    model = build("qwen3_moe").to("cuda", torch.bfloat16)
    model.model.norm = torch.nn.Sequential(model.model.norm, Waits())
    step = moefx.cuda_graph(moefx.optimize(model, compile=False))
    (batch,) = batches(1, model.config.vocab_size, "cuda")
    with pytest.raises(moefx.MoefxError, match="cannot be recorded as a CUDA graph"):
        for _ in range(5):
            step(**batch)


def test_what_cannot_be_recorded_is_an_error():
    # in a process of its own: after a recording that failed torch 2.11 draws no random numbers ("Offset increment outside graph
    # capture"), and what Transformer Engine kept of the recording's memory is gone
    torch.multiprocessing.spawn(_record_what_reads_back, nprocs=1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainers_steps(tmp_path, accumulation):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    import moefx
    from moefx.trainer import Trainer
    from tests.support.families import build

    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = moefx.optimize(build("qwen3_moe").to("cuda", torch.bfloat16), compile=False)
        rows = [
            {n: t[0] for n, t in b.items() if n != "num_items_in_batch"} for b in batches(16, model.config.vocab_size, "cpu")
        ]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
            adam_epsilon=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            data_seed=0,
        )
        arguments._n_gpu = 1  # of several the Trainer would make copies, by nn.DataParallel
        trainer = Trainer(model, arguments, train_dataset=rows, cuda_graph=graph)
        trainer.train()
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        results.append((losses, {n: p.detach().float() for n, p in model.named_parameters()}))
    assert differ(*results) == []


def job() -> None:
    """One of two ranks: trains twice, the second time with recorded steps, and compares."""
    import torch.distributed as dist

    sys.path.insert(0, str(ROOT))
    import moefx
    from moefx.backends import deepep
    from tests.support.families import build

    torch.backends.cuda.enable_cudnn_sdp(False)  # as in fixed_order
    rank = int(sys.argv[1])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    address = f"tcp://127.0.0.1:{sys.argv[2]}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=rank, world_size=2)
    names = ["triton", "torch", "reference"]
    usable = torch.cuda.device_count() > 1 and deepep.available() is None
    for backends in [names] + [["deepep", *names]] * usable:
        results = []
        for graph in (False, True):
            options = {"ep_size": 2, "dispatch_capacity": 48, "backends": backends, "compile": False}
            model = moefx.parallelize(build("qwen3_moe").to(device, torch.bfloat16), **options)
            step = moefx.cuda_graph(model) if graph else plain(model)
            given = batches(STEPS, model.config.vocab_size, device, rank)
            results.append(train(model, step, given, every=2))
        wrong = differ(*results)
        print(f"{backends[0]}: {wrong or 'ok'}", flush=True)
        assert not wrong
        assert step.replays == STEPS - step.warmup
        model.set_requires_gradient_sync(False)
        with pytest.raises(moefx.MoefxError, match="set_requires_gradient_sync"):
            step(**given[0])
        step.close()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 and (not torch.cuda.is_available() or nccl.version() < (2, 30)),
    reason="needs two GPUs, or NCCL 2.30 for two ranks on one",
)
def test_over_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(r), port], stdout=-1, stderr=subprocess.STDOUT, text=True, env=env) for r in (0, 1)
    ]
    try:
        said = [p.communicate(timeout=170)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(said)[-4000:]


if __name__ == "__main__":
    job()
