"""TRL's SFTTrainer with packing and PEFT LoRA, on attention and on the experts' fused weights, with and without moefx.

python examples/sft.py --plain                               # Transformers, PEFT and TRL as they are
python examples/sft.py                                       # + moefx.optimize
torchrun --standalone --nproc-per-node 2 examples/sft.py     # + moefx.parallelize: half of the experts on each rank

All print the same losses. The adapter in --out is PEFT's: PeftModel.from_pretrained(model, out) reads it anywhere.
"""

import argparse
import os

if "WORLD_SIZE" not in os.environ:  # one process trains on one GPU: with several visible, the Trainer would use nn.DataParallel
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

import moefx
from moefx.trainer import TrainerMixin

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="sft-out")
parser.add_argument("--plain", action="store_true")
args = parser.parse_args()

ranks = int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, so that nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=257,
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
lora = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
if ranks > 1:
    model = moefx.parallelize(model, ep_size=ranks, compile=False)
elif not args.plain:
    model = moefx.optimize(model, compile=False)


class Trainer(TrainerMixin, SFTTrainer):
    """SFTTrainer with checkpoints for resuming over ranks, and expert load in its log."""


arguments = SFTConfig(
    args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4 // ranks,
    learning_rate=1e-2,
    adam_epsilon=1e-5,
    max_length=128,
    packing=True,
    shuffle_dataset=False,
    logging_steps=1,
    lr_scheduler_type="constant",
    save_strategy="no",
    report_to=[],
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
)
texts = Dataset.from_dict({"text": [topics[name][20:61] for name in sorted(topics)]})  # three per packed row
trainer = (SFTTrainer if args.plain else Trainer)(
    model=model, args=arguments, train_dataset=texts, processing_class=byte_tokenizer()
)
trainer.train()
trainer.save_model(args.out)
if trainer.is_world_process_zero():
    print("loss", [round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
if ranks > 1:
    dist.destroy_process_group()
