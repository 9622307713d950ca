"""The routed experts as one operation: forward and backward around two grouped GEMMs and four, nothing but rows in between.

Kept for the backward: the inputs, where each row went, and the pre-activations. Activations, gathered tokens and rows of
gradients are recomputed there. The plan is SonicMoE's (arXiv 2512.14080): the weight of a row multiplies its activation, so
that its gradient is a sum over the intermediate size and no expert's output is kept; all sums over experts and tokens have
one fixed order. Nothing waits for the device.

``fused_experts`` is all of a process's, from tokens to tokens; ``fused_grouped_mlp`` one rank's, on the rows that a dispatch
brought and a combine takes back. They are declared by :mod:`moefx.ops.custom_op`: of a small call's forward with gradients the
host took 137 us around ``torch.library.custom_op`` and takes 71, of its backward 171 and 141 (kernels replaced by stand-ins,
two shared cores of an EPYC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.kernels import grouped_gemm
from moefx.ops import ExpertsSpec, has_zero_computation_experts
from moefx.ops.custom_op import FIRST_INPUT, opaque
from moefx.ops.grouped_mlp import GroupedMLPSpec, matrices_of, save_for_backward
from moefx.transports.permute import SavedRows

#: The activations that :mod:`moefx.kernels.expert_activation` has kernels for.
KNOWN = frozenset(
    {
        "swiglu",
        "geglu_tanh",
        "geglu",
        "reglu",
        "clamped_swiglu",
        "oai_swiglu",
        "softcapped_swiglu",
        "relu2",
        "silu",
        "gelu",
        "gelu_tanh",
        "relu",
    }
)

#: In the operations below: gate_up, gate_up_bias, down, down_bias.
Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def _gradients(
    to_out: Tensor,
    h: Tensor,
    rows: Callable[[], Tensor],
    bounds: Tensor,
    weights: Weights,
    spec: ExpertsSpec,
    gemm: str,
    needs: Sequence[bool],
    permuted_probs: Tensor | None = None,
    order: Tensor | None = None,
    by_down: Callable[[Tensor], Tensor] | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of the rows [R, H], of the four ``weights`` and of ``permuted_probs``; None for those not in ``needs``.

    They follow from to_out [R, H], the gradient of the weighted rows, not yet multiplied by ``permuted_probs``. The gradient of
    ``permuted_probs`` is [R], or [T, K] with ``order`` [R], the flat positions of the rows, and lacks the part of down's bias.
    ``by_down`` multiplies to_out with matrices [E, H, I] group by group, where there are fewer tokens to round than rows. The
    gradients of the four weights are multiplied by ``grad_scale``.
    """
    from moefx.kernels import expert_activation as act

    gate_up, gate_up_bias, down, down_bias = weights
    offsets = bounds[1:]
    of_down = bounds[: down.shape[0] + 1]
    matrices = matrices_of(down, spec.transposed).transpose(1, 2)
    to_a = by_down(matrices) if by_down else grouped_gemm.rows(gemm, to_out, matrices, of_down)
    to_h, weighted, to_weights = act.backward(h, gate_up_bias, offsets, to_a, spec, permuted_probs, order)
    del to_a

    def outer(of_in: Tensor, of_out: Tensor, bounds: Tensor) -> Tensor:
        pair = (of_in, of_out) if spec.transposed else (of_out, of_in)
        return grouped_gemm.outer(gemm, *pair, bounds, grad_scale)

    found: list[Tensor | None] = [None] * 4
    if needs[3]:
        found[2] = outer(weighted, to_out, of_down)
    if needs[4]:
        assert down_bias is not None
        found[3] = act.segment_sum(to_out, offsets, down_bias.dtype, permuted_probs, order)
    del weighted
    if needs[1]:
        found[0] = outer(rows().to(gate_up.dtype), to_h, bounds)
    if needs[2]:
        assert gate_up_bias is not None
        found[1] = act.segment_sum(to_h, offsets, gate_up_bias.dtype)
    for of_bias in (found[1], found[3]):
        if of_bias is not None and grad_scale != 1.0:
            of_bias.mul_(grad_scale)
    if not needs[0]:
        return None, found, to_weights
    return grouped_gemm.rows(gemm, to_h, matrices_of(gate_up, spec.transposed).transpose(1, 2), bounds), found, to_weights


def _or_empty(found: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in found]


# --- experts ---------------------------------------------------------------------------------------------------------


