"""The demo: a small Qwen3-MoE learns real text byte by byte, with Transformers in one process and with moefx over 2 ranks.

    python examples/quickstart.py            # or: make demo

(1) trains the original Transformers model, on the GPU if there is one, (2) trains ``moefx.optimize(model, ep_size=2)`` under
torchrun with two ranks, on GPUs if there are two, else on the CPU, the same global batch and order, (3) prints the rewrite
report, both loss curves side by side and tokens/s. Exits with 1 if a loss differs by more than 1e-4 or the last one is not
below 3.0 nats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from bytes_data import batches

RANKS, BATCH, SEQUENCE = 2, 8, 128
ALLOWED, GOAL = 1e-4, 3.0


def build() -> Any:
    """A Qwen3-MoE of 5 million parameters: 4 layers, 8 experts of which a byte visits 2."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).train()


def train(model: Any, steps: int, rank: int, ranks: int, name: str) -> dict[str, Any]:
    """Trains with AdamW; a loss is the mean over the ranks. The first two steps (compilation) are not timed.

    Top-2 routing is discontinuous: a rounding difference can change the expert of a byte, after which two runs diverge. Small
    learning rates for inner layers, and an epsilon above the rounding error of gradients, avoid that for 32 steps.
    """
    outer = {id(p) for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in outer) == o], "lr": lr}
        for o, lr in ((True, 1e-2), (False, 5e-4))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    data = batches(BATCH, SEQUENCE, rank=rank, ranks=ranks)
    losses, started, device = [], 0.0, next(model.parameters()).device
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as progress:
        task = progress.add_task(name, total=steps)
        for step in range(steps):
            if step == 2:
                started = time.perf_counter()
            batch = {k: v.to(device) for k, v in next(data).items()}
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            value = loss.detach().clone()
            if ranks > 1:
                dist.all_reduce(value)
            losses.append(float(value) / ranks)
            progress.update(task, advance=1, description=f"{name}  loss {losses[-1]:.3f}")
    seconds = time.perf_counter() - started
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"losses": losses, "tokens_per_second": (steps - 2) * BATCH * SEQUENCE / seconds, "device": name}


def rewritten(steps: int, compile: bool, out: Path) -> None:
    """What each rank runs: optimize, DDP for the dense parameters, train."""
    import moefx

    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS))
    dist.init_process_group("nccl" if torch.cuda.device_count() >= RANKS else "gloo")
    rank = dist.get_rank()
    model = moefx.optimize(build(), ep_size=RANKS, compile=compile, strict=True)
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # skips the experts: optimize has marked their parameters
    result = train(parallel, steps, rank, RANKS, f"moefx, {RANKS} ranks    ")
    if rank == 0:
        report = moefx.report(model)
        (out / "report.txt").write_text(f"{report}\n{report.cost()}\n{report.program}")
        (out / "moefx.json").write_text(json.dumps(result | {"report": str(report)}))
    dist.destroy_process_group()


def show(hf: dict, ours: dict, out: Path) -> int:
    """Prints the report and both curves; returns the exit code."""
    console = Console(width=100)
    console.print(ours["report"], markup=False, highlight=False)
    gaps = [abs(a - b) for a, b in zip(hf["losses"], ours["losses"], strict=True)]
    table = Table("step", "Transformers", f"moefx, {RANKS} ranks", "difference", "", title="loss (nats per byte)")
    for i, (a, b, gap) in enumerate(zip(hf["losses"], ours["losses"], gaps, strict=True)):
        if i % 3 == 0 or i == len(gaps) - 1:
            table.add_row(str(i), f"{a:.5f}", f"{b:.5f}", f"{gap:.1e}", "#" * round(b * 6))
    console.print(table)
    for name, r in (("Transformers, 1 process", hf), (f"moefx, {RANKS} ranks", ours)):
        console.print(f"{name} on {r['device']}: {r['tokens_per_second']:,.0f} tokens/s")
    console.print(f"graphs, costs and every rewrite: {out / 'report.txt'}")
    good = max(gaps) <= ALLOWED and ours["losses"][-1] < GOAL
    console.print(
        f"largest difference {max(gaps):.1e} ({ALLOWED:.0e} allowed), last loss {ours['losses'][-1]:.3f} (goal: below {GOAL}): "
        + ("ok" if good else "FAILED")
    )
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true", help="run the rewritten graphs without torch.compile")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        rewritten(args.steps, not args.no_compile, args.out)
        return 0
    model = build().to("cuda" if torch.cuda.is_available() else "cpu")
    hf = train(model, args.steps, 0, 1, "Transformers, 1 process")
    here = [str(Path(__file__).resolve()), "--steps", str(args.steps), "--out", str(args.out)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        str(RANKS),
        *here,
        *(["--no-compile"] if args.no_compile else []),
    ]
    threads = str(max(1, torch.get_num_threads() // RANKS))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    return show(hf, json.loads((args.out / "moefx.json").read_text()), args.out)


if __name__ == "__main__":
    sys.exit(main())
