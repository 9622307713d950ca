"""DeepEP's handles as one tensor of bytes, which an operation can return and autograd can keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.int32, torch.bool, torch.uint8, torch.int64)


def pack_tensors(tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    """Tensors of up to three dimensions as one of bytes, and (dtype, dimensions, sizes) of each, to read it back."""
    parts, own = [], [len(tensors)]
    for t in tensors:
        if t is None:
            own += [-1, 0, 0, 0, 0]
            continue
        own += [_DTYPES.index(t.dtype), *[t.dim(), *t.shape, 0, 0, 0][:4]]
        raw = t.contiguous().view(-1).view(torch.uint8)
        parts.append(torch.nn.functional.pad(raw, (0, -raw.shape[0] % 16)))
    return torch.cat(parts), own


def unpack_tensors(handle: Tensor, own: Sequence[int]) -> list[Any]:
    """Views of the tensors that :func:`pack_tensors` packed; ``own`` is what it returned."""
    found: list[Tensor | None] = []
    at = 0
    for i in range(own[0]):
        dtype, dims, *size = own[1 + 5 * i : 6 + 5 * i]
        if dtype < 0:
            found.append(None)
            continue
        shape = size[:dims]
        size_bytes = _DTYPES[dtype].itemsize * math.prod(shape)
        found.append(handle[at : at + size_bytes].view(_DTYPES[dtype]).view(shape))
        at += (size_bytes + 15) // 16 * 16
    return found