@opaque("fused_experts")
def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    spec: ExpertsSpec,
    gemm: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, H] in x's dtype; then what the backward reads.

    That is h [T*K, 2I or I], order and inverse [T*K], bounds [E + 1] (int32). Without ``keep`` h is empty, and the backward
    recomputes it.
    """
    from moefx.kernels import expert_activation as act
    from moefx.kernels.counting_sort import sort_by_expert
    from moefx.kernels.permute import reduce

    top_k, experts = topk_ids.shape[1], down.shape[0] if has_zero_computation_experts(gate_up, down) else 0
    order, inverse, bounds = sort_by_expert(topk_ids, gate_up.shape[0])
    if experts:
        bounds = torch.minimum(bounds, bounds[experts])
    h = grouped_gemm.of_tokens(gemm, x.to(gate_up.dtype), order, inverse, top_k, matrices_of(gate_up, spec.transposed), bounds)
    a = act.forward(h, gate_up_bias, bounds[1:], spec)
    rows = grouped_gemm.rows(gemm, a, matrices_of(down, spec.transposed), bounds[: down.shape[0] + 1])
    del a
    y = reduce(rows, inverse, top_k, x.dtype, weights=topk_weights, index=topk_ids, bias=down_bias, experts=experts)
    return y, h if keep else h.new_empty(0), order, inverse, bounds


@fused_experts.register_fake
def _(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, spec, gemm, keep):
    rows = topk_ids.shape[0] * topk_ids.shape[1]
    integers = [topk_ids.new_empty(n, dtype=torch.int32) for n in (rows, rows, gate_up.shape[0] + 1)]
    h = gate_up.new_empty(rows, matrices_of(gate_up, spec.transposed).shape[2]) if keep else gate_up.new_empty(0)
    return torch.empty_like(x), h, *integers


@opaque("fused_experts_backward", once=True)
def fused_experts_backward(
    grad: Tensor,
    h: Tensor,
    order: Tensor,
    inverse: Tensor,
    bounds: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    spec: ExpertsSpec,
    gemm: str,
    keep: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, topk_weights, gate_up, gate_up_bias, down, down_bias.

    ``needs``: of which of them, without topk_weights, which always gets one; the others are empty.
    """
    from moefx.kernels.permute import expand, reduce

    top_k, experts = topk_ids.shape[1], down.shape[0] if has_zero_computation_experts(gate_up, down) else 0
    grad = grad.to(gate_up.dtype)
    if not keep:
        h = grouped_gemm.of_tokens(
            gemm, x.to(gate_up.dtype), order, inverse, top_k, matrices_of(gate_up, spec.transposed), bounds
        )

    def of_tokens(matrices: Tensor) -> Tensor:
        return grouped_gemm.of_tokens(gemm, grad, order, inverse, top_k, matrices, bounds[: down.shape[0] + 1])

    to_rows, found, to_weights = _gradients(
        expand(grad, inverse, top_k),
        h,
        lambda: expand(x.to(gate_up.dtype), inverse, top_k),
        bounds,
        (gate_up, gate_up_bias, down, down_bias),
        spec,
        gemm,
        needs,
        topk_weights,
        order,
        of_tokens if gemm == "fp8" else None,
    )
    assert to_weights is not None
    if down_bias is not None:  # what a row's weight multiplies has the bias in it
        to_weights += F.linear(grad, down_bias).float().gather(1, topk_ids)
    if experts:
        to_weights.masked_fill_(topk_ids >= experts, 0.0)
    to_x = None if to_rows is None else reduce(to_rows, inverse, top_k, x.dtype, index=topk_ids, experts=experts)
    first, *rest = _or_empty([to_x, *found], h)
    return first, to_weights.to(topk_weights.dtype), *rest  # type: ignore[return-value]


@fused_experts_backward.register_fake
def _(
    grad,
    h,
    order,
    inverse,
    bounds,
    x,
    topk_ids,
    topk_weights,
    gate_up,
    gate_up_bias,
    down,
    down_bias,
    spec,
    gemm,
    keep,
    needs,
):
    made = [
        torch.empty_like(t) if need else h.new_empty(0) for t, need in zip((x, gate_up, gate_up_bias, down, down_bias), needs)
    ]
    return made[0], torch.empty_like(topk_weights), *made[1:]


