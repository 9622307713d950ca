"""Does training over ranks give the curve of one process? A Qwen3-MoE of a billion parameters, both ways, in one run.

    torchrun --standalone --nproc-per-node 4 benchmarks/train_parity.py             # NCCL, one or more GPUs; 45 GiB in all
    torchrun --standalone --nproc-per-node 2 benchmarks/train_parity.py --hidden 64 --layers 2 --intermediate 32 --device cpu --steps 5

First rank 0 trains Transformers' own model on the global batch while the others wait; then all ranks train
``moefx.parallelize(model, ep_size=ranks)`` on their parts of the same batches. AdamW, real text byte by byte, fp32 by default.
The model is wide rather than deep: ranks that share a GPU wait for one another in each of a layer's collectives.

Top-k routing is discontinuous, so two runs that differ by rounding drift apart: how far is measured, by a control, the same one
process from weights that are off by one rounding. Exit code 1 if the ranks' curve is ``--allowed`` times farther from the first
than the control's is (largest difference up to each step, and 1e-5 nats in any case). The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import common
import ranks as ranks_
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bytes_data import batches


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=1536, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences of all ranks together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--allowed", type=float, default=4.0, help="times the control's distance")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64,
        head_dim=32,
        intermediate_size=4 * args.hidden,
        norm_topk_prob=True,
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=4,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model.to(device).train()


def train(args: argparse.Namespace, model: Any, device: torch.device, rank: int, ranks: int) -> tuple[list[float], float]:
    """The loss of each step (mean over ranks), and seconds of a step after the first five."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-5)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    data, losses, started = batches(args.batch, args.seq, rank=rank, ranks=ranks), [], 0.0
    for step in range(args.steps):
        if step == min(5, args.steps - 1):
            common.synchronize(device)
            started = time.perf_counter()
        loss = model(**{k: v.to(device) for k, v in next(data).items()}, use_cache=False).loss
        loss.backward()
        moefx.clip_grad_norm_(model, 1.0)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        value = loss.detach().float().clone()
        if ranks > 1:
            dist.all_reduce(value)
        losses.append(float(value) / ranks)
        if rank == 0 and step % 10 == 0:
            common.say(f"step {step}: loss {losses[-1]:.5f}")
    common.synchronize(device)
    return losses, (time.perf_counter() - started) / max(1, args.steps - 5)


def main() -> int:
    args = arguments()
    rank, ranks, device = ranks_.start(args.device)
    torch.set_float32_matmul_precision("highest")
    one: dict[str, Any] = {}
    if rank == 0:
        for name in ("losses", "control"):
            model = build(args, device)
            if name == "control":
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1 + torch.finfo(p.dtype).eps)
            one["parameters"] = sum(p.numel() for p in model.parameters())
            common.say(f"{name} of one process: {one['parameters'] / 1e9:.2f}e9 parameters, {args.dtype}")
            one[name], one["seconds"] = train(args, model, device, 0, 1)
            del model
            common.free(device)
    one = ranks_.from_first(one)
    model = moefx.parallelize(build(args, device), ep_size=ranks, compile=args.compile)
    if rank == 0:
        common.say(f"{ranks} ranks, ep_size={ranks}")
    losses, seconds = train(args, model, device, rank, ranks)
    code = 0
    if rank == 0:
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
        where = common.slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu"
        common.save(
            f"train_parity-ep{ranks}-{args.dtype}-{where}",
            {
                "machine": common.machine(device),
                "gpus": torch.cuda.device_count(),
                "settings": vars(args),
                "ranks": ranks,
                "one_process": one,
                "over_ranks": {"losses": losses, "seconds": seconds},
                "largest_difference": max(far),
                "control": max(control),
                "problems": problems,
            },
        )
        code = common.verdict(problems)
    code = ranks_.from_first(code)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
