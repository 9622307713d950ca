"""Inputs of DeepEP's kernels and what they return: at least one row, of a width that they support, in FP8 if asked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.transports import Call, fp8_rows

#: Rows are padded to multiples of so many 16-bit elements: a warp of ``Buffer``'s combine reads 32 times 16 bytes at once, and
#: where a row ends within them (H = 2880 or 2688) the result is wrong (seen with 1.2.1; the kernels between nodes assert it).
ROW_MULTIPLE = 256


def at_least_one(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs, or, for a rank without tokens, one token with the experts -1: the kernels need one."""
    if x.shape[0]:
        return x.contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous()
    top_k = topk_ids.shape[1]
    return x.new_zeros(1, x.shape[1]), topk_ids.new_full((1, top_k), -1), topk_weights.new_zeros(1, top_k).float()


def sent_copy(x: Tensor) -> Tensor:
    """x, or one row for a rank without tokens. A copy: compiled code may write to x before DeepEP, on its stream, reads it."""
    return x.clone(memory_format=torch.contiguous_format) if x.shape[0] else x.new_zeros(1, x.shape[1])


def padded(x: Tensor) -> Tensor:
    """x [T, H] in rows that ``Buffer`` can sum: [T, H rounded up to ROW_MULTIPLE]."""
    missing = -x.shape[1] % ROW_MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


def encode(x: Tensor, call: Call) -> Any:
    """The argument of DeepEP's dispatch: x, or its e4m3 elements and scales."""
    return fp8_rows.quantize(x) if call.dispatch_dtype else x


def decode(received: Any, like: Tensor) -> Tensor:
    """What DeepEP's dispatch or combine returned, in the dtype and width of ``like`` [T, H]."""
    rows = fp8_rows.dequantize(received[0], received[1], like.dtype) if isinstance(received, tuple) else received
    return rows if rows.shape[1] == like.shape[1] else rows[:, : like.shape[1]].contiguous()
