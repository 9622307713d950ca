"""The torch backend: PyTorch's own fused kernels, and nothing to install.

Glue (gathers, activations, casts) is written as plain operations on purpose: Inductor fuses it around the matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moefx import ops
from moefx.backends import Backend, Kernel
from moefx.ir.graph import arguments, dtype_of, value
from moefx.kernels.attention import flash_attention
from moefx.kernels.linear_cross_entropy import linear_cross_entropy
from moefx.kernels.linear_to_fp32 import linear_to_fp32
from moefx.ops import AttentionSpec, ExpertsSpec, NormSpec, dispatch_combine, takes_spec
from moefx.ops import grouped_mlp as grouped
from moefx.ops.activations import ACTIVATIONS
from moefx.ops.expert_weights import ExpertWeights, LowRank
from moefx.ops.grouped_mm import grouped_mm

# --- norms -----------------------------------------------------------------------------------------------------------


@takes_spec
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> Tensor:
    """The kernel of ``moefx.rms_norm``."""
    # .to: under CUDA autocast F.rms_norm returns fp32 whatever it got, the operation its input's dtype
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(x.dtype)


def _refuses_rms_norm(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["offset"]:
        return f"F.rms_norm multiplies by the weight, this norm by {given['offset']} + weight"
    x, weight = dtype_of(given["x"]), dtype_of(given["weight"])
    if weight is not None and weight != x:
        return f"F.rms_norm wants one dtype, the input is {x}, the weight {weight}"
    return None


# --- attention -------------------------------------------------------------------------------------------------------


@takes_spec
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *, spec: AttentionSpec) -> Tensor:
    """The kernel of ``moefx.attention``: flash attention if causal with sinks, a window or packed sequences, else SDPA."""
    starts = mask if ops.is_packed(mask) else None
    asked = spec.is_causal and (mask is None or starts is not None)
    if asked and not (sinks is None and spec.window is None and starts is None):
        size, wide = v.shape[3], q.shape[3]
        # multi-head latent attention's values are shorter than its keys
        padded = F.pad(v, (0, wide - size)) if starts is not None and size < wide else v
        if refuses_flash(q, padded, spec.dropout) is None:
            out = flash_attention(*map(by_position, (q, k, padded)), sinks, spec.scale, spec.window, starts, "torch")[0]
            return out if size == wide else out[..., :size]
    if asked and (starts is not None or (spec.window is not None and q.shape[2] > spec.window)):
        mask = ops.visible(q.shape[2], k.shape[2], spec.window, starts, q.device)
    repeats = q.shape[1] // k.shape[1]
    # without a mask the flash kernels share key and value heads; with one SDPA would fall to its slow path
    # written as a branch: of a comparison of sizes Dynamo makes a symbolic bool (torch 2.11), which SDPA refuses
    share = False
    if repeats > 1 and mask is None and q.shape[3] == v.shape[3]:
        share = True
    if repeats > 1 and not share:
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=spec.dropout,
        is_causal=spec.is_causal and mask is None,
        scale=spec.scale,
        enable_gqa=share,
    )
    return out.transpose(1, 2).contiguous()


def by_position(t: Tensor) -> Tensor:
    """[B, A, S, D] that lies as [B, S, A, D], like the output of attention: else gradients are copied, outside of Inductor."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def refuses_flash(q: Tensor, v: Tensor, dropout: float) -> str | None:
    """Why flash attention, with window and sinks, cannot take these; None: it can."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention runs on CUDA devices in 16 bits, q is {q.dtype} on {q.device.type}"
    if q.shape[3] != v.shape[3] or q.shape[3] > 256 or q.shape[3] % 8:
        return f"flash attention wants one head size, a multiple of 8 up to 256: q has {q.shape[3]}, v {v.shape[3]}"
    return f"flash attention here has no dropout, this one has {dropout}" if dropout else None


def _refuses_attention(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["sinks"] is not None:
        if (given["mask"] is not None and not ops.is_packed(value(given["mask"]))) or not given["is_causal"]:
            return "scaled_dot_product_attention has no sinks, and flash attention with sinks takes no mask"
        problem = refuses_flash(value(given["q"]), value(given["v"]), given["dropout"])
        if problem:
            return f"scaled_dot_product_attention has no sinks, and {problem}"
    if given["softcap"]:
        return f"scaled_dot_product_attention has no softcap, this attention has {given['softcap']}"
    return None


# --- linear layers ---------------------------------------------------------------------------------------------------


def _refuses_linear_to_fp32(node: fx.Node) -> str | None:
    given = arguments(node)
    x, weight = value(given["x"]), value(given["weight"])
    if x.device.type != "cuda":
        return f"torch.mm gives float32 of 16 bits on CUDA devices only, these are on {x.device.type}"
    if x.dtype != torch.bfloat16 or weight.dtype not in (torch.bfloat16, torch.float32):
        return f"it multiplies bfloat16 by bfloat16 or float32, these are {x.dtype} and {weight.dtype}"
    return None


# --- experts ---------------------------------------------------------------------------------------------------------


def _sum_of_tokens(rows: Tensor, weights: Tensor | None) -> Tensor:
    """rows [T, K, H], each times its weight [T, K] -> [T, H], added in the order of k.

    Written out over k, not as ``sum(dim=1)``: Inductor's CPU code for a reduction over gathered rows is scalar, ten
    times slower than these fused additions. 16-bit rows add up in fp32, as in ``sum``.
    """
    rows = rows * weights.unsqueeze(-1) if weights is not None else rows
    total = rows[:, 0]
    total = total.float() if rows.shape[1] > 1 and total.dtype in (torch.bfloat16, torch.float16) else total
    for k in range(1, rows.shape[1]):
        total = total + rows[:, k]
    return total.to(rows.dtype)


class _GatherTokens(torch.autograd.Function):
    """Row i of the result is the token of the i-th sorted (token, k): the backward sums each token's K rows, in order."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return _sum_of_tokens(grad[inverse].view(-1, ctx.top_k, grad.shape[-1]), None), None, None, None


