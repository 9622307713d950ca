"""A small configuration of a family, with every kind of layer that it has: for trying things out."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "num_experts_per_tok": 2,
    "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 256,
    "moe_shared_expert_intermediate_size": 48, "shared_expert_intermediate_size": 48, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8, "moe_latent_size": None,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
#: Where "each of its defaults, smaller" is not a model of the family.
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4, "n_group": 1},
    "glm4_moe": {"n_group": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of ``model_type`` with small sizes where it has such; 2 to 4 layers."""
    full = AutoConfig.for_model(model_type)
    small = {k: v for k, v in _SMALL.items() if hasattr(full, k)}
    layers = 3 if "first_k_dense_replace" in small else 2
    return AutoConfig.for_model(model_type, **{**small, "num_hidden_layers": layers, **_OWN.get(model_type, {})})
