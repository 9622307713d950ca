"""Routers in one kernel each way: scores, limits to groups, top-k and renormalization of a token's logits stay in registers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefx.kernels.launch import KEPT, Launch, cdiv
from moefx.ops import RouterSpec

#: Numbers of a program's tile of logits.
TILE = 2048


@triton.jit
def _scores(logits, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.sigmoid(logits)
    top = tl.max(logits, axis=1)
    e = tl.exp(logits - top[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _first_best(choice, lanes, last):
    """Of each row: the greatest value and the first lane that has it."""
    best = tl.max(choice, axis=1)
    at = tl.min(tl.where(choice == best[:, None], lanes[None, :], last), axis=1)
    return best, tl.minimum(at, last)


@triton.jit
def _only_best_groups(
    choice,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    ZERO: tl.constexpr,
):
    """``choice`` [ROWS, EXPERTS] with the experts outside of the KEPT best groups out of the choice."""
    grouped = tl.reshape(choice, (ROWS, GROUPS, EXPERTS // GROUPS))
    best = tl.max(grouped, axis=2)
    if TOP2:
        lanes = tl.arange(0, EXPERTS // GROUPS)
        first = tl.min(tl.where(grouped == best[:, :, None], lanes[None, None, :], EXPERTS), axis=2)
        rest = tl.where(lanes[None, None, :] == first[:, :, None], float("-inf"), grouped)
        best += tl.max(rest, axis=2)
    groups = tl.arange(0, GROUPS)
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(KEPT):
        _, at = _first_best(tl.where(kept > 0, float("-inf"), best), groups, GROUPS - 1)
        kept += (groups[None, :] == at[:, None]).to(tl.int32)
    out_of_it = 0.0 if ZERO else float("-inf")
    return tl.reshape(tl.where(kept[:, :, None] > 0, grouped, out_of_it), (ROWS, EXPERTS))


@triton.jit
def _route(
    logits,
    bias,
    topk_weights,
    topk_ids,
    tokens,
    experts,
    eps,
    scale,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOPK_FIRST: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    ZERO: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes, chosen = tl.arange(0, EXPERTS), tl.arange(0, CHOSEN)
    there = (token < tokens)[:, None] & (lanes < experts)[None, :]
    at_logits = token.to(tl.int64)[:, None] * experts + lanes[None, :]
    x = tl.load(logits + at_logits, mask=there, other=float("-inf")).to(tl.float32)
    scores = x if TOPK_FIRST else _scores(x, SIGMOID)
    choice = scores
    if BIASED:
        choice += tl.load(bias + lanes, mask=lanes < experts, other=0.0).to(tl.float32)[None, :]
    choice = tl.where(choice != choice, float("inf"), choice)  # NaN counts as the greatest, as in torch.topk
    if GROUPS:
        choice = _only_best_groups(choice, EXPERTS, ROWS, GROUPS, KEPT, TOP2, ZERO)
    choice = tl.where((lanes < experts)[None, :], choice, float("-inf"))
    found = tl.zeros((ROWS, CHOSEN), tl.float32)
    if TOPK_FIRST:
        found += float("-inf")
    at_output = token.to(tl.int64) * TOP_K
    for k in tl.static_range(TOP_K):
        _, best = _first_best(choice, lanes, experts - 1)
        here = lanes[None, :] == best[:, None]
        score = tl.sum(tl.where(here, scores, 0.0), axis=1)
        found = tl.where(chosen[None, :] == k, score[:, None], found)
        choice = tl.where(here, float("-inf"), choice)
        tl.store(topk_ids + at_output + k, best.to(tl.int64), mask=token < tokens)
    if TOPK_FIRST:
        found = tl.where((chosen < TOP_K)[None, :], _scores(found, SIGMOID), 0.0)
    if RENORMALIZE:
        found /= (tl.sum(found, axis=1) + eps)[:, None]
    there = (token < tokens)[:, None] & (chosen < TOP_K)[None, :]
    tl.store(topk_weights + at_output[:, None] + chosen[None, :], (found * scale).to(topk_weights.dtype.element_ty), mask=there)


@triton.jit
def _route_backward(
    grad,
    logits,
    topk_ids,
    to_logits,
    tokens,
    experts,
    eps,
    scale,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOPK_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes, chosen = tl.arange(0, EXPERTS), tl.arange(0, CHOSEN)
    there = (token < tokens)[:, None] & (lanes < experts)[None, :]
    at_logits = token.to(tl.int64)[:, None] * experts + lanes[None, :]
    x = tl.load(logits + at_logits, mask=there, other=float("-inf")).to(tl.float32)
    at_output = token.to(tl.int64)[:, None] * TOP_K + chosen[None, :]
    given = (token < tokens)[:, None] & (chosen < TOP_K)[None, :]
    g = tl.load(grad + at_output, mask=given, other=0.0).to(tl.float32) * scale
    scores = x if TOPK_FIRST else _scores(x, SIGMOID)
    found = tl.zeros((ROWS, CHOSEN), tl.float32)
    if TOPK_FIRST:
        found += float("-inf")
    for k in tl.static_range(TOP_K):
        expert = tl.load(topk_ids + token.to(tl.int64) * TOP_K + k, mask=token < tokens, other=0)
        score = tl.sum(tl.where(lanes[None, :] == expert[:, None], scores, 0.0), axis=1)
        found = tl.where(chosen[None, :] == k, score[:, None], found)
    if TOPK_FIRST:
        found = tl.where((chosen < TOP_K)[None, :], _scores(found, SIGMOID), 0.0)
    if RENORMALIZE:
        total = tl.sum(found, axis=1) + eps
        g = (g - (tl.sum(g * found, axis=1) / total)[:, None]) / total[:, None]
    if TOPK_FIRST:
        if SIGMOID:
            g = g * found * (1 - found)
        else:
            g = found * (g - tl.sum(g * found, axis=1)[:, None])
    back = tl.zeros((ROWS, EXPERTS), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(topk_ids + token.to(tl.int64) * TOP_K + k, mask=token < tokens, other=0)
        part = tl.sum(tl.where(chosen[None, :] == k, g, 0.0), axis=1)
        back += tl.where(lanes[None, :] == expert[:, None], part[:, None], 0.0)
    if not TOPK_FIRST:
        if SIGMOID:
            back = back * scores * (1 - scores)
        else:
            back = scores * (back - tl.sum(back * scores, axis=1)[:, None])
    tl.store(to_logits + at_logits, back.to(to_logits.dtype.element_ty), mask=there)


def _launch(kernel: Any, tokens: int, experts: int, top_k: int, spec: RouterSpec, **constants: Any) -> Launch:
    width = triton.next_power_of_2(experts)
    rows = max(1, TILE // width)
    return Launch(
        kernel,
        tokens,
        experts,
        spec.eps,
        spec.routed_scaling_factor,
        TOP_K=top_k,
        SIGMOID=spec.score == "sigmoid",
        TOPK_FIRST=spec.topk_first,
        RENORMALIZE=spec.renormalize,
        EXPERTS=width,
        ROWS=rows,
        CHOSEN=triton.next_power_of_2(top_k),
        num_warps=4,
        **constants,
    )


@functools.lru_cache(KEPT)
def _forward(tokens: int, experts: int, top_k: int, biased: bool, spec: RouterSpec) -> Launch:
    limited = spec.groups != spec.topk_groups  # else all groups are allowed
    return _launch(
        _route,
        tokens,
        experts,
        top_k,
        spec,
        BIASED=biased,
        GROUPS=spec.groups if limited else 0,
        KEPT=spec.topk_groups if limited else 0,
        TOP2=spec.group_score == "top2",
        ZERO=spec.zero_fill,
    )


@functools.lru_cache(KEPT)
def _backward(tokens: int, experts: int, top_k: int, spec: RouterSpec) -> Launch:
    return _launch(_route_backward, tokens, experts, top_k, spec)


def forward(logits: Tensor, bias: Tensor | None, top_k: int, dtype: torch.dtype, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in ``dtype``, from the greatest down, and topk_ids [T, K] int64, of logits [T, E]."""
    tokens, experts = logits.shape
    topk_weights = logits.new_empty(tokens, top_k, dtype=dtype)
    topk_ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    if tokens:
        launch = _forward(tokens, experts, top_k, bias is not None, spec)
        grid = (cdiv(tokens, launch.constants["ROWS"]), 1, 1)
        launch(grid, logits.contiguous(), logits if bias is None else bias, topk_weights, topk_ids)
    return topk_weights, topk_ids


def backward(grad: Tensor, logits: Tensor, topk_ids: Tensor, spec: RouterSpec) -> Tensor:
    """The gradient of the logits [T, E], from that of the topk_weights [T, K]."""
    tokens, experts = logits.shape
    to_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if tokens:
        launch = _backward(tokens, experts, topk_ids.shape[1], spec)
        grid = (cdiv(tokens, launch.constants["ROWS"]), 1, 1)
        launch(grid, grad.contiguous(), logits.contiguous(), topk_ids.contiguous(), to_logits)
    return to_logits
