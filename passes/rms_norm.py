"""Raises root mean square norms to ``moefx.rms_norm``, in all ways in which models cast around the weight."""

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
    """The weight may be multiplied before or after the cast back, have an offset, or be missing."""

    def __init__(self) -> None:
        example = {"x": f64(2, 3, 8), "weight": f64(8), "eps": 0.0123}
        super().__init__("rms_norm", ops.rms_norm, example, _VARIANTS, _written)


def _written(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, cast_first: bool = True, offset: float = 0.0, body: str = ""
) -> Tensor:
    """The operation's body, and two other forms.

    Nemotron-H and Gemma 4 cast the weight to fp32 before the product; Gemma 4 computes the root as a power.
    """
    if not body:
        same: Tensor = ops.BODIES[ops.rms_norm](x, weight, eps, cast_first=cast_first, offset=offset)
        return same
    h = x.to(torch.float32)
    mean = h.pow(2).mean(-1, keepdim=True) + eps
    h = h * (mean.pow(-0.5) if body == "power" else torch.rsqrt(mean))
    return (h if weight is None else weight.to(torch.float32) * h).to(x.dtype)
