"""``x @ weight.T`` of bfloat16 numbers as a float32 result, on tensor cores: products of two such numbers are exact in float32,
and are added there. What a cast of both to float32 computes without tensor cores.

The gradient that comes back is float32. It is cut into two bfloat16 numbers, which keep 16 of its 24 bits; the gradients of x
and of the weight, which are rounded to 8, are products of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..opaque import FIRST_INPUT, opaque


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] of bfloat16 -> float32."""
    return torch.mm(a, b, out_dtype=torch.float32)


@opaque("linear_to_fp32_bf16")
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H], weight [E, H] -> [T, E] float32."""
    return _product(x, weight.t())


@_forward.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@opaque("linear_to_fp32_bf16_backward", once=True)
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """grad [T, E] float32 -> gradients of x and of weight, of which ``needs`` says; others are empty."""
    high = grad.to(torch.bfloat16)
    both = torch.cat([high, (grad - high.float()).to(torch.bfloat16)], dim=1)  # [T, 2E]
    to_x, to_weight = x.new_empty(0), x.new_empty(0)
    if needs[0]:
        to_x = both @ torch.cat([weight, weight])
    if needs[1]:
        high_part, low_part = _product(both.t(), x).chunk(2)
        to_weight = (high_part + low_part).to(weight.dtype)
    return to_x, to_weight


@_gradients.register_fake
def _(grad, x, weight, needs):
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((x, weight), needs))


def _save(ctx, inputs, _, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    asked = ctx.needs_input_grad[FIRST_INPUT:]
    found = torch.ops.moefx.linear_to_fp32_bf16_backward(grad, *ctx.saved_tensors, list(asked))
    return tuple(t if need else None for t, need in zip(found, asked))


_forward.register_autograd(_backward, setup_context=_save)


def linear_to_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H] times weight [E, H], both bfloat16 -> [..., E] float32."""
    return _forward(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
