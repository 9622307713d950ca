"""The table of the backend ``deepep``, and which dispatches it refuses."""

from __future__ import annotations

import torch
from torch import fx

from moefx.backends import Backend, Kernel
from moefx.backends.deepep.library import available
from moefx.backends.deepep.topology import RANKS_OF_NODE, refuses_group
from moefx.ir.graph import arguments, value
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.transports import process_group


def refuses_tensors(node: fx.Node) -> str | None:
    """Why DeepEP cannot send the tensors of this dispatch, or None; for both of its buffers."""
    given = arguments(node)
    x, topk_ids = value(given["x"]), value(given["topk_ids"])
    if x.device.type != "cuda":
        return f"DeepEP needs cuda, the tokens are on {x.device}"
    if x.dtype != torch.bfloat16:
        return f"DeepEP sends bfloat16, the tokens are {x.dtype}"
    if isinstance(x.shape[1], int) and x.shape[1] % 8:
        return f"DeepEP sends rows of whole 16 bytes, the hidden size is {x.shape[1]}"
    if topk_ids.shape[1] > 32:
        return f"DeepEP sends a token to up to 32 experts, here {topk_ids.shape[1]}"
    dtype = _dtype_of_results(node)
    if dtype is not None and dtype != torch.bfloat16:
        return f"DeepEP returns bfloat16, the experts compute {dtype}"
    return None


def _refuses_dispatch(node: fx.Node) -> str | None:
    problem, given = refuses_tensors(node), arguments(node)
    if problem:
        return problem
    group = given["group"]
    problem = refuses_group(group)
    if problem is None and given["capacity"] and process_group(group).size() > RANKS_OF_NODE:
        return f"DeepEP's Buffer has no dispatch with a capacity between nodes ({process_group(group).size()} ranks)"
    return problem


def _dtype_of_results(node: fx.Node) -> torch.dtype | None:
    """What the experts, between this dispatch and its combine, compute in."""
    for item in node.users:
        for user in item.users:
            if user.meta.get("semantic", user.target) is grouped.grouped_mlp:
                return value(arguments(user)["gate_up"]).dtype
    return None


BACKEND = Backend(
    "deepep",
    {
        dispatch_combine.dispatch: Kernel(
            dispatch_combine.dispatch_with("deepep"), _refuses_dispatch, "DeepEP's kernels, on their own stream"
        ),
    },
    available,
)
