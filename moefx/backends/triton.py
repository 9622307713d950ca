"""The triton backend: memory-bound work around the matrix products, on a CUDA device, in kernels of our own.

Triton is imported when a kernel first runs, so that this table can be read anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from moefx import ops
from moefx.backends import Backend, Kernel
from moefx.backends.torch import refuses_experts as _torch_refuses
from moefx.ir.graph import arguments, dtype_of, value
from moefx.kernels import rms_norm as norms
from moefx.kernels.experts import KNOWN, fused_experts, fused_grouped_mlp
from moefx.kernels.norm_rotary import fused_norm_rotary
from moefx.kernels.requirements import requires
from moefx.kernels.route import fused_route
from moefx.ops import ExpertsSpec, NormRotarySpec, NormSpec, RouterSpec, takes_spec
from moefx.ops import grouped_mlp as grouped

#: Below Hopper torch's grouped GEMM is a loop over the experts, which reads the counts back (pytorch#186620).
CAPABILITY = (9, 0)
MAX_EXPERTS, MAX_TOP_K = 1024, 32
#: Of low-rank updates, whose factors a program holds in registers.
MAX_RANK = 256
#: Of shorter rows, such as heads, there are too many for a program to hold few: Inductor fuses those with what is around them.
MIN_NORM, MAX_NORM = 512, 16384
ROTARY_LAYOUTS = ("half", "half_table", "interleaved")  #: those of moefx.rotary that the kernel knows


@takes_spec
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> Tensor:
    """The kernel of ``moefx.rms_norm``."""
    return norms.fused_rms_norm(x, None, weight, eps, spec)[0]


@takes_spec
def normed_stream(x: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """The variant "stream": :func:`rms_norm`, and x for its other readers."""
    return norms.normed_stream(x, weight, eps, spec)


@takes_spec
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """The kernel of ``moefx.add_rms_norm``."""
    return norms.fused_rms_norm(x, residual, weight, eps, spec)


def refuses_norm(node: fx.Node) -> str | None:
    """Why the norms' kernel cannot run ``node``."""
    given = arguments(node)
    x = value(given["x"])
    if x.device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the input is on {x.device.type}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernel adds in float32, the input is {x.dtype}"
    if not isinstance(x.shape[-1], int) or not MIN_NORM <= x.shape[-1] <= MAX_NORM:
        return f"it holds whole rows of {MIN_NORM} to {MAX_NORM} numbers, these have {x.shape[-1]}"
    return None


