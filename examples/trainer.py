"""Hugging Face's Trainer over ranks: gradient accumulation, evaluation, load metrics, checkpoints, resuming.

python examples/trainer.py                                     # one process, moefx.optimize
torchrun --standalone --nproc-per-node 2 examples/trainer.py   # two ranks, moefx.parallelize: FSDP2, half of the experts each
accelerate launch --multi_gpu --num_processes 2 examples/trainer.py    # the same

All print the same losses: the global batch is the same. --resume continues from the last complete checkpoint in
--out, whatever number of ranks wrote it.
"""

import argparse
import os
import sys
from pathlib import Path

if "WORLD_SIZE" not in os.environ:  # one process trains on one GPU: with several visible, the Trainer would use nn.DataParallel
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, TrainingArguments

import moefx
from moefx.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from bytes_data import batches

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="trainer-out")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...: logs the experts' load too")
parser.add_argument("--deterministic", action="store_true", help="two runs are bitwise equal")
args = parser.parse_args()

ranks = int(os.environ.get("WORLD_SIZE", 1))
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
model = AutoModelForCausalLM.from_config(config)
model = moefx.parallelize(model, ep_size=ranks, compile=False)

rows = [{k: v[0] for k, v in b.items()} for b, _ in zip(batches(1, 64), range(64))]
arguments = TrainingArguments(
    args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4 // ranks,
    gradient_accumulation_steps=3,
    learning_rate=2e-3,
    adam_epsilon=1e-5,
    lr_scheduler_type="constant",
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="steps",
    save_steps=2,
    report_to=args.report_to,
    full_determinism=args.deterministic,
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(model, arguments, train_dataset=rows[:48], eval_dataset=rows[48:])
trainer.train(resume_from_checkpoint=args.resume)
if trainer.is_world_process_zero():
    for name in ("loss", "grad_norm", "eval_loss", "router/max_load"):
        print(name, [round(float(h[name]), 4) for h in trainer.state.log_history if name in h])
if ranks > 1:
    dist.destroy_process_group()
