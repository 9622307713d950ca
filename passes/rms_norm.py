"""Raises every root mean square norm to one ``moefx.rms_norm``, however the model casts around the weight."""

from functools import cache

from moefx import ops
from moefx.match import f64
from moefx.raising import Raise


@cache
def RaiseRMSNorm() -> Raise:
    return Raise(
        "rms_norm",
        ops.rms_norm,
        {"x": f64(2, 3, 8), "weight": f64(8), "eps": 0.0123},
        variants=(
            {"cast_first": True},
            {"cast_first": False},
            {"offset": 1.0},
            {"weight": None},
            {"body": "weight upcast first"},
        ),
        body=_written,
    )


def _written(x, weight=None, eps=1e-6, cast_first=True, offset=0.0, body=""):
    """The norm's own body, and Nemotron-H's way of writing the same: the weight is upcast before the product."""
    if body:
        import torch

        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return (weight.to(torch.float32) * h).to(x.dtype)
    return ops.BODIES[ops.rms_norm](x, weight, eps, cast_first=cast_first, offset=offset)
