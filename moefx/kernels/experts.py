"""The routed experts as one operation: forward and backward around two grouped GEMMs and four, nothing but rows in between.

Kept for the backward: the inputs, where each row went, and the pre-activations. Activations, gathered tokens and rows of
gradients are made again there. The plan is SonicMoE's (arXiv 2512.14080): the weight of a row multiplies its activation, so
that its gradient is a sum over the intermediate size and no expert's output is kept; all sums over experts and tokens have
one fixed order. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grouped import _grouped_gemm, _grouped_outer, _matrices

#: In the operations below: up, up_bias, down, down_bias.
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _gate(activation: str, alpha: float, limit: float, interleaved: bool) -> Any:
    from .expert_activation import Gate

    return Gate(activation, alpha, limit, interleaved)


def _up(rows: Tensor, up: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    return _grouped_gemm(rows.to(up.dtype), _matrices(up, transposed), offsets)


def _gradients(
    to_out: Tensor, h: Tensor, rows: Tensor, offsets: Tensor, weights: Weights, gate: Any, transposed: bool,
    needs: Sequence[bool], row_weights: Tensor | None = None, order: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:  # fmt: skip
    """Gradients of rows [R, H], of the four ``weights`` and of ``row_weights`` [T, K], from to_out [R, H]: that of the weighted
    sum, not yet multiplied by ``row_weights``. ``needs``: of rows and of the four; the rest is None."""
    from . import expert_activation as act

    up, up_bias, down, down_bias = weights
    to_a = _grouped_gemm(to_out, _matrices(down, transposed).transpose(1, 2), offsets)
    to_h, weighted, to_weights = act.backward(h, up_bias, offsets, to_a, gate, row_weights, order)
    del to_a

    def outer(of_in: Tensor, of_out: Tensor) -> Tensor:
        return _grouped_outer(of_in, of_out, offsets) if transposed else _grouped_outer(of_out, of_in, offsets)

    found: list[Tensor | None] = [None] * 4
    if needs[3]:
        found[2] = outer(weighted, to_out)
    if needs[4]:
        assert down_bias is not None
        found[3] = act.segment_sum(to_out, offsets, down_bias.dtype, row_weights, order)
    del weighted
    if needs[1]:
        found[0] = outer(rows.to(up.dtype), to_h)
    if needs[2]:
        assert up_bias is not None
        found[1] = act.segment_sum(to_h, offsets, up_bias.dtype)
    to_rows = _grouped_gemm(to_h, _matrices(up, transposed).transpose(1, 2), offsets) if needs[0] else None
    return to_rows, found, to_weights


def _or_empty(found: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in found]


# --- experts ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("moefx::fused_experts", mutates_args=(), device_types=None)
def fused_experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [T, H] in x's dtype; then, for the backward, h [T*K, 2I or I], order and inverse [T*K], offsets [E] (int32)."""
    from . import expert_activation as act
    from .permute import expand, reduce, sort_by_expert

    top_k = index.shape[1]
    order, inverse, offsets = sort_by_expert(index, up.shape[0])
    h = _up(expand(x.to(up.dtype), inverse, top_k), up, offsets, transposed)
    a = act.forward(h, up_bias, offsets, _gate(activation, alpha, limit, interleaved))
    rows = _grouped_gemm(a, _matrices(down, transposed), offsets)
    del a
    y = reduce(rows, inverse, top_k, x.dtype, weights=weights, index=index, bias=down_bias)
    return y, h, order, inverse, offsets


@fused_experts.register_fake
def _(x, index, weights, up, up_bias, down, down_bias, activation, alpha, limit, transposed, interleaved):
    rows = index.shape[0] * index.shape[1]
    integers = [index.new_empty(n, dtype=torch.int32) for n in (rows, rows, up.shape[0])]
    return torch.empty_like(x), up.new_empty(rows, _matrices(up, transposed).shape[2]), *integers


