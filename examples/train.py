"""A plain PyTorch loop, the reference of the other examples: accumulation, clipping, evaluation, checkpoints, resuming.

python examples/train.py                                                  # one process
torchrun --standalone --nproc-per-node 2 examples/train.py --ep-size 2    # two ranks: FSDP2, half of the experts each
torchrun --standalone --nproc-per-node 4 examples/train.py --ep-size 2 --dp-replicate 2 --resume

All print the same losses: the global batch is the same. --resume continues from the checkpoint in --out, whatever
number of ranks wrote it, or starts if there is none. Plain Transformers reads the model in --out.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

sys.path.insert(0, str(Path(__file__).parent))
from bytes_data import batches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="a folder, of which each rank reads its own shards (default: a small model)")
parser.add_argument("--out", type=Path, default=Path("train-out"))
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--save-every", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch of all ranks")
parser.add_argument("--sequence", type=int, default=64)
parser.add_argument("--ep-size", type=int, default=1)
parser.add_argument("--dp-replicate", type=int, default=1)
parser.add_argument("--compile", action="store_true", help="compile the rewritten blocks (a minute on a CPU)")
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
)
model = args.model or AutoModelForCausalLM.from_config(config)  # goes to the GPU of LOCAL_RANK
model = moefx.parallelize(model, ep_size=args.ep_size, dp_replicate=args.dp_replicate, compile=args.compile)
device = next(model.parameters()).device
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5)  # after moefx: the parameters are new objects


def mean(loss: torch.Tensor) -> float:
    """The mean over all ranks."""
    loss = loss.detach().clone()
    if ranks > 1:
        dist.all_reduce(loss)
    return loss.item() / ranks


def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{k: v.to(device) for k, v in batch.items()}).loss


def evaluate() -> float:
    model.eval()
    with torch.no_grad():
        loss = loss_of(next(batches(8, args.sequence, rank=rank, ranks=ranks, seed=1)))
    model.train()
    return mean(loss)


first, data = 0, batches(args.batch, args.sequence, rank=rank, ranks=ranks)
if args.resume and (args.out / "resume").exists():
    first = moefx.load_checkpoint(args.out / "resume", model, optimizer)["step"]
    for _ in range(first * args.accumulate):
        next(data)  # skip what the interrupted run has trained on
for step in range(first + 1, args.steps + 1):
    total = 0.0
    for i in range(args.accumulate):
        model.set_requires_gradient_sync(i == args.accumulate - 1)  # in one process: no effect
        loss = loss_of(next(data)) / args.accumulate
        loss.backward()
        total += mean(loss)
    norm = moefx.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"loss {step} {total:.4f}  norm {norm:.4f}", flush=True)
    if step % args.save_every == 0:
        moefx.save_checkpoint(args.out / "resume", model, optimizer, step=step)
        held_out = evaluate()
        if rank == 0:
            print(f"eval_loss {step} {held_out:.4f}", flush=True)
model.save_pretrained(args.out)
if ranks > 1:
    dist.destroy_process_group()
