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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.kernels import grouped_gemm
from moefx.ops import ExpertsSpec, has_zero_computation_experts
from moefx.ops.custom_op import FIRST_INPUT, opaque
from moefx.ops.expert_weights import ExpertWeights
from moefx.ops.grouped_mlp import GroupedMLPSpec, matrices_of, save_for_backward, wanted
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


class _Input(NamedTuple):
    """The input of gate_up, for a backward that may need none of it."""

    whole: Callable[[], Tensor]  #: [R, H]
    gathered: Callable[[], tuple[Tensor, Tensor | None]]  #: [T, H], and the token of each row [R]; or [R, H] and None


def _gradients(
    to_out: Tensor,
    h: Tensor,
    given: _Input,
    bounds: Tensor,
    weights: ExpertWeights,
    spec: ExpertsSpec,
    gemm: str,
    needs: Sequence[bool],
    permuted_probs: Tensor | None = None,
    order: Tensor | None = None,
    by_down: Callable[[Tensor], Tensor] | None = None,
    grad_scale: float = 1.0,
    kept: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
    """Gradients of the rows [R, H], of each of ``weights`` and of ``permuted_probs``; None for those not in ``needs``.

    They follow from to_out [R, H], the gradient of the weighted rows, not yet multiplied by ``permuted_probs``. The gradient of
    ``permuted_probs`` is [R], or [T, K] with ``order`` [R], the flat positions of the rows, and lacks the part of down's bias.
    ``by_down`` multiplies to_out with matrices [E, H, I] group by group, where there are fewer tokens to round than rows. The
    gradients of matrices and biases are multiplied by ``grad_scale``, not those of factors of updates. ``kept``: x a' [R, r]
    of the updates of gate_up and of down, as the forward computed them: the latter's rows are not weighted.
    """
    from moefx.kernels import expert_activation as act
    from moefx.kernels import low_rank

    gate_up, gate_up_bias, down, down_bias, *_ = weights
    of_rows, *of_weights = needs
    need = dict(zip(ExpertWeights._fields, of_weights))
    found: dict[str, Tensor] = {}
    offsets = bounds[1:]
    of_down = bounds[: down.shape[0] + 1]
    matrices = matrices_of(down, spec.transposed).transpose(1, 2)
    to_a = by_down(matrices) if by_down else grouped_gemm.rows(gemm, to_out, matrices, of_down)
    update = weights.down_lora
    if update is not None:
        inner = low_rank.into(to_out, update.b.transpose(1, 2), of_down)
        low_rank.add_(to_a, inner, update.a, of_down)
    to_h, weighted, to_weights = act.backward(h, gate_up_bias, offsets, to_a, spec, permuted_probs, order)
    del to_a

    def outer(of_in: Tensor, of_out: Tensor, bounds: Tensor) -> Tensor:
        pair = (of_in, of_out) if spec.transposed else (of_out, of_in)
        return grouped_gemm.outer(gemm, *pair, bounds, grad_scale)

    if need["down"]:
        found["down"] = outer(weighted, to_out, of_down)
    if update is not None and need["down_lora_a"]:
        found["down_lora_a"] = low_rank.outer(inner, weighted, of_down)
    if update is not None and need["down_lora_b"]:
        if kept[1] is None:
            reduced, by_row = low_rank.into(weighted, update.a, of_down), {}
        else:
            reduced, by_row = kept[1], {"weights": permuted_probs, "order": order}
        found["down_lora_b"] = low_rank.outer(reduced, to_out, of_down, transposed=True, **by_row)
    if need["down_bias"]:
        assert down_bias is not None
        found["down_bias"] = act.segment_sum(to_out, offsets, down_bias.dtype, permuted_probs, order)
    del weighted
    update = weights.gate_up_lora
    if update is not None:
        inner = low_rank.into(to_h, update.b.transpose(1, 2), bounds)
    if need["gate_up"] or need["gate_up_lora_a"] or need["gate_up_lora_b"]:
        x, index = (given.whole(), None) if need["gate_up"] else given.gathered()
        x = x.to(gate_up.dtype)
        if need["gate_up"]:
            found["gate_up"] = outer(x, to_h, bounds)
        if update is not None and need["gate_up_lora_a"]:
            found["gate_up_lora_a"] = low_rank.outer(inner, x, bounds, index)
        if update is not None and need["gate_up_lora_b"]:
            reduced = low_rank.into(x, update.a, bounds, index) if kept[0] is None else kept[0]
            found["gate_up_lora_b"] = low_rank.outer(reduced, to_h, bounds, transposed=True)
        del x
    if need["gate_up_bias"]:
        assert gate_up_bias is not None
        found["gate_up_bias"] = act.segment_sum(to_h, offsets, gate_up_bias.dtype)
    for name in ("gate_up_bias", "down_bias"):
        if name in found and grad_scale != 1.0:
            found[name].mul_(grad_scale)
    to_rows = None
    if of_rows:
        to_rows = grouped_gemm.rows(gemm, to_h, matrices_of(gate_up, spec.transposed).transpose(1, 2), bounds)
        if update is not None:
            low_rank.add_(to_rows, inner, update.a, bounds)
    return to_rows, [found.get(name) for name in ExpertWeights._fields], to_weights


def _found(*gradients: Tensor | None) -> list[Tensor]:
    return [t for t in gradients if t is not None]


def _by_need(made: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What :func:`_found` left, each in its place again."""
    left = iter(made)
    return [next(left) if need else None for need in needs]


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
    gate_up_lora_a: Tensor | None,
    gate_up_lora_b: Tensor | None,
    down_lora_a: Tensor | None,
    down_lora_b: Tensor | None,
    spec: ExpertsSpec,
    gemm: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, H] in x's dtype; then what the backward reads.

    That is h [T*K, 2I or I], x a' of the updates of gate_up and of down [T*K, r], order and inverse [T*K], bounds [E + 1]
    (int32). Without ``keep`` h and the two are empty, and the backward recomputes them; so are the two without updates.
    """
    from moefx.kernels import expert_activation as act
    from moefx.kernels import low_rank
    from moefx.kernels.counting_sort import sort_by_expert
    from moefx.kernels.permute import reduce

    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    top_k, experts = topk_ids.shape[1], down.shape[0] if has_zero_computation_experts(gate_up, down) else 0
    order, inverse, bounds = sort_by_expert(topk_ids, gate_up.shape[0])
    if experts:
        bounds = torch.minimum(bounds, bounds[experts])
    h, inner = _pre_activations(gemm, x, order, inverse, top_k, weights, bounds, spec)
    a = act.forward(h, gate_up_bias, bounds[1:], spec)
    of_down = bounds[: down.shape[0] + 1]
    rows = grouped_gemm.rows(gemm, a, matrices_of(down, spec.transposed), of_down)
    inner_of_down = None if weights.down_lora is None else low_rank.update_(rows, a, weights.down_lora, of_down)
    del a
    y = reduce(rows, inverse, top_k, x.dtype, weights=topk_weights, index=topk_ids, bias=down_bias, experts=experts)
    kept = [h.new_empty(0) if t is None or not keep else t for t in (h, inner, inner_of_down)]
    return y, kept[0], kept[1], kept[2], order, inverse, bounds


def _pre_activations(
    gemm: str,
    x: Tensor,
    order: Tensor,
    inverse: Tensor,
    top_k: int,
    weights: ExpertWeights,
    bounds: Tensor,
    spec: ExpertsSpec,
) -> tuple[Tensor, Tensor | None]:
    """h [T*K, 2I or I] of tokens x [T, H], and x a' of its update [T*K, r]."""
    from moefx.kernels import low_rank

    x = x.to(weights.gate_up.dtype)
    h = grouped_gemm.of_tokens(gemm, x, order, inverse, top_k, matrices_of(weights.gate_up, spec.transposed), bounds)
    update = weights.gate_up_lora
    return h, None if update is None else low_rank.update_(h, x, update, bounds, order // top_k)


@fused_experts.register_fake
def _(x, topk_ids, topk_weights, gate_up, *others):
    _, _, _, gate_up_lora_a, _, down_lora_a, _, spec, _, keep = others
    rows = topk_ids.shape[0] * topk_ids.shape[1]
    integers = [topk_ids.new_empty(n, dtype=torch.int32) for n in (rows, rows, gate_up.shape[0] + 1)]
    widths = [
        matrices_of(gate_up, spec.transposed).shape[2],
        *(a if a is None else a.shape[1] for a in (gate_up_lora_a, down_lora_a)),
    ]
    kept = [gate_up.new_empty(0) if n is None or not keep else gate_up.new_empty(rows, n) for n in widths]
    return torch.empty_like(x), *kept, *integers


@opaque("fused_experts_backward", once=True)
def fused_experts_backward(
    grad: Tensor,
    h: Tensor,
    inner_of_gate_up: Tensor,
    inner_of_down: Tensor,
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
    gate_up_lora_a: Tensor | None,
    gate_up_lora_b: Tensor | None,
    down_lora_a: Tensor | None,
    down_lora_b: Tensor | None,
    spec: ExpertsSpec,
    gemm: str,
    keep: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, topk_weights and each of the weights: of those that ``needs`` says."""
    from moefx.kernels.permute import expand, reduce

    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    top_k, experts = topk_ids.shape[1], down.shape[0] if has_zero_computation_experts(gate_up, down) else 0
    grad = grad.to(gate_up.dtype)
    kept: list[Tensor | None] = [inner_of_gate_up, inner_of_down]
    if not keep:
        h, inner = _pre_activations(gemm, x, order, inverse, top_k, weights, bounds, spec)
        kept = [inner, None]

    def of_tokens(matrices: Tensor) -> Tensor:
        return grouped_gemm.of_tokens(gemm, grad, order, inverse, top_k, matrices, bounds[: down.shape[0] + 1])

    of_x, of_probs, *of_weights = needs
    to_rows, found, to_probs = _gradients(
        expand(grad, inverse, top_k),
        h,
        _Input(lambda: expand(x.to(gate_up.dtype), inverse, top_k), lambda: (x, order // top_k)),
        bounds,
        weights,
        spec,
        gemm,
        (of_x, *of_weights),
        topk_weights,
        order,
        of_tokens if gemm == "fp8" else None,
        kept=kept,
    )
    assert to_probs is not None
    if of_probs and down_bias is not None:  # what a row's weight multiplies has the bias in it
        to_probs += F.linear(grad, down_bias).float().gather(1, topk_ids)
    if experts:
        to_probs.masked_fill_(topk_ids >= experts, 0.0)
    to_x = None if to_rows is None else reduce(to_rows, inverse, top_k, x.dtype, index=topk_ids, experts=experts)
    return _found(to_x, to_probs.to(topk_weights.dtype) if of_probs else None, *found)


@fused_experts_backward.register_fake
def _(grad, h, inner_of_gate_up, inner_of_down, order, inverse, bounds, x, topk_ids, topk_weights, *others):
    *weights, _, _, _, needs = others
    return [torch.empty_like(t) for t, need in zip((x, topk_weights, *weights), needs, strict=True) if need]


def _save(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd would write zeros for h's
    *tensors, spec, gemm, keep = inputs
    ctx.options = spec, gemm, keep
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is None:
        return (None,) * 14
    of_x, _, *others = ctx.needs_input_grad[FIRST_INPUT:][:11]
    needs = [of_x, *others]
    found = fused_experts_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    to_x, *rest = _by_need(found, needs)
    return to_x, None, *rest, None, None, None


fused_experts.register_autograd(_backward, setup_context=_save)


# --- a rank's experts ------------------------------------------------------------------------------------------------


def _bounds(tokens_per_expert: Tensor) -> Tensor:
    """tokens_per_expert [E] -> where each expert's rows begin, and the end of the last [E + 1]; int32."""
    return F.pad(tokens_per_expert.cumsum(0), (1, 0)).to(torch.int32)


def _pre_activations_of_rows(gemm: str, rows: Tensor, weights: ExpertWeights, bounds: Tensor, spec: ExpertsSpec) -> Tensor:
    """h [R, 2I or I] of rows [R, H]."""
    from moefx.kernels import low_rank

    rows = rows.to(weights.gate_up.dtype)
    h = grouped_gemm.rows(gemm, rows, matrices_of(weights.gate_up, spec.transposed), bounds)
    if weights.gate_up_lora is not None:
        low_rank.update_(h, rows, weights.gate_up_lora, bounds)
    return h


@opaque("fused_grouped_mlp")
def fused_grouped_mlp(
    permuted_tokens: Tensor,
    tokens_per_expert: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gate_up_lora_a: Tensor | None,
    gate_up_lora_b: Tensor | None,
    down_lora_a: Tensor | None,
    down_lora_b: Tensor | None,
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
    from moefx.kernels import low_rank

    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    bounds = _bounds(tokens_per_expert)
    h = _pre_activations_of_rows(gemm, permuted_tokens, weights, bounds, spec)
    a = act.forward(h, gate_up_bias, bounds[1:], spec, permuted_probs)
    out = grouped_gemm.rows(gemm, a, matrices_of(down, spec.transposed), bounds)
    if weights.down_lora is not None:
        low_rank.update_(out, a, weights.down_lora, bounds)
    if down_bias is not None:
        act.add_bias_(out, down_bias, bounds[1:], permuted_probs)
    return out, h if keep else h.new_empty(0)


@fused_grouped_mlp.register_fake
def _(permuted_tokens, tokens_per_expert, gate_up, gate_up_bias, down, *others):
    *_, spec, _, keep = others
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
    gate_up_lora_a: Tensor | None,
    gate_up_lora_b: Tensor | None,
    down_lora_a: Tensor | None,
    down_lora_b: Tensor | None,
    permuted_probs: Tensor | None,
    spec: GroupedMLPSpec,
    gemm: str,
    keep: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of permuted_tokens, each of the weights, and permuted_probs: of those that ``needs`` says."""
    from moefx.kernels import expert_activation as act

    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    bounds = _bounds(tokens_per_expert)
    kept, hidden = SavedRows(permuted_tokens, tokens, row_id_map, cpu_metadata), matrices_of(gate_up, spec.transposed).shape[1]
    if not keep:
        kept = SavedRows(kept.restore(grad.shape[0], hidden))
        h = _pre_activations_of_rows(gemm, kept.restore(grad.shape[0], hidden), weights, bounds, spec)

    def rows() -> Tensor:
        return kept.restore(grad.shape[0], hidden)

    *of_rows_and_weights, of_probs = needs
    to_rows, found, to_probs = _gradients(
        grad,
        h,
        _Input(rows, lambda: (rows(), None)),
        bounds,
        weights,
        spec,
        gemm,
        of_rows_and_weights,
        permuted_probs,
        grad_scale=spec.grad_scale,
    )
    if not of_probs:
        to_probs = None
    if to_probs is not None:
        assert permuted_probs is not None
        if down_bias is not None:  # what a row's weight multiplies has the bias in it
            act.add_dot_(to_probs, grad, down_bias, bounds[1:])
        to_probs = to_probs.to(permuted_probs.dtype)
    return _found(None if to_rows is None else to_rows.to(kept.dtype), *found, to_probs)


@fused_grouped_mlp_backward.register_fake
def _(grad, h, permuted_tokens, tokens, row_id_map, cpu_metadata, tokens_per_expert, gate_up, *others):
    *weights, spec, _, _, needs = others
    hidden, dtype = matrices_of(gate_up, spec.transposed).shape[1], SavedRows(permuted_tokens, tokens).dtype
    to_rows = h.new_empty(grad.shape[0], hidden, dtype=dtype)
    return [torch.empty_like(t) for t, need in zip((to_rows, gate_up, *weights), needs, strict=True) if need]


def _backward_mlp(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 17
    needs = wanted(ctx)
    found = fused_grouped_mlp_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs)
    to_rows, *rest = _by_need(found, needs)
    return to_rows, None, *rest, *[None] * 6


fused_grouped_mlp.register_autograd(_backward_mlp, setup_context=save_for_backward)
