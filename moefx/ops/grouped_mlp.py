"""``grouped_mlp``: a rank's experts as one opaque operation, for numbers of rows that depend on data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.errors import MoefxError
from moefx.ops.activations import ACTIVATIONS
from moefx.ops.custom_op import opaque
from moefx.ops.grouped_mm import grouped_gemm, grouped_outer
from moefx.ops.moe import ExpertsSpec
from moefx.ops.registry import LIBRARY
from moefx.ops.spec import schema, takes_spec
from moefx.transports import accumulation_dtype
from moefx.transports.permute import SavedRows


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


def matrices_of(weight: Tensor, transposed: bool) -> Tensor:
    """[E, in, out] whichever way the model stores it."""
    return weight if transposed else weight.transpose(1, 2)


def experts_of_rows(tokens_per_expert: Tensor, rows: int) -> Tensor:
    """The expert of each row [rows]; the last one's for rows after the last (a dispatch with a capacity has such)."""
    at = torch.arange(rows, device=tokens_per_expert.device)
    return torch.bucketize(at, tokens_per_expert.cumsum(0), right=True).clamp_(max=tokens_per_expert.shape[0] - 1)


def scale_rows(x: Tensor, permuted_probs: Tensor | None) -> Tensor:
    """x [R, n] times each row's weight: not rounded yet."""
    return x if permuted_probs is None else x * permuted_probs.unsqueeze(1)


@dataclass(frozen=True)
class GroupedMLPSpec(ExpertsSpec):
    """The options of ``moefx.experts``, and the scale of a rank's gradients."""

    #: Multiplies the gradients of the matrices and biases, not those of permuted_probs.
    grad_scale: float = 1.0


def activate(h: Tensor, permuted_probs: Tensor | None, spec: ExpertsSpec) -> Tensor:
    """What ``down`` multiplies [R, I], in h's dtype: the activation of h [R, 2I or I] times each row's weight.

    Computed in float32 (float64 for float64) and rounded once: the weight costs no rounding.
    """
    forward = ACTIVATIONS[spec.activation].forward
    a = forward(h.to(accumulation_dtype(h.dtype)), spec.alpha, spec.limit, spec.interleaved)
    return scale_rows(a, permuted_probs).to(h.dtype).contiguous()


