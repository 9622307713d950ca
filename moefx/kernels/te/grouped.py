"""GroupedLinear's grouped GEMM over a rank's experts, with the row counts on the device (cuBLASLt 13.4 on Hopper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefx.kernels.te import extension
from moefx.ops.custom_op import opaque
from moefx.ops.grouped_mlp import GroupedMLPSpec, activate, activate_backward, matrices_of, scale_rows, sum_by_expert
from moefx.transports import accumulation_dtype
from moefx.transports.permute import SavedRows

#: Below, GroupedLinear is one cuBLAS call an expert, and reads the counts back: 17.5 ms where torch takes 4.45 (H200).
CUBLASLT = 130_400


def cublaslt() -> int:
    """The version of cuBLASLt, as 130400 for 13.4.0."""
    return extension().get_cublasLt_version()


class Groups:
    """Rows that lie expert by expert, as Transformer Engine describes them."""

    def __init__(self, counts: Tensor):
        self.counts = counts.to(torch.int64).contiguous()
        ends = self.counts.cumsum(0)
        self.starts = torch.cat((ends.new_zeros(1), ends))

    def rows(self, x: Tensor) -> Any:
        """x [R, a] as Transformer Engine's grouped tensor."""
        from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage

        return GroupedTensorStorage(
            shape=tuple(x.shape),
            dtype=x.dtype,
            num_tensors=len(self.counts),
            quantizer=None,
            data=x.reshape(-1),
            first_dims=self.counts,
            tensor_offsets=self.starts * x.shape[1],
        )


def _matrices_of(weight: Tensor) -> Any:
    """[E, a, b], contiguous: no copy."""
    from transformer_engine.pytorch.tensor.grouped_tensor import GroupedTensor

    experts, a, b = weight.shape
    return GroupedTensor.make_grouped_tensor_from_rowwise_data(
        num_tensors=experts, tensor_shape=(a, b), rowwise_data=weight.view(-1), dtype=weight.dtype
    )


def gemm(x: Tensor, weight: Tensor, groups: Groups, by_columns: bool) -> Tensor:
    """x [R, b] times weight [E, a, b] transposed -> [R, a]; ``by_columns``: x [R, a] times weight -> [R, b]."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor as run

    weight = weight.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[2 if by_columns else 1])
    if len(x):
        run(_matrices_of(weight), groups.rows(x), groups.rows(out), layout="NN" if by_columns else "TN")
    return out


def outer(x: Tensor, y: Tensor, groups: Groups) -> Tensor:
    """x [R, a] transposed times y [R, b], group by group -> [E, a, b]; zeros for an empty one."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor as run

    out = x.new_zeros(len(groups.counts), x.shape[1], y.shape[1])
    if len(x):
        run(groups.rows(y), groups.rows(x), _matrices_of(out), layout="NT", use_split_accumulator=True)
    return out


def _project(x: Tensor, weight: Tensor, groups: Groups, transposed: bool) -> Tensor:
    return gemm(x.contiguous(), weight, groups, by_columns=transposed)


@opaque("te_grouped_mlp")
def te_grouped_mlp(
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
    """As ``moefx.grouped_mlp``; and the pre-activations [R, 2I or I] for the backward.

    That saves tokens, row_id_map and cpu_metadata instead of the rows where they are given.
    """
    groups = Groups(tokens_per_expert)
    h = _project(permuted_tokens.to(gate_up.dtype), gate_up, groups, spec.transposed)
    h = h if gate_up_bias is None else h + _of_rows(gate_up_bias, tokens_per_expert, len(h))
    out = _project(activate(h, permuted_probs, spec), down, groups, spec.transposed)
    if down_bias is not None:
        out = (out + scale_rows(_of_rows(down_bias, tokens_per_expert, len(out)), permuted_probs)).to(out.dtype)
    return out, h


def _of_rows(bias: Tensor, tokens_per_expert: Tensor, rows: int) -> Tensor:
    return bias.repeat_interleave(tokens_per_expert, dim=0, output_size=rows)


@te_grouped_mlp.register_fake
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
    high, out = matrices_of(gate_up, spec.transposed).shape[2], matrices_of(down, spec.transposed).shape[2]
    return gate_up.new_empty(permuted_tokens.shape[0], out), gate_up.new_empty(permuted_tokens.shape[0], high)


@opaque("te_grouped_mlp_backward", once=True)
def te_grouped_mlp_backward(
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
    """Gradients of permuted_tokens, gate_up, gate_up_bias, down, down_bias, permuted_probs (empty where there is none)."""
    groups, grad = Groups(tokens_per_expert), grad.contiguous()
    to_a = gemm(grad, down, groups, by_columns=not spec.transposed)
    to_h, a, to_weights = activate_backward(h, to_a, permuted_probs, spec)
    kept = SavedRows(permuted_tokens, tokens, row_id_map, cpu_metadata)
    x = kept.restore(h.shape[0], matrices_of(gate_up, spec.transposed).shape[1]).to(gate_up.dtype).contiguous()
    to_down = outer(a, grad, groups) if spec.transposed else outer(grad, a, groups)
    to_up = outer(x, to_h, groups) if spec.transposed else outer(to_h, x, groups)
    to_rows = gemm(to_h, gate_up, groups, by_columns=not spec.transposed).to(kept.dtype)
    to_up_bias = sum_by_expert(to_h, tokens_per_expert) if gate_up_bias is not None else h.new_empty(0)
    to_down_bias = h.new_empty(0)
    if down_bias is not None:
        to_down_bias = sum_by_expert(grad, tokens_per_expert, permuted_probs)
        if permuted_probs is not None:
            to_weights += (grad.to(accumulation_dtype(grad.dtype)) * _of_rows(down_bias, tokens_per_expert, len(grad))).sum(1)
    if spec.grad_scale != 1.0:
        for g in (to_up, to_up_bias, to_down, to_down_bias):
            g.mul_(spec.grad_scale)
    return to_rows, to_up, to_up_bias, to_down, to_down_bias, to_weights


@te_grouped_mlp_backward.register_fake
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
        return h.new_empty(0) if t is None else t.new_empty(t.shape)

    to_rows = h.new_empty(
        h.shape[0], matrices_of(gate_up, spec.transposed).shape[1], dtype=SavedRows(permuted_tokens, tokens).dtype
    )
    return to_rows, like(gate_up), like(gate_up_bias), like(down), like(down_bias), like(permuted_probs)


def _save(ctx, inputs, _, output) -> None:
    ctx.set_materialize_grads(False)
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


def _backward(ctx, grad: Tensor | None, _: Tensor | None):
    saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    to_rows, *found = te_grouped_mlp_backward(grad, *saved, ctx.spec)
    rest = (None if t is None else g for t, g in zip(saved[6:], found))
    return to_rows, None, *rest, *[None] * 4


te_grouped_mlp.register_autograd(_backward, setup_context=_save)
