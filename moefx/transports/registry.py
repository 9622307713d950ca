"""Transports by name, and which one a process group gets where none is named."""

from __future__ import annotations

import importlib
import os
import sys

import torch.distributed as dist

from moefx.errors import MoefxError
from moefx.transports.base import Call, Transport
from moefx.transports.header import NAMES

#: The module of each transport: imported when it is first used.
_MODULES = {
    "all_to_all": "moefx.transports.all_to_all",
    "all_gather": "moefx.transports.all_gather",
    "hierarchical": "moefx.transports.hierarchical",
    "deepep": "moefx.backends.deepep",
    "deepep_elastic": "moefx.backends.experimental.deepep_elastic",
    "te_ep": "moefx.backends.experimental.te_ep",
    "loop_back": "moefx.transports.loop_back",
}
assert tuple(_MODULES) == NAMES


def find(name: str) -> Transport:
    """The transport of this name."""
    if name not in _MODULES:
        raise MoefxError(f"no transport is named {name!r}; there are: {', '.join(NAMES)}")
    return importlib.import_module(_MODULES[name]).TRANSPORT


def release(group: str) -> None:
    """Frees the buffers that transports keep for a process group; collective over it."""
    for module in map(sys.modules.get, _MODULES.values()):  # one that was never used was never imported
        if module is not None and hasattr(module, "release"):
            module.release(group)


def nodes(group: dist.ProcessGroup) -> list[list[int]]:
    """The group's ranks (numbered within it) node by node, as torchrun placed them; one node if LOCAL_WORLD_SIZE is unset."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    found: dict[int, list[int]] = {}
    for i, rank in enumerate(dist.get_process_group_ranks(group)):
        found.setdefault(rank // each if each else 0, []).append(i)
    return list(found.values())


def default_transport(call: Call) -> str:
    """The transport over torch.distributed's collectives that serves ``call`` best.

    all_gather where a capacity is given; hierarchical between nodes of equally many neighbouring ranks, two or more; else
    all_to_all.
    """
    if call.capacity:
        return "all_gather"
    parts = nodes(call.group)
    sizes = {len(p) for p in parts}
    neighbours = [p for part in parts for p in part] == list(range(call.ep))
    return "hierarchical" if len(parts) > 1 and len(sizes) == 1 and sizes.pop() > 1 and neighbours else "all_to_all"
