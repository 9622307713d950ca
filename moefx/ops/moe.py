"""The routed experts of one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.ops.activations import ACTIVATIONS
from moefx.ops.expert_weights import ExpertWeights, LowRank
from moefx.ops.grouped_mm import grouped_mm
from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class ExpertsSpec:
    """What an expert computes, and how its matrices lie."""

    #: A name of :data:`moefx.ops.activations.ACTIVATIONS`.
    activation: str
    #: Numbers of those activations that have some.
    alpha: float = 0.0
    limit: float = 0.0
    #: Matrices are [E, in, out], instead of [E, out, in].
    transposed: bool = False
    #: Of gated activations: the columns of gate and up alternate, instead of standing one half after the other.
    interleaved: bool = False

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies one half of its input by a function of the other."""
        return ACTIVATIONS[self.activation].gated


def has_zero_computation_experts(gate_up: Tensor, down: Tensor) -> bool:
    """Whether ``gate_up`` has matrices for experts that compute nothing: ``down`` has none for them."""
    return gate_up.shape[0] > down.shape[0]


def expert_offsets(expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Where each expert's rows end [E], int32, without rows of zero-computation experts; expert [R], in ascending order."""
    ends = torch.searchsorted(expert, torch.arange(gate_up.shape[0], device=expert.device), right=True).to(torch.int32)
    return ends.clamp(max=ends[down.shape[0] - 1]) if has_zero_computation_experts(gate_up, down) else ends


def computed_row_mask(expert: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """Which rows [R, 1] have an expert that computes; None: all do."""
    return (expert < down.shape[0]).unsqueeze(-1) if has_zero_computation_experts(gate_up, down) else None


def zero_uncomputed_rows(rows: Tensor, computed: Tensor | None) -> Tensor:
    """Zeros in rows of zero-computation experts: their products and gradients are undefined."""
    return rows if computed is None else torch.where(computed, rows, 0)


#: The factors of low-rank updates, as arguments of an operation.
LORA_SCHEMA = "Tensor? gate_up_lora_a=None, Tensor? gate_up_lora_b=None, Tensor? down_lora_a=None, Tensor? down_lora_b=None"


@op(
    "experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor? gate_up_bias, Tensor down, "
    f"Tensor? down_bias, *, {LORA_SCHEMA}, {schema(ExpertsSpec)}) -> Tensor"
)
@takes_spec
def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    gate_up_lora_a: Tensor | None = None,
    gate_up_lora_b: Tensor | None = None,
    down_lora_a: Tensor | None = None,
    down_lora_b: Tensor | None = None,
    spec: ExpertsSpec,
) -> Tensor:
    """The routed experts: ``y[t] = sum_k topk_weights[t, k] * mlp_{topk_ids[t, k]}(x[t])``; x [T, H] -> [T, H] in x's dtype.

    topk_ids [T, K] int64, topk_weights [T, K]; options: :class:`ExpertsSpec`. Gated activations read gate_up [E, 2I, H] ([E, H,
    2I] if ``transposed``), whose two halves alternate if ``interleaved``; ungated ones gate_up [E, I, H]. down is [E, H, I]
    ([E, I, H] if ``transposed``), biases [E, 2I or I] and [E, H]. Each token's rows are multiplied by their weights after the
    down projection, in the promoted dtype, and summed in the order of k (Transformers' grouped_mm experts,
    integrations/moe.py).

    Low-rank updates of the matrices (:class:`moefx.ops.expert_weights.LowRank`), one for each matrix of gate_up or down: a
    [E, r, in], b [E, out, r], whichever way the matrices lie. They add (x a') b' to the projection, before the bias.

    An expert that down has no matrix for is a zero-computation expert: tokens routed to it get nothing from it (LongCat-Flash,
    arXiv 2509.01322). gate_up may have matrices for such experts, which are not read; they have no biases.
    """
    top_k = topk_ids.shape[1]
    flat = topk_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    offsets, computed = expert_offsets(expert, gate_up, down), computed_row_mask(expert, gate_up, down)
    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)

    def project(h: Tensor, weight: Tensor, bias: Tensor | None, update: LowRank | None) -> Tensor:
        h, ends = h.to(weight.dtype), offsets[: weight.shape[0]]
        out = grouped_mm(h, weight if spec.transposed else weight.transpose(-2, -1), ends)
        if update is not None:
            out = out + grouped_mm(grouped_mm(h, update.a.transpose(-2, -1), ends), update.b.transpose(-2, -1), ends)
        return out if bias is None else out + bias[expert]

    h = project(zero_uncomputed_rows(x[order // top_k], computed), gate_up, gate_up_bias, weights.gate_up_lora)
    h = ACTIVATIONS[spec.activation].forward(h, spec.alpha, spec.limit, spec.interleaved)
    h = zero_uncomputed_rows(project(h, down, down_bias, weights.down_lora), computed) * topk_weights.reshape(-1)[
        order
    ].unsqueeze(-1)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=x.device))
    return h[inverse].view(-1, top_k, h.shape[-1]).sum(dim=1).to(x.dtype)
