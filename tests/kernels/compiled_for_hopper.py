"""Compiles every Triton kernel of moefx for compute capability 9.0, launches none: this needs no GPU.

Triton's interpreter runs kernels as Python, where a variable may change its type within a branch; the compiler refuses that.
For launched_twice.py.
"""

import importlib
import pkgutil
import warnings
from collections.abc import Iterator

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

warnings.filterwarnings("ignore")

import moefx.kernels  # noqa: E402
from moefx.kernels import (  # noqa: E402
    counting_sort,
    cross_entropy,
    expert_activation,
    fp8_quantize,
    fp8_rows,
    heads,
    low_rank,
    norm,
    permute,
    router,
    sinks,
    window_attention,
)
from moefx.kernels import rows as row_kernels  # noqa: E402
from moefx.ops import ExpertsSpec, NormSpec, RouterSpec  # noqa: E402
from moefx.transports import permute as rows  # noqa: E402


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


said: dict[str, str | None] = {}


def name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.removeprefix('moefx.kernels.')}.{kernel.fn.__name__}"


def compile_only(run):
    def instead(self, *args, grid, warmup=False, **options):
        try:
            run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            said[name(self)] = f"{type(error).__name__}: {str(error).splitlines()[-1]}"
        else:
            said.setdefault(name(self), None)

    return instead


def kernels() -> Iterator[JITFunction]:
    """Those that are launched: functions that others call are compiled with these."""
    for module in pkgutil.iter_modules(moefx.kernels.__path__):
        if module.name == "te":
            continue
        found = [
            f for f in vars(importlib.import_module(f"moefx.kernels.{module.name}")).values() if isinstance(f, JITFunction)
        ]
        yield from (f for f in found if not any(f"{f.fn.__name__}(" in g.src.split("\n", 1)[1] for g in found if g is not f))


def launch_all(dtype: torch.dtype) -> None:
    tokens, experts, k, width = 40, 16, 4, 256
    x, weights = torch.randn(tokens, width).to(dtype), torch.rand(tokens, k)
    index = torch.zeros(tokens, k, dtype=torch.int64)
    flat = torch.zeros(tokens * k, dtype=torch.int32)
    many, of_rows = x.repeat(k, 1), weights.reshape(-1).contiguous()

    counting_sort.sort_by_expert(index, experts)
    permute.expand(x, flat, k)
    permute.reduce(many, flat, k, dtype, weights=weights, index=index, bias=many[:experts])
    permute.reduce(many, flat, k, dtype, index=index, experts=experts - 1)

    offsets = torch.zeros(experts, dtype=torch.int32)
    for activation, biased in (("swiglu", False), ("oai_swiglu", True), ("relu2", False)):
        gate = ExpertsSpec(activation, 1.7, 7.0, interleaved=biased)
        h = many if not gate.gated else torch.cat((many, many), 1)
        bias = h[:experts] if biased else None
        expert_activation.forward(h, bias, offsets, gate, of_rows if biased else None)
        for given in ((weights, flat), (of_rows, None)) if biased else ((None, None),):
            expert_activation.backward(h, bias, offsets, many, gate, *given)
    for given in ((weights, flat), (of_rows, None)):
        expert_activation.segment_sum(many, offsets, dtype, *given)
    expert_activation.add_bias_(many, many[:experts], offsets, of_rows)
    expert_activation.add_dot_(of_rows, many, many[:experts], offsets)

    bounds, inner = torch.zeros(experts + 1, dtype=torch.int32), x[:, :16].contiguous()
    for factor in (many.view(4, 16, -1), many.view(4, -1, 16).transpose(1, 2)):
        low_rank.add_(x.clone(), inner, factor[:, :, :width], bounds[:5])
        for at in (None, flat[:tokens]):
            low_rank.into(x, factor[:, :, :width], bounds[:5], at)
    for at in (None, flat[:tokens]):
        low_rank.outer(inner, x, bounds, at)
        low_rank.outer(inner, x, bounds, at, transposed=True)

    row_kernels_with_moves(x, index.int(), weights, experts)
    q, scales = torch.empty(tokens, width, dtype=torch.float8_e4m3fn), torch.empty(tokens, width // 128)
    fp8_rows.quantize(x, q, scales)
    fp8_rows.dequantize(q, scales, dtype)
    fp8_quantize.rows(x)
    fp8_quantize.rows(x, flat, k)
    fp8_quantize.matrices(many.view(4, tokens, width))

    cross_entropy.cross_entropy_(x.clone(), index[:, 0].contiguous(), weights[:, 0].contiguous(), 0.5, 30.0)

    for residual in (x, None):
        norm.forward(x, residual, x[0], 1e-6, NormSpec(), x.dtype, x.dtype)
        norm.backward(x, residual, x, x[0], 1e-6, NormSpec())

    tables = torch.randn(1, tokens, 64), torch.randn(1, tokens, 64)
    each = x.view(1, tokens, 4, 64)
    lse = torch.randn(1, 4, tokens)
    sinks.join_(each.clone(), lse, x[0, :4])
    sinks.gradient(x[0, :4], lse, sinks.delta(each, each))
    for sink in (x[0, :4], None):
        out, lse = window_attention.forward(each, each[:, :, :2].contiguous(), each[:, :, 2:].contiguous(), sink, 0.125, 8)
    window_attention.backward(each, each, each[:, :, :2].contiguous(), each[:, :, 2:].contiguous(), out, lse, 0.125, 8)
    for layout in ("half", "half_table", "interleaved"):
        heads.forward(each, x[0, :64], *tables, 1e-6, 0.0, layout)
        heads.backward(each, each, x[0, :64], *tables, 1e-6, 0.0, layout)

    logits = x[:, :64].contiguous()
    for score, groups, first in (("sigmoid", 8, False), ("softmax", 1, True)):
        limited = {"groups": groups, "topk_groups": min(4, groups), "zero_fill": True}
        spec = RouterSpec(score, topk_first=first, renormalize=True, eps=1e-20, **limited)
        bias = logits[0].float() if score == "sigmoid" else None
        router.forward(logits, bias, k, dtype, spec)
        router.backward(x[:, :k], logits, index, spec)


def row_kernels_with_moves(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: int) -> None:
    tokens, k = index.shape
    totals, row_id_map, send_map = torch.zeros(8, 2, dtype=torch.int64), torch.zeros_like(index), torch.zeros_like(index)
    row_kernels.build_row_id_map(index, 0, 2, 8, totals, row_id_map, send_map)
    row_kernels.build_row_id_map(index, 0, 1, experts, torch.zeros(experts, dtype=torch.int64), row_id_map, None)
    out, permuted_probs = x.repeat(k, 1), weights.reshape(-1).contiguous()
    row_kernels.permute(x, row_id_map, out, weights, permuted_probs)
    sent = rows.PackedRows(out.clone(), out.new_empty(tokens * k, k, dtype=torch.float32), index.repeat(k, 1))
    row_kernels.pack(x, index, weights, send_map, 2, sent)
    row_kernels.unpermute(out, row_id_map, x.clone(), rows.Gather(permuted_probs, row_id_map, weights.clone()))


def compile_all() -> dict[str, str | None]:
    """By kernel, what the compiler said; None if nothing. A driver is active."""
    run = JITFunction.run
    JITFunction.run = compile_only(run)
    try:
        launch_all(torch.bfloat16)
    finally:
        JITFunction.run = run
    return said | {name(f): "no launch of it is in compiled_for_hopper.py" for f in kernels() if name(f) not in said}