class _Permute(torch.autograd.Function):
    """``rows[index]`` where ``index`` is a permutation: the backward gathers by its inverse instead of adding atomically."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class _BiasOfRows(torch.autograd.Function):
    """``bias[expert]``, with a backward in a fixed order of sums.

    It is a product with the one-hot rows of the experts: an indexed sum would use atomic additions, whose order changes.
    """

    @staticmethod
    def forward(ctx, bias: Tensor, expert: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(expert)
        ctx.experts = bias.shape[0]
        return bias[expert]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (expert,) = ctx.saved_tensors
        chosen = expert == torch.arange(ctx.experts, device=grad.device).unsqueeze(1)
        return chosen.to(grad.dtype) @ grad, None


#: Numbers of 16 bits: torch's grouped GEMM wants rows of whole 16 bytes.
_BY_16_BYTES = 8


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
    """The kernel of ``moefx.experts``: tokens are sorted by expert, multiplied by grouped GEMMs and summed without atomics."""
    top_k, tokens = topk_ids.shape[1], topk_ids.shape[0]
    flat = topk_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(tokens * top_k, device=x.device))
    expert = flat[order]
    offsets, computed = ops.expert_offsets(expert, gate_up, down), ops.computed_row_mask(expert, gate_up, down)

    weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)

    def project(h: Tensor, weight: Tensor, bias: Tensor | None, update: LowRank | None) -> Tensor:
        matrix, ends = weight if spec.transposed else weight.transpose(-2, -1), offsets[: weight.shape[0]]
        by_torch = h.is_cuda and weight.dtype == torch.bfloat16

        def mm(x: Tensor, matrix: Tensor) -> Tensor:
            return torch._grouped_mm(x, matrix, offs=ends) if by_torch else grouped_mm(x, matrix, ends)

        h = h.to(weight.dtype)
        out = mm(h, matrix)
        if update is not None:
            a, b = update.padded(_BY_16_BYTES) if by_torch else update
            out = out + mm(mm(h, a.transpose(-2, -1)), b.transpose(-2, -1))
        return out if bias is None else out + _BiasOfRows.apply(bias, expert)

    h = ops.zero_uncomputed_rows(_GatherTokens.apply(x, order, inverse, top_k), computed)
    h = project(h, gate_up, gate_up_bias, weights.gate_up_lora)
    h = ACTIVATIONS[spec.activation].forward(h, spec.alpha, spec.limit, spec.interleaved)
    h = project(h, down, down_bias, weights.down_lora)
    h = ops.zero_uncomputed_rows(h, computed)
    h = _Permute.apply(h, inverse, order).view(tokens, top_k, h.shape[-1])
    return _sum_of_tokens(h, topk_weights).to(x.dtype)


def refuses_experts(node: fx.Node) -> str | None:
    """Why torch's grouped GEMM cannot run the experts of ``node``; None: it can."""
    for name in ("gate_up", "down"):
        w = value(arguments(node)[name])
        grouped_gemm = w.device.type == "cuda" and w.dtype == torch.bfloat16
        if grouped_gemm and any(n * w.element_size() % 16 for n in w.shape[1:]):
            return f"torch's grouped GEMM wants rows of whole 16 bytes, {name} has matrices {tuple(w.shape[1:])} in bf16"
    return None


BACKEND = Backend(
    "torch",
    {
        ops.rms_norm: Kernel(
            rms_norm, _refuses_rms_norm, "F.rms_norm: in 16 bits one rounding fewer than the model where it casts first"
        ),
        ops.attention: Kernel(attention, _refuses_attention, "SDPA; flash attention with window or sinks"),
        ops.linear_to_fp32: Kernel(linear_to_fp32, _refuses_linear_to_fp32, "bf16 tensor cores, float32 sums"),
        ops.experts: Kernel(experts, refuses_experts, "grouped GEMM, one sort, no atomics"),
        ops.linear_cross_entropy: Kernel(linear_cross_entropy, why="chunked: never all logits"),
        dispatch_combine.dispatch: Kernel(dispatch_combine.dispatch, why="all-to-all"),
        dispatch_combine.combine: Kernel(dispatch_combine.combine, why="the transport of its dispatch"),
        grouped.grouped_mlp: Kernel(grouped.grouped_mlp, why="grouped GEMM, activation recomputed"),
    },
)