@torch.library.custom_op("moefx::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    grad: Tensor, h: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, x: Tensor, index: Tensor, weights: Tensor,
    up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str, alpha: float, limit: float,
    transposed: bool, interleaved: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, up, up_bias, down, down_bias. ``needs``: of which (weights: always); others are empty."""
    from .permute import expand, reduce

    top_k = index.shape[1]
    gate = _gate(activation, alpha, limit, interleaved)
    grad = grad.to(up.dtype)
    rows = expand(x.to(up.dtype), inverse, top_k) if needs[1] else h
    to_rows, found, to_weights = _gradients(
        expand(grad, inverse, top_k), h, rows, offsets, (up, up_bias, down, down_bias), gate, transposed, needs, weights, order
    )
    assert to_weights is not None
    if down_bias is not None:  # what a row's weight multiplies has the bias in it
        to_weights += F.linear(grad, down_bias).float().gather(1, index)
    to_x = None if to_rows is None else reduce(to_rows, inverse, top_k, x.dtype)
    first, *rest = _or_empty([to_x, *found], h)
    return first, to_weights.to(weights.dtype), *rest  # type: ignore[return-value]


@fused_experts_backward.register_fake
def _(grad, h, order, inverse, offsets, x, index, weights, up, up_bias, down, down_bias, activation, alpha, limit,
      transposed, interleaved, needs):  # fmt: skip
    made = [torch.empty_like(t) if need else h.new_empty(0) for t, need in zip((x, up, up_bias, down, down_bias), needs)]
    return made[0], torch.empty_like(weights), *made[1:]


def _save(ctx, inputs, output) -> None:
    x, index, weights, up, up_bias, down, down_bias, *ctx.options = inputs
    ctx.save_for_backward(*output[1:], x, index, weights, up, up_bias, down, down_bias)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_: Tensor):
    saved = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [asked[0], *asked[3:7]]
    found = torch.ops.moefx.fused_experts_backward(grad.contiguous(), *saved, *ctx.options, needs)
    to_x, to_weights, *rest = found
    rest = [t if need else None for t, need in zip(rest, needs[1:])]
    return to_x if needs[0] else None, None, to_weights if asked[2] else None, *rest, *[None] * len(ctx.options)


fused_experts.register_autograd(_backward, setup_context=_save)


# --- a rank's experts ------------------------------------------------------------------------------------------------


@torch.library.custom_op("moefx::fused_grouped_mlp", mutates_args=())
def fused_grouped_mlp(
    rows: Tensor, counts: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    activation: str, alpha: float, limit: float, transposed: bool, interleaved: bool, grad_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The experts' output [R, H] in the weights' dtype, and the pre-activations h [R, 2I or I] for the backward."""
    from . import expert_activation as act

    offsets = counts.cumsum(0).to(torch.int32)
    h = _up(rows, up, offsets, transposed)
    a = act.forward(h, up_bias, offsets, _gate(activation, alpha, limit, interleaved))
    out = _grouped_gemm(a, _matrices(down, transposed), offsets)
    if down_bias is not None:
        out += down_bias[torch.searchsorted(offsets, torch.arange(len(out), device=out.device), right=True)]
    return out, h


@fused_grouped_mlp.register_fake
def _(rows, counts, up, up_bias, down, down_bias, activation, alpha, limit, transposed, interleaved, grad_scale):
    wide, out = _matrices(up, transposed).shape[2], _matrices(down, transposed).shape[2]
    return up.new_empty(rows.shape[0], out), up.new_empty(rows.shape[0], wide)


@torch.library.custom_op("moefx::fused_grouped_mlp_backward", mutates_args=())
def fused_grouped_mlp_backward(
    grad: Tensor, h: Tensor, rows: Tensor, counts: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, alpha: float, limit: float, transposed: bool, interleaved: bool,
    grad_scale: float, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows, up, up_bias, down, down_bias; ``needs`` says of which, the others are empty."""
    offsets = counts.cumsum(0).to(torch.int32)
    to_rows, found, _ = _gradients(
        grad, h, rows, offsets, (up, up_bias, down, down_bias), _gate(activation, alpha, limit, interleaved), transposed, needs
    )
    for t in found:
        if t is not None and grad_scale != 1.0:
            t.mul_(grad_scale)
    to_rows = None if to_rows is None else to_rows.to(rows.dtype)
    return tuple(_or_empty([to_rows, *found], h))  # type: ignore[return-value]


@fused_grouped_mlp_backward.register_fake
def _(grad, h, rows, counts, up, up_bias, down, down_bias, activation, alpha, limit, transposed, interleaved, grad_scale,
      needs):  # fmt: skip
    given = zip((rows, up, up_bias, down, down_bias), needs)
    return tuple(torch.empty_like(t) if need else h.new_empty(0) for t, need in given)


def _save_mlp(ctx, inputs, output) -> None:
    rows, counts, up, up_bias, down, down_bias, *ctx.options = inputs
    ctx.save_for_backward(output[1], rows, counts, up, up_bias, down, down_bias)
    ctx.mark_non_differentiable(output[1])


def _backward_mlp(ctx, grad: Tensor, _: Tensor):
    asked = ctx.needs_input_grad
    needs = [asked[0], *asked[2:6]]
    found = torch.ops.moefx.fused_grouped_mlp_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    to_rows, *rest = [t if need else None for t, need in zip(found, needs)]
    return to_rows, None, *rest, *[None] * len(ctx.options)


fused_grouped_mlp.register_autograd(_backward_mlp, setup_context=_save_mlp)
