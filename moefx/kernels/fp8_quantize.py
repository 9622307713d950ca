"""Rounding to e4m3 with one scale for all that a product sums: a row, or a column of an expert's matrix. One kernel each."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv

#: Of :func:`_columns`: tile and stages, and programs for each processor; of 16 the fastest on an H200 for experts of
#: Qwen3-30B-A3B, GPT-OSS-20B and Nemotron 3 Nano. It moves 3.8 TB/s, if nothing that it reads again is in the cache.
_COLUMNS, _PROGRAMS = {"DEPTH": 64, "COLUMNS": 64, "STAGES": 4, "num_warps": 4}, 3


@triton.jit
def _rows(x, inverse, q, scales, width, TOP_K: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    """One row, read twice (the second time from the cache), and written once, or to the K rows of its token."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    most = tl.maximum(tl.max(largest, axis=0), 1e-30)
    times = tl.div_rn(448.0, most)  # as torch divides: so are the numbers the same everywhere
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        rounded = (value * times).to(tl.float8e4nv)
        for k in tl.static_range(TOP_K):
            to = tl.load(inverse + row * TOP_K + k).to(tl.int64) if SPREAD else row
            tl.store(q + to * width + column, rounded, mask=column < width)
    for k in tl.static_range(TOP_K):
        to = tl.load(inverse + row * TOP_K + k).to(tl.int64) if SPREAD else row
        tl.store(scales + to, most / 448.0)


@triton.jit
def _columns(
    w, q, scales, deep, columns, by_expert, by_depth, items, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):
    """w [E, deep, columns], columns contiguous -> q [E, columns, deep], with a scale for each column of each expert."""
    blocks = tl.cdiv(columns, COLUMNS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        expert = (item // blocks).to(tl.int64)
        column = (item % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        here, there = w + expert * by_expert + column[None, :], (column < columns)[None, :]
        largest = tl.zeros((DEPTH, COLUMNS), tl.float32)
        for first in tl.range(0, deep, DEPTH, num_stages=STAGES):
            depth = first + tl.arange(0, DEPTH)
            value = tl.load(here + depth.to(tl.int64)[:, None] * by_depth, mask=there & (depth < deep)[:, None], other=0.0)
            largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
        most = tl.maximum(tl.max(largest, axis=0), 1e-30)
        row = expert * columns + column
        tl.store(scales + row, most / 448.0, mask=column < columns)
        times = tl.div_rn(tl.full((COLUMNS,), 448.0, tl.float32), most)[None, :]
        for first in tl.range(0, deep, DEPTH, num_stages=STAGES):
            depth = first + tl.arange(0, DEPTH)
            inside = there & (depth < deep)[:, None]
            value = tl.load(here + depth.to(tl.int64)[:, None] * by_depth, mask=inside, other=0.0).to(tl.float32)
            rounded = tl.trans((value * times).to(tl.float8e4nv))
            tl.store(q + row[:, None] * deep + depth[None, :], rounded, mask=tl.trans(inside))


@functools.lru_cache(KEPT)
def _launch_rows(width: int, top_k: int, spread: bool) -> Launch:
    block = min(4096, triton.next_power_of_2(width))
    return Launch(_rows, width, TOP_K=top_k, SPREAD=spread, BLOCK=block, num_warps=4 if block <= 2048 else 8)


def rows(x: Tensor, inverse: Tensor | None = None, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """x [R, n] -> e4m3 [R, n], scales [R] fp32.

    With inverse [R * K] (:func:`counting_sort.sort_by_expert`): each row is written to the K rows that it names.
    """
    many, width = x.shape
    q = torch.empty(many * top_k, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(many * top_k, dtype=torch.float32, device=x.device)
    if q.numel():
        x = x.contiguous()
        _launch_rows(width, top_k, inverse is not None)((many, 1, 1), x, scales if inverse is None else inverse, q, scales)
    return q, scales


@functools.lru_cache(KEPT)
def _launch_columns(deep: int, columns: int, by_expert: int, by_depth: int, items: int) -> Launch:
    return Launch(_columns, deep, columns, by_expert, by_depth, items, **_COLUMNS)


def matrices(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [E, a, b], any strides -> its matrices the other way around, e4m3 [E, b, a] contiguous, scales [E, b] fp32."""
    experts, deep, columns = weight.shape
    other = weight.transpose(1, 2)
    if other.is_contiguous():
        q, scales = rows(other.reshape(-1, deep))
        return q.view(other.shape), scales.view(experts, columns)
    weight = weight.contiguous()
    q = torch.empty(experts, columns, deep, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(experts, columns, dtype=torch.float32, device=weight.device)
    if q.numel():
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 1
        items = experts * cdiv(columns, _COLUMNS["COLUMNS"])
        launch = _launch_columns(deep, columns, *weight.stride()[:2], items)
        launch((min(items, _PROGRAMS * processors), 1, 1), weight, q, scales)
    return q, scales
