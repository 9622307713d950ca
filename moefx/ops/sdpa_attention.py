"""Scaled dot-product attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op
from moefx.ops.spec import schema, takes_spec


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys a query attends to, and what happens to its scores."""

    #: What scores are multiplied by.
    scale: float
    #: Without a mask: no query attends to later positions.
    is_causal: bool
    #: Of causal attention without a mask: to how many positions back, its own included; None: to all.
    window: int | None = None
    #: c: scores become ``c * tanh(score / c)``; 0: they stay.
    softcap: float = 0.0
    #: The share of the probabilities that are set to zero.
    dropout: float = 0.0


def is_packed(mask: Tensor | None) -> bool:
    """Does attention's mask say where packed sequences begin, and not who sees whom?"""
    return mask is not None and mask.dtype == torch.int32


def visible(queries: int, keys: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor:
    """The boolean mask of causal attention that ``window`` and ``starts`` [B, S] say: [S, T], or [B, 1, S, T] with starts."""
    key = torch.arange(keys, device=device)
    distance = torch.arange(queries, device=device)[:, None] - key
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen if starts is None else seen & (key >= starts[:, None, :, None])


@op(f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, *, {schema(AttentionSpec)}) -> Tensor")
@takes_spec
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *, spec: AttentionSpec) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads: q [B, A, S, D], k and v [B, A/n, S, D]; [B, S, A, Dv].

    ``mask`` [B or 1, 1, S, S] is boolean (True: attend) or added to the scores, and then says everything; without one,
    ``is_causal`` and ``window`` (how many positions back, itself included) say who sees whom. ``mask`` [B, S] in int32 says
    besides where each query's sequence begins in a packed row: it sees no key before. ``sinks`` [A]: one more
    logit per head that takes probability and gives no value (GPT-OSS). The softmax runs in fp32, or with sinks in the scores'
    dtype after subtracting the maximum, as the models do. Options: :class:`AttentionSpec`.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if spec.is_causal and (mask is None or is_packed(mask)):
        mask = visible(q.shape[2], k.shape[2], spec.window, mask, q.device)
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if boolean else scores + mask
    if sinks is None:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    else:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        probabilities = torch.softmax(scores, dim=-1)[..., :-1].to(v.dtype)
    if boolean and mask is not None:
        probabilities = probabilities.masked_fill(~mask, 0.0)  # a query that may see nothing (padding) gives zeros, as SDPA
    if spec.dropout:
        probabilities = F.dropout(probabilities, p=spec.dropout)
    return torch.matmul(probabilities, v).transpose(1, 2).contiguous()
