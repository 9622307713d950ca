"""The models that are measured, with random weights: nothing is downloaded."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

#: Widths. qwen3_30b: those of Qwen3-30B-A3B, whose 48 layers are alike; demo: the model of the demo.
WIDTHS = {
    "qwen3_30b": dict(
        hidden_size=2048, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, moe_intermediate_size=768,
        intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
        rope_theta=1e6, tie_word_embeddings=False, max_position_embeddings=40960,
    ),
    "tiny": dict(
        hidden_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=32,
        intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=512,
        rope_theta=1e6, tie_word_embeddings=False,
    ),
    "demo": dict(
        hidden_size=192, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=256,
        intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=32, vocab_size=256,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
DEPTH = {"qwen3_30b": 48, "tiny": 4, "demo": 4}  #: layers of the whole model


def config(name: str, layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(num_hidden_layers=layers, **WIDTHS[name])


def build(name: str, layers: int, dtype: torch.dtype, device: str | torch.device, *, experts: str = "grouped_mm") -> nn.Module:
    """A model with random weights, the same for the same arguments; sdpa, Transformers' fastest built-in attention."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=dtype, attn_implementation="sdpa")
    model.set_experts_implementation(experts)
    return model.to(device)
