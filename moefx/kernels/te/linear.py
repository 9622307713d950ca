"""A linear layer in FP8: input, weight and gradient are quantized by a recipe of Transformer Engine, products summed in fp32.

The weight is an ordinary parameter; its FP8 copy lives for one product. Kept for the backward: the input, as it came.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Recipe(NamedTuple):
    """A recipe of Transformer Engine.

    ``title``: its class; ``rows``, ``features``: what the sizes of a product must be multiples of; ``columns_alone``: its
    kernels write the columnwise copy without the rowwise one.
    """

    title: str
    rows: int
    features: int
    columns_alone: bool
    meaning: str


RECIPES = {
    "current": Recipe("Float8CurrentScaling", 16, 16, False, "a scale a tensor, E4M3 forward, E5M2 gradients"),
    "block": Recipe("Float8BlockScaling", 128, 128, True, "a scale for 128 numbers of a row, 128 x 128 of a weight, E4M3"),
}


def why_not(recipe: str) -> str | None:
    """Why this device cannot run the recipe, in Transformer Engine's words; None if it can."""
    from transformer_engine.pytorch import quantization

    check = quantization.check_fp8_block_scaling_support if recipe == "block" else quantization.check_fp8_support
    works, reason = check()
    return None if works else f"Transformer Engine has no {RECIPES[recipe].title} here: {reason}"


class _Quantizers(NamedTuple):
    x: Any
    weight: Any
    grad: Any
    recipe: Any


@functools.cache
def _quantizers(recipe: str) -> _Quantizers:
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.quantization import RecipeState

    made = getattr(recipes, RECIPES[recipe].title)()
    forward = RecipeState.create(made, mode="forward", num_quantizers=3).make_quantizers()
    backward = RecipeState.create(made, mode="backward", num_quantizers=2).make_quantizers()
    return _Quantizers(forward[0], forward[1], backward[0], made)


def _quantize(x: Tensor, quantizer: Any, recipe: str, *, rowwise: bool = False, columnwise: bool = False) -> Any:
    """x [R, H] in FP8: as it lies (``rowwise``), or transposed (``columnwise``), what products along R want.

    With a scale a tensor the kernel casts and transposes at once: it has no columnwise copy without the rowwise one
    (NotImplementedError). So both are asked for: R * H bytes more until this returns, and one of the seven bytes that a number
    of 16 bits then moves (read for the scale 2, read for the cast 2, written 1 + 1, read by the product 1).
    """
    quantizer = quantizer.copy()
    quantizer.internal = True  # storage only: no tensor subclass leaves this file
    quantizer.set_usage(rowwise=rowwise or not RECIPES[recipe].columns_alone, columnwise=columnwise)
    quantized = quantizer(x)
    if not rowwise:
        quantized.update_usage(rowwise_usage=False)  # frees it before the product, where products want it transposed
    return quantized


def _rows(x: Tensor, multiple: int) -> Tensor:
    """x [..., H] as [R, H], with rows of zeros up to the next multiple."""
    x = x.reshape(-1, x.shape[-1])
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


@torch.library.custom_op("moefx::te_fp8_linear", mutates_args=())
def te_fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """``x @ weight.T + bias`` in x's dtype (bf16 or fp16): x [..., I], weight [O, I], bias [O]; ``recipe``: see RECIPES."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    shape = (*x.shape[:-1], weight.shape[0])
    if not x.numel():
        return x.new_zeros(shape)
    q = _quantizers(recipe)
    rows = _quantize(_rows(x, RECIPES[recipe].rows), q.x, recipe, rowwise=True)
    w = _quantize(weight.contiguous(), q.weight, recipe, rowwise=True)
    split = q.recipe.fp8_gemm_fprop.use_split_accumulator
    b = None if bias is None else bias.to(x.dtype)
    out, *_ = general_gemm(w, rows, x.dtype, bias=b, use_split_accumulator=split)
    return _unpadded(out, shape)


def _unpadded(out: Tensor, shape: Sequence[int]) -> Tensor:
    return out[: math.prod(shape[:-1])].view(shape)


@te_fp8_linear.register_fake
def _(x, weight, bias, recipe):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("moefx::te_fp8_linear_backward", mutates_args=())
def te_fp8_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, recipe: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; ``needs`` says of which, the other is empty."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    if not x.numel() or not any(needs):
        return x.new_empty(x.shape if needs[0] else 0), weight.new_zeros(weight.shape if needs[1] else 0)
    q, multiple = _quantizers(recipe), RECIPES[recipe].rows
    dy = _quantize(_rows(grad, multiple), q.grad, recipe, rowwise=needs[0], columnwise=needs[1])
    to_x, to_weight = x.new_empty(0), weight.new_empty(0)
    if needs[0]:
        w = _quantize(weight.contiguous(), q.weight, recipe, columnwise=True)
        split = q.recipe.fp8_gemm_dgrad.use_split_accumulator
        out, *_ = general_gemm(w, dy, x.dtype, layout="NN", grad=True, use_split_accumulator=split)
        to_x = _unpadded(out, x.shape)
    if needs[1]:
        rows = _quantize(_rows(x, multiple), q.x, recipe, columnwise=True)
        split = q.recipe.fp8_gemm_wgrad.use_split_accumulator
        to_weight, *_ = general_gemm(rows, dy, weight.dtype, layout="NT", grad=True, use_split_accumulator=split)
    return to_x, to_weight


@te_fp8_linear_backward.register_fake
def _(grad, x, weight, recipe, needs):
    return x.new_empty(x.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.recipe = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    to_x, to_weight = torch.ops.moefx.te_fp8_linear_backward(grad, x, weight, ctx.recipe, list(needs[:2]))
    to_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias) if needs[2] else None
    return to_x if needs[0] else None, to_weight if needs[1] else None, to_bias, None


te_fp8_linear.register_autograd(_backward, setup_context=_save)
