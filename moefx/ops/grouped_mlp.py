"""Grouped matrix products: rows that lie expert by expert, each group times its own matrix.

``grouped_mm`` is one product; ``grouped_mlp`` a rank's experts as one opaque operation, for row counts that only the data
knows. On CUDA in bf16 both run torch's grouped GEMM, with the offsets on the device; elsewhere a loop over the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.errors import MoefxError
from moefx.ops.activations import ACTIVATIONS
from moefx.ops.registry import LIBRARY
from moefx.transports import wide
from moefx.transports.permute import Kept


def _grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a] times weight [E, a, b] group by group; group e is rows offsets[e-1] to offsets[e]. -> [R, b]."""
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0]:
        return torch._grouped_mm(x, weight, offs=offsets)
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[e], out=out[start:end])
        start = end
    out[start:].zero_()
    return out


def _grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a], y [R, b] -> [E, a, b]: x.T @ y of each group; zeros for an empty one."""
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0]:
        return torch._grouped_mm(x.transpose(0, 1), y, offs=offsets)
    out = x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end].T, y[start:end], out=out[e])
        else:
            out[e].zero_()
        start = end
    return out


@torch.library.custom_op("moefx::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [R, a], rows expert by expert, times weight [E, a, b]; offsets [E] int32, the end of each group. -> [R, b].

    x and weight have one dtype. Rows after the last offset give zeros (CPU) or are undefined (CUDA, bf16).
    """
    return _grouped_gemm(x, weight, offsets)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("moefx::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [R, a] and weight [E, a, b], the latter in weight's own memory order."""
    to_x = _grouped_gemm(grad, weight.transpose(1, 2), offsets)
    if weight.stride(1) < weight.stride(2):  # a transposed view of [E, b, a]: so its gradient lies the same way
        return to_x, _grouped_outer(grad, x, offsets).transpose(1, 2)
    return to_x, _grouped_outer(x, grad, offsets)


@grouped_mm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    e, a, b = weight.shape
    if weight.stride(1) < weight.stride(2):
        return torch.empty_like(x), x.new_empty(e, b, a).transpose(1, 2)
    return torch.empty_like(x), x.new_empty(e, a, b)


def _save_mm(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward_mm(ctx, grad: Tensor):
    x, weight, offsets = ctx.saved_tensors
    return (*torch.ops.moefx.grouped_mm_backward(grad.contiguous(), x, weight, offsets), None)


grouped_mm.register_autograd(_backward_mm, setup_context=_save_mm)


@torch.library.custom_op("moefx::scale_gradient", mutates_args=())
def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x; its gradient is multiplied by ``scale``."""
    return x.clone()


@scale_gradient.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _save_scale(ctx, inputs, output) -> None:
    ctx.scale = inputs[1]


scale_gradient.register_autograd(lambda ctx, grad: (grad * ctx.scale, None), setup_context=_save_scale)


# --- a rank's experts ------------------------------------------------------------------------------------------------


def _matrices(weight: Tensor, transposed: bool) -> Tensor:
    """[E, in, out] whichever way the model stores it."""
    return weight if transposed else weight.transpose(1, 2)


def _experts_of_rows(counts: Tensor, rows: int) -> Tensor:
    """The expert of each row [rows]; the last one's for rows after the last (a dispatch with a capacity has such)."""
    at = torch.arange(rows, device=counts.device)
    return torch.bucketize(at, counts.cumsum(0), right=True).clamp_(max=counts.shape[0] - 1)


def _times(x: Tensor, row_weights: Tensor | None) -> Tensor:
    """x [R, n] times each row's weight: not rounded yet."""
    return x if row_weights is None else x * row_weights.unsqueeze(1)


def _activate(h: Tensor, row_weights: Tensor | None, activation: str, alpha: float, limit: float, interleaved: bool) -> Tensor:
    """What ``down`` multiplies [R, I], in h's dtype: the activation of h [R, 2I or I] times each row's weight.

    Computed in float32 (float64 for float64) and rounded once: the weight costs no rounding.
    """
    a = ACTIVATIONS[activation].forward(h.to(wide(h.dtype)), alpha, limit, interleaved)
    return _times(a, row_weights).to(h.dtype).contiguous()


def _activate_backward(
    h: Tensor, to_a: Tensor, row_weights: Tensor | None, activation: str, alpha: float, limit: float, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h, what :func:`_activate` gave, and the weights' gradient (empty if there are none), from
    to_a [R, I]: that of what it gave.
    """
    act, high, to_a = ACTIVATIONS[activation], h.to(wide(h.dtype)), to_a.to(wide(h.dtype))
    a = act.forward(high, alpha, limit, interleaved)
    to_weights = h.new_empty(0) if row_weights is None else (to_a * a).sum(1).to(row_weights.dtype)
    to_h = act.backward(high, _times(to_a, row_weights), alpha, limit, interleaved)
    return to_h.to(h.dtype).contiguous(), _times(a, row_weights).to(h.dtype).contiguous(), to_weights


@torch.library.custom_op("moefx::grouped_mlp_forward", mutates_args=())
def grouped_mlp_forward(
    rows: Tensor,
    counts: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    row_weights: Tensor | None,
    tokens: Tensor | None,
    place: Tensor | None,
    host: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """The experts' output [R, H] and what the backward needs besides the inputs: the pre-activations [R, 2I or I].

    tokens, place and host are not read: they are kept for the backward, instead of the rows, where they are given.
    """
    offsets = counts.cumsum(0).to(torch.int32)
    biased = up_bias is not None or down_bias is not None
    expert = _experts_of_rows(counts, rows.shape[0]) if biased else counts
    h = _grouped_gemm(rows.to(up.dtype), _matrices(up, transposed), offsets)
    h = h if up_bias is None else h + up_bias[expert]
    a = _activate(h, row_weights, activation, alpha, limit, interleaved)
    out = _grouped_gemm(a, _matrices(down, transposed), offsets)
    if down_bias is not None:
        out = (out + _times(down_bias[expert], row_weights)).to(out.dtype)
    return out, h


@grouped_mlp_forward.register_fake
def _(
    rows,
    counts,
    up,
    up_bias,
    down,
    down_bias,
    row_weights,
    tokens,
    place,
    host,
    activation,
    alpha,
    limit,
    transposed,
    interleaved,
    grad_scale,
):
    out = up.new_empty(rows.shape[0], _matrices(down, transposed).shape[2])
    return out, up.new_empty(rows.shape[0], _matrices(up, transposed).shape[2])


@torch.library.custom_op("moefx::grouped_mlp_backward", mutates_args=())
def grouped_mlp_backward(
    grad: Tensor,
    h: Tensor,
    rows: Tensor | None,
    tokens: Tensor | None,
    place: Tensor | None,
    host: Tensor | None,
    counts: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    row_weights: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    transposed: bool,
    interleaved: bool,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, up, up_bias, down, down_bias, row_weights (empty where there is none); the activation is computed
    again. A row's weight gets <its activation, its gradient times ``down``> + <bias, gradient>: no output is needed.
    """
    offsets = counts.cumsum(0).to(torch.int32)
    to_a = _grouped_gemm(grad, _matrices(down, transposed).transpose(1, 2), offsets)
    to_h, a, to_weights = _activate_backward(h, to_a, row_weights, activation, alpha, limit, interleaved)
    to_down = _grouped_outer(a, grad, offsets) if transposed else _grouped_outer(grad, a, offsets)
    kept, matrices = Kept(rows, tokens, place, host), _matrices(up, transposed)
    x = kept.again(h.shape[0], matrices.shape[1]).to(up.dtype)
    to_up = _grouped_outer(x, to_h, offsets) if transposed else _grouped_outer(to_h, x, offsets)
    to_rows = _grouped_gemm(to_h, matrices.transpose(1, 2), offsets).to(kept.dtype)
    to_up_bias = _sum_by_expert(to_h, counts) if up_bias is not None else h.new_empty(0)
    to_down_bias = h.new_empty(0)
    if down_bias is not None:
        to_down_bias = _sum_by_expert(grad, counts, row_weights)
        if row_weights is not None:
            to_weights += (grad.to(wide(grad.dtype)) * down_bias[_experts_of_rows(counts, h.shape[0])]).sum(1)
    if grad_scale != 1.0:
        for g in (to_up, to_up_bias, to_down, to_down_bias):
            g.mul_(grad_scale)
    return to_rows, to_up, to_up_bias, to_down, to_down_bias, to_weights


def _sum_by_expert(grad: Tensor, counts: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """[R, n] -> [E, n]: (weighted) sums of each expert's rows, in fp32 (fp64 for fp64), in one fixed order."""
    high = grad.to(wide(grad.dtype))
    return torch.segment_reduce(_times(high, row_weights), "sum", lengths=counts, unsafe=True).to(grad.dtype)


@grouped_mlp_backward.register_fake
def _(
    grad,
    h,
    rows,
    tokens,
    place,
    host,
    counts,
    up,
    up_bias,
    down,
    down_bias,
    row_weights,
    activation,
    alpha,
    limit,
    transposed,
    interleaved,
    grad_scale,
):
    def like(t: Tensor | None) -> Tensor:
        return h.new_empty(0) if t is None else torch.empty_like(t)

    to_rows = h.new_empty(h.shape[0], _matrices(up, transposed).shape[1], dtype=Kept(rows, tokens).dtype)
    return to_rows, like(up), like(up_bias), like(down), like(down_bias), like(row_weights)


def _save_mlp(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd would write zeros for h's
    rows, counts, up, up_bias, down, down_bias, row_weights, *way = inputs
    ctx.options = way[3:]
    ctx.save_for_backward(output[1], *Kept.least(rows, *way[:3]), counts, up, up_bias, down, down_bias, row_weights)
    ctx.mark_non_differentiable(output[1])


def _backward_mlp(ctx, grad: Tensor | None, _):
    saved = ctx.saved_tensors
    if grad is None:
        return (None,) * (10 + len(ctx.options))
    to_rows, *found = torch.ops.moefx.grouped_mlp_backward(grad.contiguous(), *saved, *ctx.options)
    rest = (None if t is None else g for t, g in zip(saved[6:], found))
    return to_rows, None, *rest, *[None] * (3 + len(ctx.options))


grouped_mlp_forward.register_autograd(_backward_mlp, setup_context=_save_mlp)


def _grouped_mlp(
    rows: Tensor,
    counts: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
    transposed: bool = False,
    interleaved: bool = False,
    grad_scale: float = 1.0,
    row_weights: Tensor | None = None,
    arrived: list[Tensor] | None = None,
) -> Tensor:
    """This rank's experts on their rows: rows [R, H] expert by expert, counts [e] int64 -> [R, H] in the weights' dtype.

    up [e, 2I, H], down [e, H, I] and the options are those of ``moefx.experts``. Each row of the result is multiplied by its
    weight, row_weights [R] float32 (float64 for float64; None: all are 1). The weight goes to the activation before that is
    rounded, so that it costs no rounding of its own, and its gradient is a sum over I: nobody has to keep the result.
    ``grad_scale`` multiplies the gradients of the weights and biases only, not of row_weights. Every parameter gets a
    gradient, zeros where no row came. Rows after the last of ``counts``, and their weights, may hold anything: what they give
    means nothing, and no gradient of a parameter has any of it.

    ``arrived``: tokens, place and host that ``dispatch`` gave with these rows. The backward then keeps them instead of the
    rows, which it makes again: a token has a row for each of its experts here, and a capacity's worst case is mostly rows.
    """
    return torch.ops.moefx.grouped_mlp_forward(
        rows,
        counts,
        up,
        up_bias,
        down,
        down_bias,
        row_weights,
        *parts_of(arrived),
        activation,
        alpha,
        limit,
        transposed,
        interleaved,
        grad_scale,
    )[0]


def parts_of(arrived: list[Tensor] | None) -> list[Tensor | None]:
    """tokens, place, host; None where there are none."""
    if arrived is not None and len(arrived) != 3:
        raise MoefxError(f"arrived has {len(arrived)} tensors, not 3: pass [tokens, place, host] as dispatch gave them")
    return [None, None, None] if arrived is None else list(arrived)


LIBRARY.define(
    "grouped_mlp(Tensor rows, Tensor counts, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, *, str activation, "
    "float alpha=0.0, float limit=0.0, bool transposed=False, bool interleaved=False, float grad_scale=1.0, "
    "Tensor? row_weights=None, Tensor[]? arrived=None) -> Tensor"
)
LIBRARY.impl("grouped_mlp", _grouped_mlp, "CompositeImplicitAutograd")
#: See :func:`_grouped_mlp`.
grouped_mlp = torch.ops.moefx.grouped_mlp.default
