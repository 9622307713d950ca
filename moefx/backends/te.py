"""The te backend: Transformer Engine's kernels (moefx/kernels/te) where they mean exactly what the operation means.

Used where the caller names it, ``backends=["te", "triton", "torch"]``: nothing here has measured faster than the others yet.
``Linear`` and ``LayerNormLinear`` have no kernel: in bf16 they are the cuBLAS product that torch runs, with nothing fused to
it. Linear layers in FP8 are variants, for which the pass ``fp8`` asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from moefx import ops
from moefx.backends import Backend, Kernel, triton
from moefx.ir.graph import arguments, aten, dtype_of, value
from moefx.kernels import te as kernels
from moefx.kernels.experts import fused_grouped_mlp
from moefx.kernels.te import attention as te_attention
from moefx.kernels.te import aux_loss as te_aux_loss
from moefx.kernels.te import grouped as te_grouped
from moefx.kernels.te import linear as te_linear
from moefx.kernels.te import norm, permute, router
from moefx.ops import AttentionSpec, ExpertsSpec, NormSpec, RouterSpec, takes_spec
from moefx.ops import grouped_mlp as grouped

#: The length that a symbolic one is taken for where Transformer Engine is asked about sizes.
TYPICAL_LENGTH = 4096

_HALVES = (torch.bfloat16, torch.float16)


def _refuses_device(*nodes: Any) -> str | None:
    for node in nodes:
        val = value(node)
        if isinstance(val, Tensor) and val.device.type != "cuda":
            return f"Transformer Engine's kernels run on cuda, {getattr(node, 'name', 'a tensor')} is on {val.device.type}"
    return None


# --- norms -----------------------------------------------------------------------------------------------------------


@takes_spec
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> Tensor:
    """The kernel of ``moefx.rms_norm``."""
    return norm.te_rms_norm(x, weight, eps, spec.offset == 1.0)[0]


@takes_spec
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """The kernel of ``moefx.add_rms_norm``."""
    return norm.te_add_rms_norm(x, residual, weight, eps, spec.offset == 1.0)[:2]


def _refuses_norm(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["weight"] is None:
        return "Transformer Engine's RMSNorm multiplies by a weight, this norm has none"
    if given["offset"] not in (0.0, 1.0):
        return f"Transformer Engine's RMSNorm adds 0 or 1 to the weight, this norm {given['offset']}"
    x, weight = dtype_of(given["x"]), dtype_of(given["weight"])
    if weight != x:
        return f"Transformer Engine's RMSNorm wants one dtype, the input is {x}, the weight {weight}"
    if x not in (*_HALVES, torch.float32):
        return f"Transformer Engine's RMSNorm takes bf16, fp16 or fp32, the input is {x}"
    residual = given.get("residual")
    if residual is not None and dtype_of(residual) != x:
        return f"the fused residual addition wants one dtype, the input is {x}, the residual {dtype_of(residual)}"
    return _refuses_device(given["x"], given["weight"])


# --- router ----------------------------------------------------------------------------------------------------------


@takes_spec
def route(
    logits: Tensor, bias: Tensor | None, top_k: int, *, expert_scale: Tensor | None = None, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """The kernel of ``moefx.route``. Renormalized softmax of all logits is the softmax of the chosen ones."""
    softmax_first = spec.score == "softmax" and not spec.topk_first and not spec.renormalize
    groups, topk_groups = (0, 0) if spec.groups == spec.topk_groups else (spec.groups, spec.topk_groups)
    bias = None if bias is None else bias.float()
    topk_weights, topk_ids, _ = router.te_route(
        logits.float(), bias, top_k, spec.score, softmax_first, groups, topk_groups, spec.routed_scaling_factor
    )
    topk_weights = topk_weights if expert_scale is None else topk_weights * expert_scale[topk_ids]
    return (topk_weights.to(logits.dtype) if spec.cast else topk_weights), topk_ids


def _refuses_route(node: fx.Node) -> str | None:
    given = arguments(node)
    dtype, top_k, softmax = dtype_of(given["logits"]), given["top_k"], given["score"] == "softmax"
    if dtype not in (*_HALVES, torch.float32):
        return f"Transformer Engine's router takes bf16, fp16 or fp32, the logits are {dtype}"
    if given["score"] not in ("softmax", "sigmoid"):
        return f"this kernel knows the scores softmax and sigmoid, this router's are {given['score']}"
    if given["min_sum"]:
        return f"Transformer Engine divides by any sum, this router by no less than {given['min_sum']}"
    if dtype != torch.float32 and not (softmax and given["fp32"]):
        return f"Transformer Engine's router computes in fp32, this {given['score']} in {dtype}"
    if given["sorted"] and top_k >= router.UNSORTED_FROM:
        return f"Transformer Engine does not sort {router.UNSORTED_FROM} experts a token or more, this router sorts its {top_k}"
    return (
        (_refuses_softmax(given) if softmax else _refuses_sigmoid(given))
        or _refuses_groups(given)
        or _refuses_device(given["logits"])
    )


def _refuses_softmax(given: dict[str, Any]) -> str | None:
    if given["bias"] is not None:
        return "Transformer Engine's router adds a bias to sigmoid scores, this one to softmax"
    if not given["renormalize"]:
        return None
    if given["topk_first"]:
        return "Transformer Engine's softmax of the chosen logits sums to 1, this router divides by the sum once more"
    if given["eps"]:
        return f"Transformer Engine's renormalized softmax divides by the sum, this router by the sum + {given['eps']}"
    return None


def _refuses_sigmoid(given: dict[str, Any]) -> str | None:
    if given["bias"] is not None and not given["gather"]:
        return "Transformer Engine takes the bias out of the weights, this router's weights are the biased scores"
    if given["bias"] is not None and given["topk_first"]:
        return "Transformer Engine adds the bias to sigmoid scores, this router to the logits"
    if (given["top_k"] > 1) != bool(given["renormalize"]):
        does = "renormalizes" if given["top_k"] > 1 else "does not renormalize"
        return f"Transformer Engine {does} sigmoid scores of {given['top_k']} experts a token, this router the other way round"
    if given["eps"] > 1e-20:
        return f"Transformer Engine divides by the sum + 1e-20, this router by the sum + {given['eps']}"
    return None


def _refuses_groups(given: dict[str, Any]) -> str | None:
    groups, chosen = given["groups"], given["topk_groups"]
    if groups == chosen:
        return None
    softmax = given["score"] == "softmax"
    if softmax and given["renormalize"]:
        return "Transformer Engine scores groups by logits where it renormalizes, this router by softmax scores"
    if not softmax and given["topk_first"]:
        return "Transformer Engine scores groups by sigmoid, this router by logits"
    if given["zero_fill"] and (given["bias"] is not None or given["topk_first"]):
        return "Transformer Engine never chooses from other groups, this router gives them the score 0, others may be less"
    best, theirs = {"top2": 2, "max": 1}[given["group_score"]], given["top_k"] // chosen
    if theirs != best:
        return f"Transformer Engine scores a group by its top_k // topk_groups = {theirs} best experts, this router by {best}"
    return None


def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """The kernel of ``moefx.load_balancing_loss``."""
    return te_aux_loss.te_load_balancing_loss(logits.float(), top_k)[0]


def _refuses_loss(node: fx.Node) -> str | None:
    return _refuses_device(arguments(node)["logits"])


# --- attention -------------------------------------------------------------------------------------------------------


@takes_spec
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *, spec: AttentionSpec) -> Tensor:
    """The kernel of ``moefx.attention`` by cuDNN; q, k, v are copied to [B, S, A, D]."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    return te_attention.te_attention(q, k, v, sinks, spec.scale, spec.is_causal, spec.window)[0]


