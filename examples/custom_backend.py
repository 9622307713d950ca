"""A custom kernel: a backend is a name and a table from operations to functions of the same signature.

python examples/custom_backend.py
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx
from moefx import ops
from moefx.ir.graph import value


def rms_norm(x, weight, eps, *, cast_first=True, offset=0.0):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def refuses(node):
    x = value(node.args[0])
    if x.dtype != torch.float32:
        return f"this kernel is for torch.float32, the input is {x.dtype}"
    return f"this kernel is for rows of at least 32, these have {x.shape[-1]}" if x.shape[-1] < 32 else None


mine = moefx.Backend("mine", {ops.rms_norm: moefx.Kernel(rms_norm, refuses, why="four lines of my own")})

config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=2,
)
model = AutoModelForCausalLM.from_config(config)
moefx.optimize(model, backends=[mine, "torch"], compile=False)
print(moefx.report(model))  # which kernel runs what, and which backends refused it, and why

ids = torch.randint(0, 256, (2, 16))
print(moefx.verify(model, {"input_ids": ids, "labels": ids}).worst)
