"""``x @ weight.T`` in float32 for bfloat16 x, on tensor cores.

Products of two bfloat16 numbers are exact in float32, and are summed there.

A float32 number is split into bfloat16 parts, 8 bits each: three are all of it (a weight in float32, the gradient that a
float32 weight's gradient is made of), two are 16 bits (where the result is rounded to bfloat16, to 8). cuBLAS emulates float32
so on later GPUs (its BF16x9); here one side has one part, so that three products do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.ops.custom_op import FIRST_INPUT, opaque


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


@opaque("product_to_fp32", once=True)
def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], bfloat16 -> float32."""
    return _mm(a, b)


@_product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def parts(t: Tensor, many: int) -> list[Tensor]:
    """bfloat16 numbers whose sum is ``t`` but for 2**(-8 * many) of it."""
    found = []
    for _ in range(many):
        found.append(t.to(torch.bfloat16))
        t = t - found[-1]
    return found


@opaque("linear_to_fp32_in_parts")
def _forward(x: Tensor, weight: Tensor, cut: Tensor) -> Tensor:
    """x [T, H] times weight [E, H] -> [T, E] float32; ``cut`` [n * E, H] are the weight's parts."""
    experts = weight.shape[0]
    return _mm(x, cut.t()).view(x.shape[0], len(cut) // experts, experts).sum(1)


@_forward.register_fake
def _(x, weight, cut):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _save(ctx, inputs, _, output) -> None:
    x, weight, cut = inputs
    ctx.whole = weight.dtype == torch.float32
    ctx.save_for_backward(x, cut)


def _backward(ctx, grad: Tensor):
    """Plain operations but for one product: torch.compile fuses them."""
    x, cut = ctx.saved_tensors
    to_x, to_weight, _ = ctx.needs_input_grad[FIRST_INPUT:]
    experts = grad.shape[1]
    found = parts(grad, 3 if ctx.whole else 2)
    first = second = None
    if to_x:
        high, low = found[:2]
        if ctx.whole:  # what the two low parts have in common is beyond 16 bits
            first = torch.cat([high, low, high], dim=1) @ torch.cat([cut[:experts], cut[: 2 * experts]])
        else:
            first = torch.cat([high, low], dim=1) @ torch.cat([cut, cut])
    if to_weight:
        second = torch.ops.moefx.product_to_fp32(torch.cat(found, dim=1).t(), x)
        second = second.view(len(found), experts, x.shape[1]).sum(0)
        second = second if ctx.whole else second.to(torch.bfloat16)
    return first, second, None


_forward.register_autograd(_backward, setup_context=_save)


def linear_to_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H] in bfloat16 times weight [E, H] in bfloat16 or float32 -> [..., E] in float32."""
    cut = torch.cat(parts(weight.detach(), 3)) if weight.dtype == torch.float32 else weight.detach()
    return _forward(x.reshape(-1, x.shape[-1]), weight, cut).view(*x.shape[:-1], weight.shape[0])
