"""A training loop with Accelerate, which prepares optimizer, scheduler and data; the model is sharded by moefx.

accelerate launch examples/accelerate_loop.py                          # one process
accelerate launch --multi_gpu --num_processes 8 examples/accelerate_loop.py        # without GPUs too: gloo ranks
torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py   # the same
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

sys.path.insert(0, str(Path(__file__).parent))
from bytes_data import batches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=6)
args = parser.parse_args()

# creates the process group; the loader's batches are global, split across the ranks, and the scheduler advances once per step
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=DataLoaderConfiguration(split_batches=True))
ranks = accelerator.num_processes
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
model = AutoModelForCausalLM.from_config(config).to(accelerator.device)
model = moefx.parallelize(model, ep_size=ranks, compile=False)

rows = [{k: v[0] for k, v in b.items()} for b, _ in zip(batches(1, 64), range(4 * args.steps))]
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=args.steps)
loader = DataLoader(rows, batch_size=4)
optimizer, scheduler, loader = accelerator.prepare(optimizer, scheduler, loader)  # not the model

for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    norm = moefx.clip_grad_norm_(model, 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean'):.4f}  norm {norm:.4f}")
accelerator.end_training()
