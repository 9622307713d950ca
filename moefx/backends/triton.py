"""The triton backend: memory-bound work around the matrix products, on a CUDA device, in kernels of our own.

Triton is imported when a kernel first runs, so that this table can be read anywhere.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, fx

from .. import grouped, ops
from ..graph import arguments, dtype_of, value
from ..kernels.experts import fused_experts, fused_grouped_mlp
from . import Backend, Kernel
from .torch import refuses_experts as _torch_refuses

#: Below Hopper torch's grouped GEMM is a loop over the experts, which reads the counts back (pytorch#186620).
CAPABILITY = (9, 0)


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
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
) -> Tensor:
    """The kernel of ``moefx.experts``."""
    return fused_experts(
        x, index, weights, up, up_bias, down, down_bias, activation, alpha, limit, transposed, interleaved
    )[0]


def grouped_mlp(
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
) -> Tensor:
    """The kernel of ``moefx.grouped_mlp``."""
    return fused_grouped_mlp(
        rows, counts, up, up_bias, down, down_bias, activation, alpha, limit, transposed, interleaved, grad_scale
    )[0]


def _refuses_experts(node: fx.Node) -> str | None:
    given = arguments(node)
    up = value(given["up"])
    if up.device.type != "cuda":
        return f"Triton's kernels run on CUDA devices, the experts are on {up.device.type}"
    if up.dtype != torch.bfloat16 or dtype_of(given["down"]) != torch.bfloat16:
        return f"torch's grouped GEMM wants bf16 weights, these are {up.dtype} and {dtype_of(given['down'])}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        return f"torch's grouped GEMM needs compute capability 9.0, this device has {torch.cuda.get_device_capability()}"
    return _torch_refuses(node)


def _available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install 'moefx[gpu]'"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


BACKEND = Backend(
    "triton",
    {
        ops.experts: Kernel(experts, _refuses_experts, "counting sort, grouped GEMMs, fused activation, no atomics"),
        grouped.grouped_mlp: Kernel(grouped_mlp, _refuses_experts, "grouped GEMMs, activation fused and recomputed"),
    },
    _available,
)
