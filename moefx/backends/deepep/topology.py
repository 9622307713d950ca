"""Which process groups DeepEP supports: numbers of ranks that it has settings for, NVLink between the GPUs of a node."""

from __future__ import annotations

import functools
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from moefx.transports import process_group

#: Ranks of a node that DeepEP's kernels expect, and the numbers of ranks that it has settings for.
RANKS_OF_NODE = 8
SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


def refuses_group(name: str) -> str | None:
    """Why DeepEP cannot serve this process group, or None; the same on all ranks. The first call on a group is collective."""
    return _refuses(process_group(name))


@functools.cache
def _refuses(group: dist.ProcessGroup) -> str | None:
    ep = group.size()
    if ep not in SIZES:
        return f"DeepEP has settings for {', '.join(map(str, SIZES))} ranks, not for {ep}"
    mine = torch.cuda.current_device(), str(torch.cuda.get_device_properties("cuda").uuid), _node()
    found: list[Any] = [None] * ep
    dist.all_gather_object(found, mine, group)
    nodes = [node for *_, node in found]
    if ep > RANKS_OF_NODE:
        split = [nodes[i : i + RANKS_OF_NODE] for i in range(0, ep, RANKS_OF_NODE)]
        if any(len(set(part)) > 1 for part in split):
            return f"DeepEP needs {RANKS_OF_NODE} neighbouring ranks on each node, these {ep} ranks are on {sorted(set(nodes))}"
    elif len(set(nodes)) > 1:
        return f"DeepEP serves up to {RANKS_OF_NODE} ranks over NVLink, these {ep} ranks are on {len(set(nodes))} nodes"
    problem = _nvlink_problem([device for device, _, node in found if node == mine[2]])
    problems: list[Any] = [None] * ep
    dist.all_gather_object(problems, problem, group)
    return next((p for p in problems if p), None)


def _node() -> str:
    return os.environ.get("GROUP_RANK", "") + socket.gethostname()


def _nvlink_problem(devices: list[int]) -> str | None:
    """A sentence on GPUs of this node that NVLink does not connect, or None."""
    here = torch.cuda.current_device()
    for other in sorted(set(devices) - {here}):
        if other >= torch.cuda.device_count():
            continue  # each rank sees its own device only: there is nothing to query
        if not torch.cuda.can_device_access_peer(here, other):
            return f"GPU {here} cannot reach the memory of GPU {other}: DeepEP needs NVLink between all GPUs of a node"
    name = torch.cuda.get_device_name()
    if "PCIE" in name.upper().replace("-", "").replace(" ", "") and len(set(devices)) > 2:
        return f"{name} are connected by NVLink in pairs only, DeepEP needs it between all {len(set(devices))} GPUs"
    return None
