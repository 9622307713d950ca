"""A training loop that is the same for one process and many; prints one line of losses and norms.

python tests/flows/one_script.py
torchrun --standalone --nproc-per-node 1 tests/flows/one_script.py
torchrun --standalone --nproc-per-node 2 tests/flows/one_script.py --ep-size 2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import moefx
from tests.support.families import batch, build

ROWS = 4  #: of a micro-batch of all ranks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep-size", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def mean(loss: torch.Tensor) -> float:
        loss = loss.detach().clone()
        if world > 1:
            dist.all_reduce(loss)
        return float(loss) / world

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[str]:
        lines = []
        for step in steps:
            total = 0.0
            for i in range(2):
                model.set_requires_gradient_sync(i == 1)
                rows = {k: v[rank::world] for k, v in batch(ROWS, 8, seed=10 * step + i).items()}
                loss = model(**rows).loss / 2
                loss.backward()
                total += mean(loss)
            norm = float(moefx.clip_grad_norm_(model, 1.0))
            optimizer.step()
            optimizer.zero_grad()
            lines.append(f"{total:.4f} {norm:.3f}")
        return lines

    def start(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = moefx.parallelize(build("qwen3_moe", seed=seed), ep_size=args.ep_size, compile=False)
        blocks = list(model.model.layers)
        blocks[0].set_modules_to_forward_prefetch(blocks[1:])
        blocks[-1].set_reshard_after_forward(False)
        model.unshard()
        model.reshard()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    model, optimizer = start(0)
    lines = train(model, optimizer, range(2))
    moefx.save_checkpoint(args.out / "resume", model, optimizer, step=2)
    model, optimizer = start(1)
    first = moefx.load_checkpoint(args.out / "resume", model, optimizer)["step"]
    lines += train(model, optimizer, range(first, 4))
    model.save_pretrained(args.out / "model")
    if rank == 0:
        print("losses and norms:", *lines, sep="\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
