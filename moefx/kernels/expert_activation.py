"""What an expert applies between and after its projections, forward and backward, on rows that lie expert by expert.

The backward makes all that the other gradients need in one pass: the gradient of the pre-activations, the weighted activation
(for down's gradient) and the gradient of each row's weight, a sum over I instead of H (SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv
from moefx.ops import ExpertsSpec


@triton.jit
def _act(x, KIND: tl.constexpr):
    """A one-argument activation and its derivative, in fp32."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2 * tl.sigmoid(2 * inner) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope
    elif KIND == "relu2":
        r = tl.maximum(x, 0.0)
        return r * r, 2 * r
    else:
        tl.static_assert(KIND == "relu")
        return tl.maximum(x, 0.0), (x > 0).to(tl.float32)


@triton.jit
def _gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, KIND: tl.constexpr):
    """Of ``a = f(gate, up)``: a, da/dgate, da/dup, in fp32."""
    if KIND == "clamped_swiglu":
        low, mid = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        f, slope = _act(low, "silu")
        inside = (tl.abs(up) <= LIMIT).to(tl.float32)
        return f * mid, slope * mid * (gate <= LIMIT).to(tl.float32), f * inside
    elif KIND == "oai_swiglu":
        low, mid = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        s = tl.sigmoid(low * ALPHA)
        slope = s * (1 + ALPHA * low * (1 - s))
        inside = (tl.abs(up) <= LIMIT).to(tl.float32)
        return (mid + 1) * low * s, (mid + 1) * slope * (gate <= LIMIT).to(tl.float32), low * s * inside
    elif KIND == "softcapped_swiglu":
        low, mid = 2 * tl.sigmoid(2 * gate / ALPHA) - 1, 2 * tl.sigmoid(2 * up / LIMIT) - 1  # tanh
        s = tl.sigmoid(gate)
        f, slope = ALPHA * low * s, s * (1 - low * low + ALPHA * low * (1 - s))
        return f * mid * LIMIT, slope * mid * LIMIT, f * (1 - mid * mid)
    else:
        if KIND == "swiglu":
            f, slope = _act(gate, "silu")
        elif KIND == "geglu":
            f, slope = _act(gate, "gelu")
        elif KIND == "geglu_tanh":
            f, slope = _act(gate, "gelu_tanh")
        else:
            tl.static_assert(KIND == "reglu")
            f, slope = _act(gate, "relu")
        return f * up, slope * up, f


@triton.jit
def _expert_of(row, offsets, experts, EXPERTS: tl.constexpr):
    """The expert of each row: how many end at or before it."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + e, mask=e < experts, other=0x7FFFFFFF)
    return tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1)


@triton.jit
def _pairs(first, row, size, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of gates and ups that alternate: the positions in a row [2 * BLOCK], and which of [ROWS, 2 * BLOCK] there are."""
    column = first * 2 + tl.arange(0, 2 * BLOCK)
    return column, (row < rows)[:, None] & (column < size * 2)[None, :]


