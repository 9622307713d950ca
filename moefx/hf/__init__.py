"""What moefx asks of Transformers: its experts, attention and mask interfaces, and what a model is made of."""

from .experts import ExpertsLayout, experts_layout, is_dense_experts, is_experts
from .implementations import implementations, named, previous, restore, use
from .masks import attention_mask, packed_mask, packed_of, window_of, windowed
from .model import (
    INDEX_NAMES,
    blocks,
    check,
    count_as_tensor,
    experts_in,
    experts_modules,
    is_language_model,
    is_norm,
    is_recurrent,
    outputs_are_collected,
    reads_layer_index,
    requested,
    routers,
    structure,
)
from .recording import OwnAttention, emitting, is_emitting, packed, unpacked, unpacked_on_meta, without_packages

__all__ = [
    "INDEX_NAMES", "ExpertsLayout", "OwnAttention", "attention_mask", "blocks", "check", "count_as_tensor", "emitting",
    "experts_in", "experts_layout", "experts_modules", "implementations", "is_dense_experts", "is_emitting", "is_experts",
    "is_language_model", "is_norm", "is_recurrent", "named", "outputs_are_collected", "packed", "packed_mask",
    "packed_of", "previous",
    "reads_layer_index", "requested", "restore", "routers", "structure", "unpacked", "unpacked_on_meta", "use", "window_of",
    "windowed", "without_packages",
]  # fmt: skip