def _refuses_attention(node: fx.Node) -> str | None:
    given = arguments(node)
    q, k, v = (value(given[name]) for name in "qkv")
    if given["mask"] is not None:
        return "Transformer Engine's fused attention takes causal and window, this attention has a mask tensor"
    for name in ("softcap", "dropout"):
        if given[name]:
            return f"Transformer Engine's fused attention is used with {name} 0, this attention has {given[name]}"
    if given["window"] is not None and not given["is_causal"]:
        return f"the window of {given['window']} is for causal attention, this one is not causal"
    if q.dtype not in _HALVES or {q.dtype} != {k.dtype, v.dtype}:
        return f"Transformer Engine's fused attention wants q, k, v in bf16 or fp16, they are {q.dtype}, {k.dtype}, {v.dtype}"
    if str(q.shape[2]) != str(k.shape[2]):
        return f"Transformer Engine's fused attention is used with one length, q has {q.shape[2]}, k {k.shape[2]}"
    problem = _refuses_device(given["q"])
    if problem:
        return problem
    length = q.shape[2] if isinstance(q.shape[2], int) else TYPICAL_LENGTH
    return te_attention.why_not_fused(
        q.dtype,
        q.shape[0] if isinstance(q.shape[0], int) else 1,
        q.shape[1],
        k.shape[1],
        length,
        q.shape[3],
        v.shape[3],
        given["scale"],
        given["is_causal"],
        given["window"],
        given["sinks"] is not None,
    )


