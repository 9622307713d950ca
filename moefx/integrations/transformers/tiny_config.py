"""A small configuration of a family, with every kind of layer that it has: for trying things out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

#: Small sizes by the names that configurations give them. 4 heads of 16 make the hidden size, as most families want.
_SIZES: dict[int, str] = {
    1: "topk_group attn_layer_offset num_dense_layers first_k_dense_replace n_shared_experts indexer_kv_heads",
    2: "num_key_value_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
       "num_experts_per_token moe_top_k moe_topk moe_k top_k_experts n_groups mamba_n_groups n_group num_expert_group "
       "attn_layer_period expert_layer_period o_groups hc_count hc_mult index_topk_blocks indexer_compress_ratio "
       "n_layers_per_attn_res_block heads_per_ngram encoder_layers",
    4: "num_attention_heads n_heads num_heads swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads "
       "encoder_attention_heads indexer_n_heads zero_expert_num split_ngram_parts d_rel patch_size",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim chunk_size mamba_chunk_size block_size "
       "index_topk index_block_size indexer_budget sliding_window sliding_window_size keep_window_size attention_chunk_size "
       "rotary_dim router_hidden_size hc_lowrank gated_norm_rank rel_extent "
       "mamba_num_heads mamba_n_heads",  # Mamba's CUDA kernels want rows of multiples of 8, in which heads are counted
    16: "head_dim v_head_dim qk_nope_head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
        "kv_channels index_head_dim indexer_head_dim kv_lora_rank o_lora_rank mamba_head_dim mamba_d_head mamba_d_state "
        "mamba_dt_rank ssm_state_size hidden_size_per_layer_input ple_embed_dim",
    24: "q_lora_rank qk_head_dim",
    32: "moe_intermediate_size expert_ffn_hidden_size image_size",
    48: "shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size",
    64: "hidden_size d_model out_hidden_size projector_input_dim projector_output_dim vision_output_dim adapter_in_dim "
        "adapter_input_size adapter_out_dim",
    96: "intermediate_size ffn_hidden_size dense_intermediate_size intermediate_size_mlp",
    256: "vocab_size unpadded_vocab_size vocab_size_per_layer_input max_position_embeddings max_seq_len model_max_length "
         "ngram_vocab_size_base num_position_embeddings",
}  # fmt: skip
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
#: Sizes that a configuration may leave out although the family's mixture of experts cannot be built without them.
_NEEDED = (
    "num_experts_per_tok", "n_shared_experts", "top_k_experts", "moe_intermediate_size", "head_dim", "indexer_n_heads",
    "indexer_kv_heads", "indexer_head_dim", "indexer_budget", "indexer_compress_ratio",
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "depth")
#: Switches of families that have dense members too.
_ON = ("enable_moe_block", "is_moe")
#: What a family's configuration leaves to its checkpoints, or asks of sizes that are not the usual ones.
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"head_dim": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]}},
    "gemma4_text": {"pad_token_id": 0},  # stands in the text where images are
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
    },
    "mistral4": {"qk_nope_head_dim": 8, "v_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of ``model_type`` with small sizes and a layer of each kind, in its sub-configurations too."""
    return AutoConfig.for_model(model_type, **_changes(AutoConfig.for_model(model_type)))


def _changes(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments of the configuration's class that make it small."""
    own = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    small = {k: _small(k, v, own) for k, v in own.items() if k in _SMALL}
    small |= {k: True for k in _ON if k in own}
    small |= {k: 0 for k in ("bos_token_id", "eos_token_id") if own.get(k) is not None} | {"pad_token_id": None}
    small |= {k: _changes(v) for k, v in own.items() if isinstance(v, PreTrainedConfig)}
    return small | _layers(config, own) | _OWN.get(config.model_type, {})


def _small(name: str, size: Any, own: Mapping[str, Any]) -> Any:
    """A small size, not above the default one."""
    if name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") or (
        size is None and name in _NEEDED
    ):
        return _SMALL[name]
    if not isinstance(size, int) or isinstance(size, bool):
        return size
    for key, other in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
        if name == key and size == own.get(other):
            name = other
    return min(size, _SMALL[name])


def _layers(config: PreTrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of each kind: lists with an entry a layer are cut to them, lists of layers' numbers are numbered again."""
    name = next((n for n in _LAYERS if isinstance(own.get(n), int)), None)
    if name is None:
        return {}
    many = own[name]
    lists = {k: v for k, v in own.items() if isinstance(v, (list, tuple))}
    numbers = {k: v for k, v in lists.items() if "layer" in k and _numbers_layers(v, many)}
    each = {k: v for k, v in lists.items() if len(v) == many and k not in numbers}
    overrides = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", {})
    kinds: dict[str, int] = {}
    for i in range(many):
        kinds.setdefault(repr(([v[i] for v in each.values()], [i in v for v in numbers.values()], overrides.get(i))), i)
    kept = sorted(kinds.values())
    at_least = 3 if own.get("first_k_dense_replace") or own.get("num_dense_layers") else 2
    kept += [many - 1] * (at_least - len(kept))
    return {
        name: len(kept),
        **{k: [v[i] for i in kept] for k, v in each.items()},
        **{k: [new for new, i in enumerate(kept) if i in v] for k, v in numbers.items()},
        "per_layer_config": {
            new: {k: _scaled(k, v, own) for k, v in overrides[i].items()} for new, i in enumerate(kept) if i in overrides
        }
        or None,
    }


def _numbers_layers(found: Any, many: int) -> bool:
    return all(type(i) is int and 0 <= i < many for i in found) and sorted(set(found)) == list(found)


def _scaled(name: str, size: Any, own: Mapping[str, Any]) -> Any:
    """A layer's own size, in the proportion to the other layers' that it had."""
    usual = own.get(name)
    if name not in _SMALL or not isinstance(usual, int) or not isinstance(size, int):
        return size
    return max(1, _small(name, usual, own) * size // usual)
