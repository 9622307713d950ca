"""Does training over ranks give the curve of one process? A Qwen3-MoE of a billion parameters, both ways, in one run.

    torchrun --nproc-per-node 4 benchmarks/train_parity.py                     # GPUs (NCCL_MULTI_RANK_GPU_ENABLE=1: one GPU)
    torchrun --nproc-per-node 2 benchmarks/train_parity.py --hidden 64 --layers 2 --intermediate 32 --device cpu --steps 5

First rank 0 trains Transformers' own model on the global batch while the others wait; then all ranks train
``moefx.parallelize(model, ep_size=ranks)`` on their parts of the same batches. AdamW, real text byte by byte, fp32 by default.

Top-k routing is discontinuous, so two runs that differ by rounding drift apart: how far is measured, by a control, the same one
process from weights that are off by one rounding. Exit code 1 if the ranks' curve is ``--allowed`` times farther from the first
than the control's is (largest difference up to each step, and 1e-5 nats in any case). The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bytes_data import batches  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--intermediate", type=int, default=768, help="of an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences of all ranks together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--allowed", type=float, default=4.0, help="times the control's distance")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64, head_dim=32, intermediate_size=4 * args.hidden, norm_topk_prob=True,
        moe_intermediate_size=args.intermediate, num_experts=args.experts, num_experts_per_tok=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).train()


def train(args: argparse.Namespace, model: Any, rank: int, ranks: int) -> tuple[list[float], float]:
    """The loss of each step (mean over ranks), and seconds of a step after the first five."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-5)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    data, losses, started = batches(args.batch, args.seq, rank=rank, ranks=ranks), [], 0.0
    for step in range(args.steps):
        if step == min(5, args.steps - 1):
            common.synchronize(torch.device(args.device))
            started = time.perf_counter()
        loss = model(**{k: v.to(args.device) for k, v in next(data).items()}, use_cache=False).loss
        loss.backward()
        moefx.clip_grad_norm_(model, 1.0)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        value = loss.detach().float().clone()
        if ranks > 1:
            dist.all_reduce(value)
        losses.append(float(value) / ranks)
    common.synchronize(torch.device(args.device))
    return losses, (time.perf_counter() - started) / max(1, args.steps - 5)


def main() -> int:
    args = arguments()
    cuda = args.device.startswith("cuda")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=20))
    alone: list[Any] = [None]
    if rank == 0:
        model = build(args).to(args.device)
        parameters = sum(p.numel() for p in model.parameters())
        common.say(f"{parameters / 1e9:.2f}e9 parameters, {args.dtype}; one process first")
        losses, seconds = train(args, model, 0, 1)
        del model
        common.free(torch.device(args.device))
        model = build(args).to(args.device)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps)
        control, _ = train(args, model, 0, 1)
        alone = [{"losses": losses, "seconds": seconds, "parameters": parameters, "control": control}]
        del model
        common.free(torch.device(args.device))
    dist.broadcast_object_list(alone, device=torch.device(args.device))
    model = build(args).to(args.device)
    model = moefx.parallelize(model, ep_size=ranks, compile=args.compile)
    losses, seconds = train(args, model, rank, ranks)
    code = 0
    if rank == 0:
        one = alone[0]
        far, control = ([abs(a - b) for a, b in zip(one["losses"], other)] for other in (losses, one["control"]))
        rows = [
            (i, f"{one['losses'][i]:.5f}", f"{losses[i]:.5f}", f"{far[i]:.1e}", f"{control[i]:.1e}")
            for i in range(0, args.steps, 5)
        ]
        columns = ("step", "one process", f"{ranks} ranks", "difference", "control's")
        common.show(f"loss, {args.dtype}, ep_size={ranks}", columns, rows)
        problems = []
        for i in range(args.steps):
            most = args.allowed * max(control[: i + 1]) + 1e-5
            if not far[i] <= most:
                problems.append(f"step {i}: the losses differ by {far[i]:.1e}, {most:.1e} allowed")
        if moefx.report(model).fallbacks:
            problems.append(f"original forwards ran: {moefx.report(model).fallbacks}")
        where = common.slug(torch.cuda.get_device_name()) if cuda else "cpu"
        common.save(f"train_parity-ep{ranks}-{args.dtype}-{where}", {
            "machine": common.machine(torch.device(args.device)), "settings": vars(args), "ranks": ranks, "one_process": one,
            "over_ranks": {"losses": losses, "seconds": seconds}, "largest_difference": max(far), "control": max(control), "problems": problems,
        })  # fmt: skip
        code = common.verdict(problems)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
