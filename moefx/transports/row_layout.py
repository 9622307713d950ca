"""Rows of several parts, of different dtypes, in one tensor, which is sent in one piece."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGN = 16  # bytes: so that each part can be read as any dtype, and by vector loads


def _padded(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def row_bytes(*parts: tuple[int, torch.dtype]) -> int:
    """Bytes of a row that holds ``parts``, (number of elements, dtype) each, one after the other."""
    return sum(_padded(n * dtype.itemsize) for n, dtype in parts)


def unpack(rows: Tensor, *parts: tuple[int, torch.dtype]) -> list[Tensor]:
    """Views of the parts of each row of ``rows`` [n, W]."""
    found, at, raw = [], 0, rows.view(torch.uint8)
    for n, dtype in parts:
        found.append(raw[:, at : at + n * dtype.itemsize].view(dtype))
        at += _padded(n * dtype.itemsize)
    return found


def empty_rows(like: Tensor, n: int, *parts: tuple[int, torch.dtype]) -> Tensor:
    """Uninitialized rows [n, W] for ``parts``, of the dtype and on the device of ``like``."""
    return like.new_empty(n, row_bytes(*parts) // like.dtype.itemsize)
