"""``grouped_mlp``: a rank's experts as one opaque operation, for numbers of rows that depend on data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moefx.errors import MoefxError
from moefx.ops.activations import ACTIVATIONS
from moefx.ops.custom_op import FIRST_INPUT, opaque
from moefx.ops.expert_weights import ExpertWeights, LowRank
from moefx.ops.grouped_mm import grouped_gemm, grouped_outer
from moefx.ops.moe import LORA_SCHEMA, ExpertsSpec
from moefx.ops.registry import LIBRARY
from moefx.ops.spec import schema, takes_spec
from moefx.transports import accumulation_dtype
from moefx.transports.permute import SavedRows


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

    #: Multiplies the gradients of the matrices and biases, not those of permuted_probs and of the factors of updates.
    grad_scale: float = 1.0

    @classmethod
    def of(cls, experts: ExpertsSpec) -> GroupedMLPSpec:
        """The options of experts whose gradients are not scaled."""
        # one by one: Dynamo of torch 2.11 does not trace vars(experts)
        return cls(experts.activation, experts.alpha, experts.limit, experts.transposed, experts.interleaved)


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


#: Grouped GEMMs of 16 bits want rows of whole 16 bytes: ranks are multiples of this.
_RANKS = 8


class Products(Protocol):
    """Products of rows [R, n] that lie expert by expert with the experts' matrices, as a model stores them."""

    def forward(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """x [R, in] times each expert's matrix: [R, out]. weight [E, out, in], or [E, in, out] if ``transposed``."""

    def backward(self, grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """The gradient [R, in] of what :meth:`forward` was given, from that [R, out] of what it gave."""

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """x [R, a], y [R, b] -> [E, a, b], contiguous: x.T @ y of each expert's rows; zeros where there are none."""


def _project(products: Products, x: Tensor, weight: Tensor, update: LowRank | None, transposed: bool) -> Tensor:
    out = products.forward(x, weight, transposed)
    return out if update is None else out + products.forward(products.forward(x, update.a, False), update.b, False)


def mlp(
    products: Products,
    permuted_tokens: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    permuted_probs: Tensor | None,
    spec: GroupedMLPSpec,
) -> tuple[Tensor, Tensor]:
    """The experts' output [R, H], and the pre-activations [R, 2I or I]."""
    weights = weights.padded(_RANKS)
    gate_up, gate_up_bias, down, down_bias, *_ = weights
    biased = gate_up_bias is not None or down_bias is not None
    expert = experts_of_rows(tokens_per_expert, permuted_tokens.shape[0]) if biased else tokens_per_expert
    h = _project(products, permuted_tokens.to(gate_up.dtype), gate_up, weights.gate_up_lora, spec.transposed)
    h = h if gate_up_bias is None else h + gate_up_bias[expert]
    out = _project(products, activate(h, permuted_probs, spec), down, weights.down_lora, spec.transposed)
    if down_bias is not None:
        out = (out + scale_rows(down_bias[expert], permuted_probs)).to(out.dtype)
    return out, h


class _Gradients:
    """Gradients of projections with low-rank updates: of their inputs, and of the weights that ``needs`` names."""

    def __init__(self, products: Products, spec: GroupedMLPSpec, needs: dict[str, bool]):
        self.products, self.spec, self.needs = products, spec, needs
        self.found: dict[str, Tensor] = {}

    def scaled(self, grad: Tensor) -> Tensor:
        """``grad`` times the scale of a rank's gradients, in place."""
        return grad if self.spec.grad_scale == 1.0 else grad.mul_(self.spec.grad_scale)

    def through(self, grad: Tensor, weight: Tensor, update: LowRank | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of a projection's input, and that of x a' [R, r], which its update has between the factors."""
        to_x = self.products.backward(grad, weight, self.spec.transposed)
        if update is None:
            return to_x, None
        inner = self.products.backward(grad, update.b, False)
        return to_x + self.products.backward(inner, update.a, False), inner

    def of_weights(
        self, name: str, x: Callable[[], Tensor], grad: Tensor, inner: Tensor | None, update: LowRank | None
    ) -> None:
        """Those of the weight ``name`` and of the factors of its update; x(): the projection's input."""
        outer, a, b = self.products.outer, f"{name}_lora_a", f"{name}_lora_b"
        if not any(self.needs[n] for n in (name, a, b)):
            return
        rows = x()
        if self.needs[name]:
            self.found[name] = self.scaled(outer(rows, grad) if self.spec.transposed else outer(grad, rows))
        if self.needs[a]:
            assert inner is not None
            self.found[a] = outer(inner, rows)
        if self.needs[b]:
            assert update is not None
            self.found[b] = outer(grad, self.products.forward(rows, update.a, False))


def mlp_gradients(
    products: Products,
    grad: Tensor,
    h: Tensor,
    kept: SavedRows,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    permuted_probs: Tensor | None,
    spec: GroupedMLPSpec,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of permuted_tokens, of each of ``weights``, and of permuted_probs; None for those not in ``needs``.

    The activation is computed again. A row's weight gets <its activation, its gradient times ``down``> + <bias, gradient>: no
    output is needed.
    """
    given, weights = weights, weights.padded(_RANKS)
    gate_up, down, down_bias = weights.gate_up, weights.down, weights.down_bias
    of_rows, *of_weights, of_probs = needs
    wanted = dict(zip(ExpertWeights._fields, of_weights, strict=True))
    gradients = _Gradients(products, spec, wanted)
    to_a, inner = gradients.through(grad, down, weights.down_lora)
    to_h, a, to_probs = activate_backward(h, to_a, permuted_probs, spec)
    gradients.of_weights("down", lambda: a, grad, inner, weights.down_lora)
    found = gradients.found
    if wanted["down_bias"]:
        found["down_bias"] = gradients.scaled(sum_by_expert(grad, tokens_per_expert, permuted_probs))
    if of_probs and down_bias is not None:
        bias = down_bias[experts_of_rows(tokens_per_expert, h.shape[0])]
        to_probs += (grad.to(accumulation_dtype(grad.dtype)) * bias).sum(1)
    if wanted["gate_up_bias"]:
        found["gate_up_bias"] = gradients.scaled(sum_by_expert(to_h, tokens_per_expert))
    lora = weights.gate_up_lora
    to_rows, inner = gradients.through(to_h, gate_up, lora) if of_rows or lora is not None else (None, None)

    def rows() -> Tensor:
        return kept.restore(h.shape[0], matrices_of(gate_up, spec.transposed).shape[1]).to(gate_up.dtype)

    gradients.of_weights("gate_up", rows, to_h, inner, lora)
    for name, factor in zip(ExpertWeights._fields[4:], given[4:], strict=True):
        if name in found and factor is not None and found[name].shape != factor.shape:  # without what was padded
            found[name] = found[name][:, : factor.shape[1], : factor.shape[2]].contiguous()
    return [
        to_rows.to(kept.dtype) if of_rows and to_rows is not None else None,
        *[found.get(name) for name in ExpertWeights._fields],
        to_probs if of_probs else None,
    ]


def sum_by_expert(grad: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor | None = None) -> Tensor:
    """[R, n] -> [E, n]: (weighted) sums of each expert's rows, in fp32 (fp64 for fp64), in one fixed order."""
    high = grad.to(accumulation_dtype(grad.dtype))
    return torch.segment_reduce(scale_rows(high, permuted_probs), "sum", lengths=tokens_per_expert, unsafe=True).to(grad.dtype)


# --- the same as opaque operations -----------------------------------------------------------------------------------


def define(name: str, products: Callable[[Tensor], Products]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Defines :func:`mlp` as the opaque operation ``moefx::<name>``, and its backward; returns the former.

    products: for tokens_per_expert [E]. The operation also takes tokens, row_id_map and cpu_metadata (or None), which it does
    not read: they are kept for the backward, instead of the rows, where they are given.
    """

    @opaque(name)
    def forward(
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
    ) -> tuple[Tensor, Tensor]:
        weights = ExpertWeights(
            gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b
        )
        return mlp(products(tokens_per_expert), permuted_tokens, tokens_per_expert, weights, permuted_probs, spec)

    @forward.register_fake
    def _(permuted_tokens, _, gate_up, __, down, *others):
        def rows(weight: Tensor) -> Tensor:
            return gate_up.new_empty(permuted_tokens.shape[0], matrices_of(weight, others[-1].transposed).shape[2])

        return rows(down), rows(gate_up)

    @opaque(f"{name.removesuffix('_forward')}_backward", once=True)
    def backward(
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
        needs: list[bool],
    ) -> list[Tensor]:
        kept = SavedRows(permuted_tokens, tokens, row_id_map, cpu_metadata)
        weights = ExpertWeights(
            gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b
        )
        found = mlp_gradients(
            products(tokens_per_expert), grad, h, kept, tokens_per_expert, weights, permuted_probs, spec, needs
        )
        return [t for t in found if t is not None]

    @backward.register_fake
    def _(grad, h, permuted_tokens, tokens, row_id_map, cpu_metadata, tokens_per_expert, gate_up, *others):
        *others, spec, needs = others
        dtype, hidden = SavedRows(permuted_tokens, tokens).dtype, matrices_of(gate_up, spec.transposed).shape[1]
        rows = h.new_empty(h.shape[0], hidden, dtype=dtype)
        return [t.new_empty(t.shape) for t, need in zip((rows, gate_up, *others), needs, strict=True) if need]

    def gradients(ctx, grad: Tensor | None, _: Tensor | None):
        if grad is None:
            return (None,) * 15
        needs = wanted(ctx)
        found = iter(backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs))
        to_rows, *rest = [next(found) if need else None for need in needs]
        return to_rows, None, *rest, *[None] * 4

    forward.register_autograd(gradients, setup_context=save_for_backward)
    return forward


def wanted(ctx) -> list[bool]:
    """Of a backward: whether permuted_tokens, each of the eight weights, and permuted_probs need a gradient."""
    asked = ctx.needs_input_grad[FIRST_INPUT:]
    return [asked[0], *asked[2:11]]


def save_for_backward(ctx, inputs, _, output) -> None:
    """Saves what a backward reads: pre-activations, rows or what they were permuted from, tokens_per_expert, weights, probs.

    No rows where gate_up is frozen and has no update, unless pre-activations are computed again (``keep`` is False).
    """
    ctx.set_materialize_grads(False)  # else autograd would write zeros for the pre-activations'
    permuted_tokens, tokens_per_expert, *weights_and_probs = inputs[:11]
    ctx.options = inputs[14:]
    needs = dict(zip(ExpertWeights._fields, wanted(ctx)[1:]))
    read = needs["gate_up"] or needs["gate_up_lora_a"] or needs["gate_up_lora_b"] or ctx.options[-1] is False
    saved = SavedRows.smallest(permuted_tokens, *inputs[11:14]) if read else SavedRows(permuted_tokens.new_empty(0))
    ctx.save_for_backward(output[1], *saved, tokens_per_expert, *weights_and_probs)
    ctx.mark_non_differentiable(output[1])


class TorchProducts:
    """By torch's grouped GEMM, or a loop over the experts (:mod:`moefx.ops.grouped_mm`)."""

    def __init__(self, tokens_per_expert: Tensor):
        self.offsets = tokens_per_expert.cumsum(0).to(torch.int32)

    def forward(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """See :class:`Products`."""
        return grouped_gemm(x, matrices_of(weight, transposed), self.offsets)

    def backward(self, grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """See :class:`Products`."""
        return grouped_gemm(grad, matrices_of(weight, transposed).transpose(1, 2), self.offsets)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Products`."""
        return grouped_outer(x, y, self.offsets)


grouped_mlp_forward = define("grouped_mlp_forward", TorchProducts)


@takes_spec
def _grouped_mlp(
    permuted_tokens: Tensor,
    tokens_per_expert: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    gate_up_lora_a: Tensor | None = None,
    gate_up_lora_b: Tensor | None = None,
    down_lora_a: Tensor | None = None,
    down_lora_b: Tensor | None = None,
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

    Low-rank updates are those of ``moefx.experts``, of this rank's experts.

    ``arrived``: tokens, row_id_map and cpu_metadata that ``dispatch`` gave with these rows. The backward then keeps them
    instead of the rows, which it restores from them: a token has a row for each of its experts here, and a capacity's worst
    case is mostly rows.
    """
    weights = (gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    return grouped_mlp_forward(permuted_tokens, tokens_per_expert, *weights, permuted_probs, *parts_of(arrived), spec)[0]


def parts_of(arrived: list[Tensor] | None) -> list[Tensor | None]:
    """tokens, row_id_map, cpu_metadata; None where there are none."""
    if arrived is not None and len(arrived) != 3:
        raise MoefxError(
            f"arrived has {len(arrived)} tensors, not 3: pass [tokens, row_id_map, cpu_metadata] as dispatch gave them"
        )
    return [None, None, None] if arrived is None else list(arrived)


LIBRARY.define(
    "grouped_mlp(Tensor permuted_tokens, Tensor tokens_per_expert, Tensor gate_up, Tensor? gate_up_bias, Tensor down, "
    f"Tensor? down_bias, *, {LORA_SCHEMA}, Tensor? permuted_probs=None, Tensor[]? arrived=None, {schema(GroupedMLPSpec)}) "
    "-> Tensor"
)
LIBRARY.impl("grouped_mlp", _grouped_mlp, "CompositeImplicitAutograd")
#: See :func:`_grouped_mlp`.
grouped_mlp = torch.ops.moefx.grouped_mlp.default
