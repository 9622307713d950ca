"""Raises every root mean square norm to one ``moefx.rms_norm``, however the model casts around the weight."""

import torch
from torch import Tensor

from moefx import ops
from moefx.rewriting.pattern import f64
from moefx.rewriting.raise_ops import Raise

_VARIANTS = (
    {"cast_first": True},
    {"cast_first": False},
    {"offset": 1.0},
    {"weight": None},
    {"body": "weight upcast first", "cast_first": False},
    {"body": "power", "cast_first": False},
    {"body": "power", "weight": None},
)


class RMSNorm(Raise):
    """With the weight multiplied before or after the cast back, with an offset, or without a weight."""

    def __init__(self) -> None:
        example = {"x": f64(2, 3, 8), "weight": f64(8), "eps": 0.0123}
        super().__init__("rms_norm", ops.rms_norm, example, _VARIANTS, _written)


def _written(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, cast_first: bool = True, offset: float = 0.0, body: str = ""
) -> Tensor:
    """The norm's own body, and two other ways of writing it: Nemotron-H upcasts the weight before the product, Gemma 4 too,
    and takes the root as a power.
    """
    if not body:
        same: Tensor = ops.BODIES[ops.rms_norm](x, weight, eps, cast_first=cast_first, offset=offset)
        return same
    h = x.to(torch.float32)
    mean = h.pow(2).mean(-1, keepdim=True) + eps
    h = h * (mean.pow(-0.5) if body == "power" else torch.rsqrt(mean))
    return (h if weight is None else weight.to(torch.float32) * h).to(x.dtype)