@functools.cache
def experts_by(gemm: str, keep: bool = True) -> Callable[..., Tensor]:
    """The kernel of ``moefx.experts`` around a grouped GEMM of :mod:`moefx.kernels.grouped_gemm`.

    ``keep``: pre-activations are saved for the backward, instead of recomputed there.
    """

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
        weights = (gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
        return fused_experts(x, topk_ids, topk_weights, *weights, spec, gemm, keep)[0]

    return experts


@functools.cache
def grouped_mlp_by(gemm: str, keep: bool = True) -> Callable[..., Tensor]:
    """The kernel of ``moefx.grouped_mlp``, likewise."""

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
        weights = (gate_up, gate_up_bias, down, down_bias, gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
        parts = grouped.parts_of(arrived)
        return fused_grouped_mlp(permuted_tokens, tokens_per_expert, *weights, permuted_probs, *parts, spec, gemm, keep)[0]

    return grouped_mlp


@takes_spec
def route(
    logits: Tensor, bias: Tensor | None, top_k: int, *, expert_scale: Tensor | None = None, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """The kernel of ``moefx.route``; equal scores go to the first expert, and the K stand in descending order."""
    return fused_route(logits, bias, top_k, spec)


@takes_spec
def norm_rotary(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, spec: NormRotarySpec) -> Tensor:
    """The kernel of ``moefx.norm_rotary``, in float32 up to the result, whatever ``cast_first`` says."""
    return fused_norm_rotary(x, weight, cos, sin, eps, spec.offset, spec.layout)


def refuses_norm_rotary(node: fx.Node) -> str | None:
    """Why the kernel of norm and rotation cannot run ``node``."""
    given = arguments(node)
    x = value(given["x"])
    if x.device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the heads are on {x.device.type}"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernel adds in float32, the heads are {x.dtype}"
    if given["layout"] not in ROTARY_LAYOUTS:
        return f"it rotates in the layouts {', '.join(ROTARY_LAYOUTS)}, this one is {given['layout']}"
    size = x.shape[3]
    if size & (size - 1) or not 16 <= size <= 512:
        return f"it wants a head size that is a power of two from 16 to 512, this is {size}"
    return None


def refuses_route(node: fx.Node) -> str | None:
    """Why the router's kernel cannot run ``node``."""
    given = arguments(node)
    logits = value(given["logits"])
    experts, groups, kept = logits.shape[1], given["groups"], given["topk_groups"]
    if logits.device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the logits are on {logits.device.type}"
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernel adds in float32, the logits are {logits.dtype}"
    if given["score"] not in ("softmax", "sigmoid"):
        return f"it knows the scores softmax and sigmoid, this router's are {given['score']}"
    if given["min_sum"] or given["expert_scale"] is not None:
        return "it has neither a least sum of weights nor a scale of each expert's own"
    if experts > MAX_EXPERTS or given["top_k"] > MAX_TOP_K:
        return f"it holds {MAX_EXPERTS} experts and top-{MAX_TOP_K} in registers, these are {experts} and {given['top_k']}"
    if given["bias"] is not None and not given["gather"]:
        return "its bias has no gradient, and here the bias is part of the weights"
    if groups != kept and (experts & (experts - 1) or groups & (groups - 1)):
        return f"it cuts powers of two into groups, these are {experts} experts in {groups} groups"
    if groups != kept and kept * (experts // groups) < given["top_k"]:
        return f"the {kept} groups that remain have fewer than the {given['top_k']} experts to choose"
    return None


def refuses_experts(node: fx.Node) -> str | None:
    """Why these kernels cannot run the experts of ``node``."""
    given = arguments(node)
    gate_up = value(given["gate_up"])
    if gate_up.device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the experts are on {gate_up.device.type}"
    if gate_up.dtype != torch.bfloat16 or dtype_of(given["down"]) != torch.bfloat16:
        return f"its grouped GEMM wants bf16 weights, these are {gate_up.dtype} and {dtype_of(given['down'])}"
    if given["activation"] not in KNOWN:
        return f"it has no kernel for the activation {given['activation']}, only for {', '.join(sorted(KNOWN))}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"its grouped GEMM needs compute capability 9.0, this device has {have}"
    for name in ("gate_up_lora_a", "down_lora_a"):
        factor = value(given[name])
        if factor is not None and factor.shape[1] > MAX_RANK:
            return f"it holds low-rank updates of rank {MAX_RANK} at most in registers, {name} has rank {factor.shape[1]}"
    return _torch_refuses(node)


#: Why Triton cannot be used here, or None.
available = requires("triton", install="pip install 'moefx[gpu]'")


def experts_with_variants(gemm: str, refuses: Callable[[fx.Node], str | None], why: tuple[str, str]) -> dict[Any, Kernel]:
    """Entries of a table: ``experts`` and ``grouped_mlp`` around ``gemm``, each with its ``why``; and variants "recompute"."""
    made: dict[Any, Kernel] = {}
    for op, by, text in zip((ops.experts, grouped.grouped_mlp), (experts_by, grouped_mlp_by), why):
        made[op] = Kernel(by(gemm), refuses, text)
        made[op, "recompute"] = Kernel(by(gemm, keep=False), refuses, text)
    return made


BACKEND = Backend(
    "triton",
    {
        ops.rms_norm: Kernel(rms_norm, refuses_norm, "each row read once, each way; rounded where the model rounds"),
        (ops.rms_norm, "stream"): Kernel(normed_stream, refuses_norm, "its backward adds the gradient of its input's readers"),
        ops.add_rms_norm: Kernel(add_rms_norm, refuses_norm, "a row is read once, and its backward adds the sum's gradient"),
        ops.norm_rotary: Kernel(norm_rotary, refuses_norm_rotary, "norm and rotation of a head in registers, rounded once"),
        ops.route: Kernel(route, refuses_route, "scores, groups, top-k and renormalization in registers"),
        **experts_with_variants(
            "torch",
            refuses_experts,
            (
                "torch's grouped GEMM; counting sort, fused activation, no atomics",
                "torch's grouped GEMM; activation fused and recomputed",
            ),
        ),
    },
    available,
)
