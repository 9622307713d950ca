"""Transports: how tokens get to the ranks that own their experts, and back. One row per (token, rank), not per expert.

A transport makes four moves (:class:`Transport`); :mod:`moefx.ops.dispatch_combine` makes operations with gradients of them:

    dispatch     tokens, with their experts and weights, to every rank that has one of their experts
    redispatch   other rows of the same tokens to the same ranks (the gradient of combine)
    return_rows  one row per received token to the rank that it came from (combine; the gradient of dispatch)
    reduce       the sum of what was returned, per token
"""

from moefx.transports.base import (
    DISPATCH_DTYPES,
    Call,
    Dispatched,
    Shapes,
    SummedInReturn,
    Transport,
    Wait,
    accumulation_dtype,
    allocate_buffers,
    process_group,
)
from moefx.transports.header import NAMES, Header, header_size, make_header
from moefx.transports.registry import default_transport, find, nodes, release
from moefx.transports.row_layout import empty_rows, row_bytes, unpack

__all__ = [
    "DISPATCH_DTYPES", "NAMES", "Call", "Dispatched", "Header", "Shapes", "SummedInReturn", "Transport", "Wait",
    "accumulation_dtype", "allocate_buffers", "default_transport", "empty_rows", "find", "header_size", "make_header", "nodes",
    "process_group", "release", "row_bytes", "unpack",
]  # fmt: skip
