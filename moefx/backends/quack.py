"""The quack backend: the triton backend's experts and torch's head around QuACK's GEMMs (quack-kernels, CuTe DSL), on Hopper.

Tiles are pinned (:mod:`moefx.kernels.grouped_gemm`, :mod:`moefx.kernels.gemm`): QuACK's own tuning takes minutes the first
time. On an H200 the six products of Qwen3-30B-A3B's experts take 2.0 ms instead of torch's 2.6 with 4,096 tokens, 6.1 instead
of 7.3 with 16,384.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moefx import ops
from moefx.backends import Backend, Kernel, triton
from moefx.ir.graph import arguments, value
from moefx.kernels import linear_cross_entropy as chunked
from moefx.kernels.requirements import requires
from moefx.ops import grouped_mlp as grouped


def _refuses(node: fx.Node, multiple: int = 8) -> str | None:
    given = arguments(node)
    for name in ("gate_up", "down"):
        w = value(given[name])
        if any(n % multiple for n in w.shape[1:]):
            return f"QuACK's GEMM wants multiples of {multiple}, {name} has matrices {tuple(w.shape[1:])}"
    return triton.refuses_experts(node)


def _refuses_fp8(node: fx.Node) -> str | None:
    """Why the experts of ``node`` cannot run in FP8."""
    return _refuses(node, 16)


#: Columns of cuBLAS's widest tile. A step of GPT-OSS-20B (2,880) spends 85.4 ms in its head with QuACK and 92.6 without, with
#: 16,384 tokens on an H200; Qwen3-30B-A3B's (2,048) gained nothing.
_CUBLAS_FILLS = 256


def _refuses_head(node: fx.Node) -> str | None:
    given = arguments(node)
    hidden, weight = value(given["hidden"]), value(given["weight"])
    if hidden.device.type != "cuda":
        return f"QuACK's GEMM runs on CUDA devices, the head is on {hidden.device.type}"
    if hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"QuACK's GEMM is used for heads in bf16, hidden is {hidden.dtype}, the weight {weight.dtype}"
    if any(n % 8 for n in weight.shape):
        return f"QuACK's GEMM wants multiples of 8, the head's weight is {tuple(weight.shape)}"
    if hidden.shape[-1] % _CUBLAS_FILLS == 0:
        return f"cuBLAS is as fast for hidden sizes that are multiples of {_CUBLAS_FILLS}, this one is {hidden.shape[-1]}"
    return None


#: Its tiles (kernels/grouped_gemm.py, kernels/gemm.py) were chosen on Hopper.
_available = requires(
    "quack",
    "cutlass",
    "triton",
    package="quack-kernels (0.6 or newer)",
    install="pip install 'moefx[quack,gpu]'",
    measured=9,
)


def _fp8_experts() -> dict[Any, Kernel]:
    """The variants "fp8": numerics change, so that only the pass ``fp8`` asks for them."""
    why = "QuACK's grouped GEMM: a scale a row and a column of a matrix, E4M3; the weights' gradients by products in bf16"
    made: dict[Any, Kernel] = {}
    for op, by in ((ops.experts, triton.experts_by), (grouped.grouped_mlp, triton.grouped_mlp_by)):
        made[op, "fp8"] = Kernel(by("fp8"), _refuses_fp8, why)
        made[op, "fp8", "recompute"] = Kernel(by("fp8", keep=False), _refuses_fp8, why)
    return made


BACKEND = Backend(
    "quack",
    {
        **triton.experts_with_variants(
            "quack",
            _refuses,
            (
                "QuACK's grouped GEMM; counting sort, fused activation, no atomics",
                "QuACK's grouped GEMM; activation fused and recomputed",
            ),
        ),
        **_fp8_experts(),
        ops.linear_cross_entropy: Kernel(
            chunked.linear_cross_entropy_by("quack"), _refuses_head, "chunked: never all logits; QuACK's GEMM"
        ),
    },
    _available,
)