@triton.jit
def _load(
    h,
    bias,
    first,
    row,
    size,
    rows,
    expert,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate and up [ROWS, BLOCK], or twice the only pre-activation, with their biases, in fp32.

    Those that alternate are read as they lie and parted in registers: to step over every other number would ask memory for
    each one alone.
    """
    width = size * 2 if GATED else size
    start = row.to(tl.int64)[:, None] * width
    if BIASED:
        of = expert.to(tl.int64)[:, None] * width
    if INTERLEAVED:
        column, there = _pairs(first, row, size, rows, ROWS, BLOCK)
        both = tl.load(h + start + column[None, :], mask=there, other=0.0).to(tl.float32)
        if BIASED:
            both += tl.load(bias + of + column[None, :], mask=there, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        column = first + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (column < size)[None, :]
        gate = tl.load(h + start + column[None, :], mask=there, other=0.0).to(tl.float32)
        if BIASED:
            gate += tl.load(bias + of + column[None, :], mask=there, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(h + start + size + column[None, :], mask=there, other=0.0).to(tl.float32)
            if BIASED:
                up += tl.load(bias + of + size + column[None, :], mask=there, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store(
    to_h,
    to_gate,
    to_up,
    first,
    row,
    size,
    rows,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gate and up [ROWS, BLOCK] where :func:`_load` found them."""
    start = row.to(tl.int64)[:, None] * (size * 2 if GATED else size)
    if INTERLEAVED:
        column, there = _pairs(first, row, size, rows, ROWS, BLOCK)
        both = tl.reshape(tl.join(to_gate, to_up), (ROWS, 2 * BLOCK))
        tl.store(to_h + start + column[None, :], both.to(to_h.dtype.element_ty), mask=there)
    else:
        column = first + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (column < size)[None, :]
        tl.store(to_h + start + column[None, :], to_gate.to(to_h.dtype.element_ty), mask=there)
        if GATED:
            tl.store(to_h + start + size + column[None, :], to_up.to(to_h.dtype.element_ty), mask=there)


@triton.jit
def _forward(
    h,
    bias,
    offsets,
    weights,
    a,
    size,
    experts,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.load(offsets + experts - 1)  # what comes after the last expert's rows means nothing
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    expert = _expert_of(row, offsets, experts, EXPERTS) if BIASED else row
    gate, up = _load(h, bias, first, row, size, rows, expert, GATED, INTERLEAVED, BIASED, ROWS, BLOCK)
    if GATED:
        value, _, _ = _gate(gate, up, ALPHA, LIMIT, KIND)
    else:
        value, _ = _act(gate, KIND)
    if WEIGHTED:
        value *= tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    column = first + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < size)[None, :]
    tl.store(a + row.to(tl.int64)[:, None] * size + column[None, :], value.to(a.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    h,
    bias,
    offsets,
    to_a,
    weights,
    order,
    to_h,
    weighted,
    to_weights,
    size,
    experts,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.load(offsets + experts - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = _expert_of(row, offsets, experts, EXPERTS) if BIASED else row
    if WEIGHTED:
        flat = tl.load(order + row, mask=row < rows, other=0) if ORDERED else row
        weight = tl.load(weights + flat, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (column < size)[None, :]
        gate, up = _load(h, bias, first, row, size, rows, expert, GATED, INTERLEAVED, BIASED, ROWS, BLOCK)
        here = row.to(tl.int64)[:, None] * size + column[None, :]
        grad = tl.load(to_a + here, mask=there, other=0.0).to(tl.float32)
        if GATED:
            value, by_gate, by_up = _gate(gate, up, ALPHA, LIMIT, KIND)
        else:
            value, by_gate = _act(gate, KIND)
            by_up = by_gate
        if WEIGHTED:
            total += tl.sum(tl.where(there, grad * value, 0.0), axis=1)
            value, grad = value * weight, grad * weight
        tl.store(weighted + here, value.to(weighted.dtype.element_ty), mask=there)
        _store(to_h, grad * by_gate, grad * by_up, first, row, size, rows, GATED, INTERLEAVED, ROWS, BLOCK)
    if WEIGHTED:
        tl.store(to_weights + flat, total, mask=row < rows)


def _sizes(size: int) -> dict[str, int]:
    """Rows and columns of a program's tile: about 2,048 numbers."""
    block = min(512, triton.next_power_of_2(size))
    if size % block and size % (block // 2) == 0 and block > 64:
        block //= 2  # 768 = 3 * 256: no lane without work
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4}


def _constants(spec: ExpertsSpec, biased: bool, experts: int) -> dict[str, Any]:
    return {
        "ALPHA": spec.alpha,
        "LIMIT": spec.limit,
        "KIND": spec.activation,
        "GATED": spec.gated,
        "INTERLEAVED": spec.interleaved,
        "BIASED": biased,
        "EXPERTS": triton.next_power_of_2(experts),
    }


@functools.lru_cache(KEPT)
def _launch_forward(size: int, spec: ExpertsSpec, biased: bool, experts: int, weighted: bool) -> Launch:
    return Launch(_forward, size, experts, WEIGHTED=weighted, **_constants(spec, biased, experts), **_sizes(size))


@functools.lru_cache(KEPT)
def _launch_backward(size: int, spec: ExpertsSpec, biased: bool, experts: int, weighted: bool, ordered: bool) -> Launch:
    constants = {"WEIGHTED": weighted, "ORDERED": ordered, **_constants(spec, biased, experts)}
    sizes = _sizes(size)
    if spec.interleaved:  # parting and joining takes registers: 0.60 ms instead of 0.95 (H200, 65,536 rows of 2,880)
        sizes = {"ROWS": 2, "BLOCK": min(256, sizes["BLOCK"]), "num_warps": 2}
    return Launch(_backward, size, experts, **constants, **sizes)


def forward(h: Tensor, bias: Tensor | None, offsets: Tensor, spec: ExpertsSpec, weights: Tensor | None = None) -> Tensor:
    """a [R, I] in h's dtype; h [R, 2I] (I if not gated), bias [E, 2I or I] added to each expert's rows, offsets [E] int32.

    weights [R]: each row of the result is multiplied by its weight, before it is rounded.
    """
    rows, size = h.shape[0], h.shape[1] // (2 if spec.gated else 1)
    a = h.new_empty(rows, size)
    if a.numel():
        launch = _launch_forward(size, spec, bias is not None, len(offsets), weights is not None)
        grid = (cdiv(rows, launch.constants["ROWS"]), cdiv(size, launch.constants["BLOCK"]), 1)
        launch(grid, h, h if bias is None else bias, offsets, h if weights is None else weights.contiguous(), a)
    return a


def backward(
    h: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    to_a: Tensor,
    spec: ExpertsSpec,
    weights: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of ``weight * f(h)``, f being :func:`forward` and to_a [R, I] the gradient without the weight:

    the gradient of h [R, 2I or I], the weighted activation [R, I], and, shaped like ``weights``, the gradient of the weights
    (fp32). weights [R]; or, with order [R], the flat position of each row, [T, K]; None: all weights are 1.
    """
    rows, size = to_a.shape
    to_h, weighted = torch.empty_like(h), torch.empty_like(to_a)
    # by order there is a row for each weight; without, those after the last expert's rows get none
    new = h.new_zeros if order is None else h.new_empty
    to_weights = None if weights is None else new(weights.shape, dtype=torch.float32)
    if to_a.numel():
        launch = _launch_backward(size, spec, bias is not None, len(offsets), weights is not None, order is not None)
        launch(
            (cdiv(rows, launch.constants["ROWS"]), 1, 1),
            h,
            h if bias is None else bias,
            offsets,
            to_a,
            h if weights is None else weights.contiguous(),
            offsets if order is None else order,
            to_h,
            weighted,
            h if to_weights is None else to_weights,
        )
    return to_h, weighted, to_weights


# --- the bias of the second projection -------------------------------------------------------------------------------


@triton.jit
def _add_bias(
    x,
    bias,
    offsets,
    weights,
    width,
    experts,
    WEIGHTED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.load(offsets + experts - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < width)[None, :]
    expert = _expert_of(row, offsets, experts, EXPERTS).to(tl.int64)
    value = tl.load(bias + expert[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = x + row.to(tl.int64)[:, None] * width + column[None, :]
    value += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, value.to(x.dtype.element_ty), mask=there)


def add_bias_(x: Tensor, bias: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
    """Adds to x [R, n], in place, each row's weight [R] (None: 1) times its expert's bias [E, n]; rounded once."""
    rows, width = x.shape
    tile = _sizes(width)
    if x.numel():
        _add_bias[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))](
            x,
            bias,
            offsets,
            x if weights is None else weights.contiguous(),
            width,
            len(offsets),
            WEIGHTED=weights is not None,
            EXPERTS=triton.next_power_of_2(len(offsets)),
            **tile,
        )


@triton.jit
def _add_dot(x, bias, offsets, out, width, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.load(offsets + experts - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = _expert_of(row, offsets, experts, EXPERTS).to(tl.int64)
    total = tl.load(out + row, mask=row < rows, other=0.0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        there = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
        value *= tl.load(bias + expert[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(value, axis=1)
    tl.store(out + row, total, mask=row < rows)


def add_dot_(out: Tensor, x: Tensor, bias: Tensor, offsets: Tensor) -> None:
    """Adds to out [R] (fp32), in place, the product of each row of x [R, n] with its expert's bias [E, n]."""
    rows, width = x.shape
    tile = _sizes(width)
    if x.numel():
        _add_dot[(triton.cdiv(rows, tile["ROWS"]),)](
            x, bias, offsets, out, width, len(offsets), EXPERTS=triton.next_power_of_2(len(offsets)), **tile
        )


@triton.jit
def _segment_sum(
    x,
    weights,
    order,
    offsets,
    out,
    width,
    experts,
    parts,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one expert's rows every ``parts``-th tile: out [parts, experts, width]."""
    expert = tl.program_id(0)
    part = tl.program_id(2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start + part * ROWS, end, parts * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (column < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            flat = tl.load(order + row, mask=row < end, other=0) if ORDERED else row
            value *= tl.load(weights + flat, mask=row < end, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(value, axis=0)
    at = out + (part * experts + expert) * width + column
    tl.store(at, total.to(out.dtype.element_ty), mask=column < width)


@functools.lru_cache(KEPT)
def _launch_sum(width: int, experts: int, parts: int, weighted: bool, ordered: bool) -> Launch:
    block = min(64, triton.next_power_of_2(width))
    constants = {"WEIGHTED": weighted, "ORDERED": ordered, "ROWS": 64, "BLOCK": block, "num_warps": 2}
    return Launch(_segment_sum, width, experts, parts, **constants)


def segment_sum(
    x: Tensor, offsets: Tensor, dtype: torch.dtype, weights: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """x [R, n] -> [E, n]: the (weighted) sum of each expert's rows, in fp32 and one fixed order. For gradients of biases.

    weights and order are those of :func:`backward`. Experts with many rows (on average) are summed in up to 8 parts at once.
    """
    rows, width = x.shape
    experts = len(offsets)
    parts = max(1, min(8, rows // (experts * 128)))
    out = x.new_empty(parts, experts, width, dtype=dtype if parts == 1 else torch.float32)
    launch = _launch_sum(width, experts, parts, weights is not None, order is not None)
    launch(
        (experts, cdiv(width, launch.constants["BLOCK"]), parts),
        x,
        x if weights is None else weights.contiguous(),
        offsets if order is None else order,
        offsets,
        out,
    )
    return out[0] if parts == 1 else out.sum(0).to(dtype)
