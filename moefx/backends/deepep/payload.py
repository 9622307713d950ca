"""What DeepEP's kernels are given and what they return: at least one row, of a width that they take, in 8 bits if asked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.transports import Call, fp8_rows

#: Numbers of 16 bits that rows are padded to: a warp of ``Buffer``'s combine takes 32 times 16 bytes at once, and where a row
#: ends within (H = 2880 or 2688) it writes what it has not added up (seen with 1.2.1; the kernels between nodes assert it).
WHOLE = 256


def at_least_one(x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rank without tokens sends one to nobody: the kernels want one."""
    if x.shape[0]:
        return x.contiguous(), index.contiguous(), weights.float().contiguous()
    return x.new_zeros(1, x.shape[1]), index.new_full((1, index.shape[1]), -1), weights.new_zeros(1, index.shape[1]).float()


def sent_copy(x: Tensor) -> Tensor:
    """x, or one row for a rank without tokens. A copy: compiled code may write to x before DeepEP, on its stream, reads it."""
    return x.clone(memory_format=torch.contiguous_format) if x.shape[0] else x.new_zeros(1, x.shape[1])


def padded(x: Tensor) -> Tensor:
    """x [T, H] in rows that ``Buffer`` can add up: [T, H rounded up to WHOLE]."""
    missing = -x.shape[1] % WHOLE
    return F.pad(x, (0, missing)) if missing else x


def on_wire(x: Tensor, call: Call) -> Any:
    """What DeepEP's dispatch gets: x, or its e4m3 numbers and scales."""
    return fp8_rows.quantize(x) if call.wire else x


def off_wire(got: Any, like: Tensor) -> Tensor:
    """What DeepEP received as rows like x [T, H]."""
    rows = fp8_rows.dequantize(got[0], got[1], like.dtype) if isinstance(got, tuple) else got
    return rows if rows.shape[1] == like.shape[1] else rows[:, : like.shape[1]].contiguous()