# --- experts ---------------------------------------------------------------------------------------------------------


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
    """The kernel of ``moefx.experts``: Transformer Engine's permutation around grouped GEMMs and activation of ``triton``."""
    flat = topk_ids.reshape(-1)
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int64, device=x.device).scatter_add(0, flat, torch.ones_like(flat))
    rows, where = permute.te_permute(x.to(gate_up.dtype), topk_ids.to(torch.int32))
    weights = (gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    mlp = grouped.GroupedMLPSpec.of(spec)
    rows = fused_grouped_mlp(rows, counts, *weights, None, *grouped.parts_of(None), mlp, "torch", True)[0]
    return permute.te_unpermute(rows, where, topk_weights.float()).to(x.dtype)


def _refuses_experts(node: fx.Node) -> str | None:
    x, topk_ids, gate_up, down = (value(arguments(node)[name]) for name in ("x", "topk_ids", "gate_up", "down"))
    if ops.has_zero_computation_experts(gate_up, down):
        some = f"{down.shape[0]} of {gate_up.shape[0]} experts"
        return f"Transformer Engine's permutation gives every choice a row, here only {some} compute something"
    if x.shape[-1] % 8:
        return f"Transformer Engine's permutation wants rows of whole 16 bytes, this hidden size is {x.shape[-1]} in bf16"
    if topk_ids.shape[1] > 128:
        return f"Transformer Engine's permutation takes up to 128 experts a token, this router chooses {topk_ids.shape[1]}"
    return _refuses_device(arguments(node)["x"]) or triton.refuses_experts(node)


@takes_spec
def grouped_mlp(
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
    spec: grouped.GroupedMLPSpec,
) -> Tensor:
    """The kernel of ``moefx.grouped_mlp``."""
    weights = (gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    parts = grouped.parts_of(arrived)
    return te_grouped.te_grouped_mlp(permuted_tokens, tokens_per_expert, *weights, permuted_probs, *parts, spec)[0]


def _refuses_grouped_mlp(node: fx.Node) -> str | None:
    given = arguments(node)
    problem = _refuses_device(given["permuted_tokens"], given["gate_up"])
    if problem:
        return problem
    capacity = next((n.kwargs.get("capacity") for n in given["permuted_tokens"].all_input_nodes), 0)  # of the dispatch
    if capacity:
        return f"GroupedLinear's groups are all of its rows, with dispatch_capacity={capacity} rows are left over"
    for name in ("gate_up", "down"):
        if dtype_of(given[name]) not in _HALVES:
            return f"GroupedLinear's grouped GEMM takes bf16 or fp16, {name} is {dtype_of(given[name])}"
    found = te_grouped.cublaslt()
    if found < te_grouped.CUBLASLT:
        wanted, this = (f"{v // 10000}.{v // 100 % 100}" for v in (te_grouped.CUBLASLT, found))
        return f"below cuBLASLt {wanted} GroupedLinear is one cuBLAS call an expert, this is {this}"
    return triton.refuses_experts(node)


# --- linear layers in FP8 --------------------------------------------------------------------------------------------


@functools.cache
def fp8_linear_by(recipe: str) -> Callable[..., Tensor]:
    """The variant "fp8_<recipe>" of ``aten.linear``, by a recipe of :mod:`moefx.kernels.te.linear`."""

    def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return te_linear.te_fp8_linear(input, weight, bias, recipe)

    return fp8_linear


def _fp8_linear(name: str) -> Kernel:
    recipe = te_linear.RECIPES[name]

    def refuses(node: fx.Node) -> str | None:
        given = arguments(node)
        x, weight = dtype_of(given["input"]), dtype_of(given["weight"])
        if x not in _HALVES or weight != x:
            return f"an FP8 product wants input and weight in one 16-bit dtype, they are {x} and {weight}"
        shape = tuple(value(given["weight"]).shape)
        if any(n % recipe.features for n in shape):
            return f"{recipe.title} wants features in multiples of {recipe.features}, the weight is {shape}"
        return None

    why = f"{recipe.title}: {recipe.meaning}"
    return Kernel(fp8_linear_by(name), refuses, why, functools.partial(te_linear.why_not, name))


BACKEND = Backend(
    "te",
    {
        ops.rms_norm: Kernel(rms_norm, _refuses_norm, "RMSNorm: in 16 bits one rounding fewer than a model that casts first"),
        ops.add_rms_norm: Kernel(add_rms_norm, _refuses_norm, "RMSNorm; its backward adds the residual's gradient"),
        ops.route: Kernel(route, _refuses_route, "one kernel, in fp32; a bias is added and subtracted again"),
        ops.load_balancing_loss: Kernel(load_balancing_loss, _refuses_loss, "scores with choice, counts, their product"),
        ops.attention: Kernel(attention, _refuses_attention, "cuDNN's fused attention"),
        ops.experts: Kernel(experts, _refuses_experts, "its permutation, torch's grouped GEMM, fused activation"),
        grouped.grouped_mlp: Kernel(grouped_mlp, _refuses_grouped_mlp, "GroupedLinear's grouped GEMM, activation recomputed"),
        **{(aten.linear.default, f"fp8_{name}"): _fp8_linear(name) for name in te_linear.RECIPES},
    },
    lambda: kernels.available(),
    opt_in=True,
)
