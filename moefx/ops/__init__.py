"""The semantic operations: each states its meaning once, as the Python body that is reference, fake, autograd and pattern.

They stand one family a file, and are composite (``CompositeImplicitAutograd``): a graph keeps one node per operation until
a backend takes it or its body is inlined. The exchange operations, whose shapes depend on data, are in
:mod:`moefx.ops.dispatch_combine`, the grouped matrix products in :mod:`moefx.ops.grouped_mlp`.

Letters in shapes: B batch, S sequence, T tokens (B*S), H hidden size, A attention heads, D head size, E experts,
K experts per token, I intermediate size of an expert, V vocabulary.
"""

from moefx.ops.activations import swiglu
from moefx.ops.linear import grouped_linear, linear_to_fp32
from moefx.ops.loss import CrossEntropySpec, linear_cross_entropy, load_balancing_loss
from moefx.ops.moe import (
    ExpertsSpec,
    computed_row_mask,
    expert_offsets,
    experts,
    has_zero_computation_experts,
    zero_uncomputed_rows,
)
from moefx.ops.norm import NormSpec, add_rms_norm, rms_norm
from moefx.ops.registry import BODIES, LIBRARY, op
from moefx.ops.rotary_embedding import ROTARY_LAYOUTS, NormRotarySpec, apply_rotary, norm_rotary, rotary, rotary_table
from moefx.ops.router import RouterSpec, TopkWeightsSpec, balanced_index, nonfinite, route, route_at, route_body
from moefx.ops.sdpa_attention import AttentionSpec, attention, is_packed, visible
from moefx.ops.spec import schema, takes_spec

__all__ = [
    "BODIES", "LIBRARY", "ROTARY_LAYOUTS", "AttentionSpec", "CrossEntropySpec", "ExpertsSpec", "NormRotarySpec", "NormSpec",
    "RouterSpec", "TopkWeightsSpec", "add_rms_norm", "apply_rotary", "attention", "balanced_index", "computed_row_mask",
    "expert_offsets", "experts", "grouped_linear", "has_zero_computation_experts", "is_packed", "linear_cross_entropy",
    "linear_to_fp32", "load_balancing_loss", "nonfinite", "norm_rotary", "op", "rms_norm", "rotary", "rotary_table",
    "route", "route_at", "route_body", "schema", "swiglu", "takes_spec", "visible", "zero_uncomputed_rows",
]  # fmt: skip
