"""The routed experts of one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.ops.activations import ACTIVATIONS
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


def has_nobody(up: Tensor, down: Tensor) -> bool:
    """Whether some of the experts that ``up`` has matrices for are nobody's."""
    return up.shape[0] > down.shape[0]


def rows_of(expert: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Where each expert's rows end [E of up], int32, those that are nobody's not counted; expert [R], in ascending order."""
    ends = torch.searchsorted(expert, torch.arange(up.shape[0], device=expert.device), right=True).to(torch.int32)
    return ends.clamp(max=ends[down.shape[0] - 1]) if has_nobody(up, down) else ends


def somebodys_of(expert: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """Which rows [R, 1] are somebody's; None: all are."""
    return (expert < down.shape[0]).unsqueeze(-1) if has_nobody(up, down) else None


def only(rows: Tensor, somebodys: Tensor | None) -> Tensor:
    """Zeros in rows that are nobody's, whose products and gradients mean nothing."""
    return rows if somebodys is None else torch.where(somebodys, rows, 0)


@op(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, *, "
    f"{schema(ExpertsSpec)}) -> Tensor"
)
@takes_spec
def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    spec: ExpertsSpec,
) -> Tensor:
    """The routed experts: ``y[t] = sum_k weights[t, k] * mlp_{index[t, k]}(x[t])``; x [T, H] -> [T, H] in x's dtype.

    index [T, K] int64, weights [T, K]; options: :class:`ExpertsSpec`. Gated activations read up [E, 2I, H] ([E, H, 2I] if
    ``transposed``), whose two halves alternate if ``interleaved``; ungated ones up [E, I, H]. down is [E, H, I] ([E, I, H]
    if ``transposed``), biases [E, 2I or I] and [E, H]. Each token's rows are multiplied by their weights after the down
    projection, in the promoted dtype, and summed in the order of k (Transformers' grouped_mm experts, integrations/moe.py).

    A choice of an expert that down has no matrix for is nobody's and adds nothing; up may have matrices for those, which are
    not read (LongCat-Flash, arXiv 2509.01322: experts that compute nothing). Such experts have no biases.
    """
    top_k = index.shape[1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    offsets, somebodys = rows_of(expert, up, down), somebodys_of(expert, up, down)

    def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight if spec.transposed else weight.transpose(-2, -1)
        out = grouped_mm(h.to(weight.dtype), matrices, offsets[: weight.shape[0]])
        return out if bias is None else out + bias[expert]

    h = project(only(x[order // top_k], somebodys), up, up_bias)
    h = ACTIVATIONS[spec.activation].forward(h, spec.alpha, spec.limit, spec.interleaved)
    h = only(project(h, down, down_bias), somebodys) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=x.device))
    return h[inverse].view(-1, top_k, h.shape[-1]).sum(dim=1).to(x.dtype)
