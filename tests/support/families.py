"""Small models of each family that the tests use, of their real Transformers classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 256, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_DEEPSEEK = {
    "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "num_hidden_layers": 3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 32, "num_experts": 8},
    "deepseek_v3": {
        **_DEEPSEEK, "n_group": 4, "topk_group": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "glm4_moe": {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "head_dim": 16, "use_qk_norm": True},
    "gpt_oss": {"intermediate_size": 32, "num_local_experts": 8, "head_dim": 16, "sliding_window": 8},
    "gemma4_text": {  # the last layer of each kind leaves its keys and values to others
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True,
        "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8,
        "hidden_size_per_layer_input": 0, "num_hidden_layers": 3, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "nemotron_h": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
        "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 48, "n_shared_experts": 1,
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4,
    },
    "llama4_text": {
        "intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 16,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 16,
    },
}  # fmt: skip
#: That of examples/, but for one token more in sft.py.
EXAMPLES = Qwen3MoeConfig(
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
FEW = "fewer experts than ranks"
#: What the whole model must get of each operation, counted by hand from the configurations above.
EXPECTED: dict[str, dict[str, int]] = {
    "qwen3_moe": {"rms_norm": 9, "route": 2, "rotary": 2, "attention": 2, "experts": 2, "swiglu": 0},
    "mixtral": {"rms_norm": 5, "route": 2, "rotary": 2, "attention": 2, "experts": 2, "swiglu": 0},
    "olmoe": {"rms_norm": 9, "route": 2, "rotary": 2, "attention": 2, "experts": 2, "swiglu": 0},
    "deepseek_v3": {"rms_norm": 13, "route": 2, "rotary": 3, "attention": 3, "experts": 2, "swiglu": 3},
    "glm4_moe": {"rms_norm": 13, "route": 2, "rotary": 3, "attention": 3, "experts": 2, "swiglu": 3},
    "gpt_oss": {"rms_norm": 5, "route": 2, "rotary": 2, "attention": 2, "experts": 2, "swiglu": 0},
    # a layer: seven norms around its parts, the router's, and those of queries, keys and values
    "gemma4_text": {"rms_norm": 34, "route": 3, "rotary": 3, "attention": 3, "experts": 3, "swiglu": 0},
    # experts that run on every token are raised with their routers; queries and keys have norms that are no RMSNorm modules
    "llama4_text": {
        "rms_norm": 9,
        "route": 0,
        "rotary": 2,
        "attention": 2,
        "experts": 0,
        "swiglu": 2,
        "dense_experts": 2,
        "norm_modules": 5,
    },
    "nemotron_h": {"rms_norm": 5, "route": 2, "rotary": 0, "attention": 1, "experts": 2, "swiglu": 0},
}


def experts_of(family: str) -> tuple[int, int]:
    """How many calls of experts a model of ``family`` has here, and how many experts a token visits in one."""
    counts, sizes = EXPECTED[family], {**COMMON, **FAMILIES[family]}
    return counts["experts"] + counts.get("dense_experts", 0), sizes.get("top_k_experts", sizes["num_experts_per_tok"])


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of ``family`` with random weights, larger than a fresh model's so that routing is not near ties."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name:
                p.mul_(2)
    return model.train()


def batch(rows: int, length: int, seed: int = 0, labels: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids} if labels else {"input_ids": ids}


#: What ranks are to find captured, by the name that stands in a test's arguments: see capture_cache.py.
KNOWN: dict[str, Callable[[], Any]] = {
    **{name: partial(build, name) for name in FAMILIES},
    FEW: partial(build, "qwen3_moe", num_experts=2),
    "examples": lambda: AutoModelForCausalLM.from_config(EXAMPLES).train(),
}
