"""Plain PyTorch training with expert parallelism: optimize, then DDP for the dense parameters, then a plain loop.

python examples/train_ep.py                                        # one process
torchrun --standalone --nproc-per-node 2 examples/train_ep.py      # two ranks, half of the experts each
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import trange
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

sys.path.insert(0, str(Path(__file__).parent))
from bytes_data import batches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--compile", action="store_true", help="compile the rewritten blocks (a minute on a CPU)")
args = parser.parse_args()

ranks = int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank = dist.get_rank() if ranks > 1 else 0

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_experts=8,
    num_experts_per_tok=2,
)
model = AutoModelForCausalLM.from_config(config).train()
if ranks == 1 and torch.cuda.is_available():
    model.cuda()
model = moefx.optimize(model, ep_size=ranks, compile=args.compile)  # over ranks: on the GPU of LOCAL_RANK
if rank == 0:
    print(moefx.report(model))

# DDP averages the dense gradients; optimize has marked the experts' parameters, which DDP skips and moefx averages
step_model = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # after optimize: the experts' parameters are DTensors now
data = batches(8, 64, rank=rank, ranks=ranks)
for _ in (steps := trange(args.steps, disable=rank > 0)):
    batch = {k: v.to(model.device) for k, v in next(data).items()}
    loss = step_model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    steps.set_postfix(loss=f"{loss.item():.3f}")
if rank == 0:
    print(f"last loss {loss.item():.3f}")
if ranks > 1:
    dist.destroy_process_group()