def _save(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd would write zeros for h's
    x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, *ctx.options = inputs
    ctx.save_for_backward(*output[1:], x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor | None, *_: Tensor | None):
    asked = ctx.needs_input_grad[FIRST_INPUT:]
    if grad is None:
        return (None,) * 10
    needs = [asked[0], *asked[3:7]]
    found = fused_experts_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    to_x, to_weights, *rest = found
    rest = [t if need else None for t, need in zip(rest, needs[1:])]
    return to_x if needs[0] else None, None, to_weights if asked[2] else None, *rest, None, None, None


fused_experts.register_autograd(_backward, setup_context=_save)


# --- a rank's experts ------------------------------------------------------------------------------------------------


def _bounds(tokens_per_expert: Tensor) -> Tensor:
    """tokens_per_expert [E] -> where each expert's rows begin, and the end of the last [E + 1]; int32."""
    return F.pad(tokens_per_expert.cumsum(0), (1, 0)).to(torch.int32)


@opaque("fused_grouped_mlp")
def fused_grouped_mlp(
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
    gemm: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The experts' output [R, H] in the weights' dtype, and the pre-activations h [R, 2I or I] for the backward.

    The backward keeps tokens, row_id_map and cpu_metadata instead of the rows where they are given. Without ``keep`` h is
    empty, and recomputed there.
    """
    from moefx.kernels import expert_activation as act

    bounds = _bounds(tokens_per_expert)
    h = grouped_gemm.rows(gemm, permuted_tokens.to(gate_up.dtype), matrices_of(gate_up, spec.transposed), bounds)
    a = act.forward(h, gate_up_bias, bounds[1:], spec, permuted_probs)
    out = grouped_gemm.rows(gemm, a, matrices_of(down, spec.transposed), bounds)
    if down_bias is not None:
        act.add_bias_(out, down_bias, bounds[1:], permuted_probs)
    return out, h if keep else h.new_empty(0)


@fused_grouped_mlp.register_fake
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
    gemm,
    keep,
):
    wide, out = matrices_of(gate_up, spec.transposed).shape[2], matrices_of(down, spec.transposed).shape[2]
    return gate_up.new_empty(permuted_tokens.shape[0], out), gate_up.new_empty(
        permuted_tokens.shape[0], wide
    ) if keep else gate_up.new_empty(0)


@opaque("fused_grouped_mlp_backward", once=True)
def fused_grouped_mlp_backward(
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
    gemm: str,
    keep: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of permuted_tokens, gate_up, gate_up_bias, down, down_bias, permuted_probs.

    ``needs``: of which of them; the others are empty.
    """
    from moefx.kernels import expert_activation as act

    bounds = _bounds(tokens_per_expert)
    kept, hidden = SavedRows(permuted_tokens, tokens, row_id_map, cpu_metadata), matrices_of(gate_up, spec.transposed).shape[1]
    if not keep:
        kept = SavedRows(kept.restore(grad.shape[0], hidden))
        h = grouped_gemm.rows(
            gemm, kept.restore(grad.shape[0], hidden).to(gate_up.dtype), matrices_of(gate_up, spec.transposed), bounds
        )
    to_rows, found, to_weights = _gradients(
        grad,
        h,
        lambda: kept.restore(grad.shape[0], hidden),
        bounds,
        (gate_up, gate_up_bias, down, down_bias),
        spec,
        gemm,
        needs,
        permuted_probs,
        grad_scale=spec.grad_scale,
    )
    if not needs[5]:
        to_weights = None
    if to_weights is not None:
        assert permuted_probs is not None
        if down_bias is not None:  # what a row's weight multiplies has the bias in it
            act.add_dot_(to_weights, grad, down_bias, bounds[1:])
        to_weights = to_weights.to(permuted_probs.dtype)
    to_rows = None if to_rows is None else to_rows.to(kept.dtype)
    return tuple(_or_empty([to_rows, *found, to_weights], h))  # type: ignore[return-value]


@fused_grouped_mlp_backward.register_fake
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
    gemm,
    keep,
    needs,
):
    to_rows = h.new_empty(
        grad.shape[0], matrices_of(gate_up, spec.transposed).shape[1], dtype=SavedRows(permuted_tokens, tokens).dtype
    )
    given = zip((to_rows, gate_up, gate_up_bias, down, down_bias, permuted_probs), needs)
    return tuple(torch.empty_like(t) if need else h.new_empty(0) for t, need in given)


def _backward_mlp(ctx, grad: Tensor | None, _: Tensor | None):
    asked = ctx.needs_input_grad[FIRST_INPUT:]
    if grad is None:
        return (None,) * 13
    needs = [asked[0], *asked[2:7]]
    found = fused_grouped_mlp_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    to_rows, *rest = [t if need else None for t, need in zip(found, needs)]
    return to_rows, None, *rest, *[None] * 6


fused_grouped_mlp.register_autograd(_backward_mlp, setup_context=save_for_backward)