def activate_backward(
    h: Tensor, to_a: Tensor, permuted_probs: Tensor | None, spec: ExpertsSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h, what :func:`activate` gave, and the weights' gradient (empty if there are none).

    to_a [R, I]: the gradient of what it gave.
    """
    act, high, to_a = ACTIVATIONS[spec.activation], h.to(accumulation_dtype(h.dtype)), to_a.to(accumulation_dtype(h.dtype))
    a = act.forward(high, spec.alpha, spec.limit, spec.interleaved)
    to_weights = h.new_empty(0) if permuted_probs is None else (to_a * a).sum(1).to(permuted_probs.dtype)
    to_h = act.backward(high, scale_rows(to_a, permuted_probs), spec.alpha, spec.limit, spec.interleaved)
    return to_h.to(h.dtype).contiguous(), scale_rows(a, permuted_probs).to(h.dtype).contiguous(), to_weights


@opaque("grouped_mlp_forward")
def grouped_mlp_forward(
    permuted_tokens: Tensor,
    tokens_per_expert: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    permuted_probs: Tensor | None,
    tokens: Tensor | None,
    row_id_map: Tensor | None,
    cpu_metadata: Tensor | None,
    spec: GroupedMLPSpec,
) -> tuple[Tensor, Tensor]:
    """The experts' output [R, H] and what the backward needs besides the inputs: the pre-activations [R, 2I or I].

    tokens, row_id_map and cpu_metadata are not read: they are kept for the backward, instead of the rows, where they are given.
    """
    offsets = tokens_per_expert.cumsum(0).to(torch.int32)
    biased = gate_up_bias is not None or down_bias is not None
    expert = experts_of_rows(tokens_per_expert, permuted_tokens.shape[0]) if biased else tokens_per_expert
    h = grouped_gemm(permuted_tokens.to(gate_up.dtype), matrices_of(gate_up, spec.transposed), offsets)
    h = h if gate_up_bias is None else h + gate_up_bias[expert]
    a = activate(h, permuted_probs, spec)
    out = grouped_gemm(a, matrices_of(down, spec.transposed), offsets)
    if down_bias is not None:
        out = (out + scale_rows(down_bias[expert], permuted_probs)).to(out.dtype)
    return out, h


@grouped_mlp_forward.register_fake
def _(
    permuted_tokens,
    tokens_per_expert,
    gate_up,
    gate_up_bias,
    down,
    down_bias,
    permuted_probs,
    tokens,
    row_id_map,
    cpu_metadata,
    spec,
):
    out = gate_up.new_empty(permuted_tokens.shape[0], matrices_of(down, spec.transposed).shape[2])
    return out, gate_up.new_empty(permuted_tokens.shape[0], matrices_of(gate_up, spec.transposed).shape[2])


@opaque("grouped_mlp_backward", once=True)
def grouped_mlp_backward(
    grad: Tensor,
    h: Tensor,
    permuted_tokens: Tensor | None,
    tokens: Tensor | None,
    row_id_map: Tensor | None,
    cpu_metadata: Tensor | None,
    tokens_per_expert: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    permuted_probs: Tensor | None,
    spec: GroupedMLPSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of permuted_tokens, gate_up, gate_up_bias, down, down_bias, permuted_probs (empty where there is none).

    The activation is computed again. A row's weight gets <its activation, its gradient times ``down``> + <bias, gradient>: no
    output is needed.
    """
    offsets = tokens_per_expert.cumsum(0).to(torch.int32)
    to_a = grouped_gemm(grad, matrices_of(down, spec.transposed).transpose(1, 2), offsets)
    to_h, a, to_weights = activate_backward(h, to_a, permuted_probs, spec)
    to_down = grouped_outer(a, grad, offsets) if spec.transposed else grouped_outer(grad, a, offsets)
    kept, matrices = SavedRows(permuted_tokens, tokens, row_id_map, cpu_metadata), matrices_of(gate_up, spec.transposed)
    x = kept.restore(h.shape[0], matrices.shape[1]).to(gate_up.dtype)
    to_up = grouped_outer(x, to_h, offsets) if spec.transposed else grouped_outer(to_h, x, offsets)
    to_rows = grouped_gemm(to_h, matrices.transpose(1, 2), offsets).to(kept.dtype)
    to_up_bias = sum_by_expert(to_h, tokens_per_expert) if gate_up_bias is not None else h.new_empty(0)
    to_down_bias = h.new_empty(0)
    if down_bias is not None:
        to_down_bias = sum_by_expert(grad, tokens_per_expert, permuted_probs)
        if permuted_probs is not None:
            to_weights += (
                grad.to(accumulation_dtype(grad.dtype)) * down_bias[experts_of_rows(tokens_per_expert, h.shape[0])]
            ).sum(1)
    if spec.grad_scale != 1.0:
        for g in (to_up, to_up_bias, to_down, to_down_bias):
            g.mul_(spec.grad_scale)
    return to_rows, to_up, to_up_bias, to_down, to_down_bias, to_weights


def sum_by_expert(grad: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor | None = None) -> Tensor:
    """[R, n] -> [E, n]: (weighted) sums of each expert's rows, in fp32 (fp64 for fp64), in one fixed order."""
    high = grad.to(accumulation_dtype(grad.dtype))
    return torch.segment_reduce(scale_rows(high, permuted_probs), "sum", lengths=tokens_per_expert, unsafe=True).to(grad.dtype)


@grouped_mlp_backward.register_fake
def _(
    grad,
    h,
    permuted_tokens,
    tokens,
    row_id_map,
    cpu_metadata,
    tokens_per_expert,
    gate_up,
    gate_up_bias,
    down,
    down_bias,
    permuted_probs,
    spec,
):
    def like(t: Tensor | None) -> Tensor:
        return h.new_empty(0) if t is None else torch.empty_like(t)

    to_rows = h.new_empty(
        h.shape[0], matrices_of(gate_up, spec.transposed).shape[1], dtype=SavedRows(permuted_tokens, tokens).dtype
    )
    return to_rows, like(gate_up), like(gate_up_bias), like(down), like(down_bias), like(permuted_probs)


def _save(ctx, inputs, _, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd would write zeros for h's
    permuted_tokens, tokens_per_expert, gate_up, gate_up_bias, down, down_bias, permuted_probs, *arrived, ctx.spec = inputs
    ctx.save_for_backward(
        output[1],
        *SavedRows.smallest(permuted_tokens, *arrived),
        tokens_per_expert,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        permuted_probs,
    )
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor | None, _):
    saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    to_rows, *found = grouped_mlp_backward(grad.contiguous(), *saved, ctx.spec)
    rest = (None if t is None else g for t, g in zip(saved[6:], found))
    return to_rows, None, *rest, *[None] * 4


grouped_mlp_forward.register_autograd(_backward, setup_context=_save)


@takes_spec
def _grouped_mlp(
    permuted_tokens: Tensor,
    tokens_per_expert: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    permuted_probs: Tensor | None = None,
    arrived: list[Tensor] | None = None,
    spec: GroupedMLPSpec,
) -> Tensor:
    """This rank's experts on the tokens that were dispatched to them: [R, H] in the weights' dtype.

    permuted_tokens [R, H] are sorted by expert, tokens_per_expert [e] int64 says how many each of the e experts has. gate_up
    [e, 2I, H], down [e, H, I] and the options are those of ``moefx.experts``. Each row of the result is multiplied by its
    weight, permuted_probs [R] float32 (float64 for float64; None: all are 1). The weight goes to the activation before that is
    rounded, so that it costs no rounding of its own, and its gradient is a sum over I: the result is not saved. Every parameter
    gets a gradient, zeros where no row came. Rows after the last of ``tokens_per_expert``, and their weights, may hold
    anything: what they give means nothing, and no gradient of a parameter has any of it.

    ``arrived``: tokens, row_id_map and cpu_metadata that ``dispatch`` gave with these rows. The backward then keeps them
    instead of the rows, which it restores from them: a token has a row for each of its experts here, and a capacity's worst
    case is mostly rows.
    """
    parts = parts_of(arrived)
    return grouped_mlp_forward(
        permuted_tokens, tokens_per_expert, gate_up, gate_up_bias, down, down_bias, permuted_probs, *parts, spec
    )[0]


def parts_of(arrived: list[Tensor] | None) -> list[Tensor | None]:
    """tokens, row_id_map, cpu_metadata; None where there are none."""
    if arrived is not None and len(arrived) != 3:
        raise MoefxError(
            f"arrived has {len(arrived)} tensors, not 3: pass [tokens, row_id_map, cpu_metadata] as dispatch gave them"
        )
    return [None, None, None] if arrived is None else list(arrived)


LIBRARY.define(
    "grouped_mlp(Tensor permuted_tokens, Tensor tokens_per_expert, Tensor gate_up, Tensor? gate_up_bias, Tensor down, "
    f"Tensor? down_bias, *, Tensor? permuted_probs=None, Tensor[]? arrived=None, {schema(GroupedMLPSpec)}) -> Tensor"
)
LIBRARY.impl("grouped_mlp", _grouped_mlp, "CompositeImplicitAutograd")
#: See :func:`_grouped_mlp`.
grouped_mlp = torch.ops.moefx.grouped_mlp.default
