"""Transformers as moefx uses it: the experts, attention and mask interfaces, and the structure of models."""

from moefx.integrations.transformers.attention import attention_forward
from moefx.integrations.transformers.experts import experts_layout, find_layouts, is_dense_experts, is_experts
from moefx.integrations.transformers.implementations import (
    Names,
    activate,
    activated,
    named,
    original_implementations,
    restore,
)
from moefx.integrations.transformers.layout import ExpertsLayout
from moefx.integrations.transformers.masks import LazyMask, MaskPattern, attention_mask, lazy_masks, original_masks, pattern_of
from moefx.integrations.transformers.model_structure import (
    INDEX_NAMES,
    blocks,
    check,
    count_as_tensor,
    drops_cache,
    experts_in,
    experts_modules,
    is_language_model,
    is_norm,
    is_recurrent,
    outputs_are_collected,
    reads_layer_index,
    requested,
    routers,
    share_cache,
    without_index,
)
from moefx.integrations.transformers.recording import (
    AttentionWeights,
    OwnAttention,
    emitting,
    is_emitting,
    is_traced,
    is_transformed,
    noticing_packing,
    packed,
    transforms_are_seen,
    unpacked,
    unpacked_on_meta,
    without_packages,
)

__all__ = [
    "AttentionWeights", "ExpertsLayout", "INDEX_NAMES", "LazyMask", "MaskPattern", "Names", "OwnAttention", "activate",
    "activated", "attention_forward", "attention_mask", "blocks", "check", "count_as_tensor", "emitting", "experts_in",
    "drops_cache", "experts_layout", "experts_modules", "find_layouts", "is_dense_experts", "is_emitting",
    "is_experts", "is_language_model", "is_norm", "is_recurrent", "is_traced", "is_transformed", "lazy_masks", "named",
    "noticing_packing", "original_implementations", "original_masks", "outputs_are_collected", "packed", "pattern_of",
    "reads_layer_index", "requested", "restore", "routers", "share_cache", "transforms_are_seen", "unpacked",
    "unpacked_on_meta", "without_index", "without_packages",
]  # fmt: skip
