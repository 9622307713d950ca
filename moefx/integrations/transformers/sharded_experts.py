"""Experts that are sharded across ranks, in a call that no captured graph covers (generation, for example)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.integrations.transformers.layout import ExpertsLayout
from moefx.ops import dispatch_combine, grouped_mlp


def experts_over_ranks(x: Tensor, index: Tensor, weights: Tensor, module: nn.Module, layout: ExpertsLayout) -> Tensor:
    """The output of sharded experts [T, H] by dispatch, grouped MLP and combine. All ranks of the group call it alike."""
    up: Any = getattr(module, layout.up)
    where = {"num_experts": up.shape[0], "group": up.device_mesh.get_group().group_name}
    local = [p.to_local() if isinstance(p, DTensor) else p for p in layout.weights(module)]
    rows, probs, tokens_per_expert, *route, received = dispatch_combine.dispatch(x, index, weights, **where)
    row_id_map, _, cpu_metadata, _ = route
    options = {**layout.options, "grad_scale": 1.0 / up.device_mesh.size(), "permuted_probs": probs}
    options["arrived"] = [received, row_id_map, cpu_metadata]
    rows = grouped_mlp.grouped_mlp(rows, tokens_per_expert, *local, **options)
    return dispatch_combine.combine(rows, index, *route, **where).to(x.dtype)
