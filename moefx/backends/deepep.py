"""DeepEP (https://github.com/deepseek-ai/DeepEP): dispatch and combine over NVLink within a node and RDMA between nodes.

``Buffer`` serves one node (also without host sync, where a capacity is given) and several; DeepEP 2's ``ElasticBuffer`` is in
:mod:`moefx.backends.deepep_elastic`. DeepEP's dispatch sends a token once to each rank, its combine adds up one row
of each rank in float32 and rounds to bfloat16: the same arithmetic as all-to-all's. Its gradient moves are the same two: the
backward of dispatch is a combine, that of combine a dispatch along the same handle.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx

from moefx import transports
from moefx.backends import Backend, Kernel
from moefx.ir.graph import arguments, value
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.transports import Call, Dispatched, Host, Shapes, Wait, fp8_rows, make_host

#: Ranks of a node that DeepEP's kernels expect, and the numbers of ranks that it has settings for.
RANKS_OF_NODE = 8
SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)

INSTALL = (
    "build it from https://github.com/deepseek-ai/DeepEP with the CUDA that torch has: `TORCH_CUDA_ARCH_LIST=9.0 pip install "
    "--no-build-isolation .` (NVSHMEM >= 3.3 adds RDMA, 2.x also needs NCCL >= 2.30.4; 1.2.1 without NVSHMEM serves one node, "
    "if '-rdc=true' is taken out of its setup.py)"
)
CUDA = (12, 3)  #: the first with what DeepEP's kernels for Hopper use
#: Numbers of 16 bits that rows are padded to: a warp of ``Buffer``'s combine takes 32 times 16 bytes at once, and where a row
#: ends within (H = 2880 or 2688) it writes what it has not added up (seen with 1.2.1; the kernels between nodes assert it).
WHOLE = 256


@functools.cache
def _library() -> Any:
    import deep_ep

    return deep_ep


def available() -> str | None:
    """Why DeepEP cannot be used here, and what to do; None if it can."""
    if importlib.util.find_spec("deep_ep") is None:
        return f"deep_ep is not installed: {INSTALL}"
    if not torch.cuda.is_available():
        return "DeepEP needs a CUDA device, and there is none"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"DeepEP needs compute capability 8.0 or more, this device has {capability[0]}.{capability[1]}"
    if tuple(map(int, (torch.version.cuda or "0.0").split("."))) < CUDA:
        wanted = ".".join(map(str, CUDA))
        return f"DeepEP needs CUDA {wanted} or later, torch was built with {torch.version.cuda}: install a newer torch"
    try:
        library = _library()
    except Exception as error:
        return import_problem(error)
    return too_old(library)


def import_problem(error: Exception) -> str:
    """What is the matter with a deep_ep that does not import."""
    text = str(error).splitlines()[0]
    if "cudaRegisterLinkedBinary" in text:
        return (
            "deep_ep does not import: it was compiled with -rdc=true and its device code was never linked, as 1.2.1's setup.py "
            "does without NVSHMEM: take '-rdc=true' out of setup.py, or install nvidia-nvshmem-cu13 (or -cu12), and build again"
        )
    if "undefined symbol" in text:
        return f"deep_ep was built for another torch or CUDA than {torch.__version__} ({text}): {INSTALL}"
    return f"deep_ep does not import ({type(error).__name__}: {text}): {INSTALL}"


def too_old(library: Any) -> str | None:
    """What this backend calls that the package has not."""
    buffer = getattr(library, "Buffer", None)
    if buffer is None:
        return f"deep_ep {version()} has no Buffer: {INSTALL}"
    if "num_worst_tokens" not in inspect.signature(buffer.dispatch).parameters:
        return f"deep_ep {version()} is too old, its dispatch has no num_worst_tokens (1.2 and later have): {INSTALL}"
    return None


def version() -> str:
    try:
        return importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(_library(), "__version__", "of unknown version"))


# --- topology --------------------------------------------------------------------------------------------------------


def refuses_group(name: str) -> str | None:
    """Why DeepEP cannot serve this process group, or None. The first call on a group is collective; all ranks say the same."""
    return _refuses(dispatch_combine._group(name))


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
            return f"DeepEP wants {RANKS_OF_NODE} neighbouring ranks on each node, these {ep} ranks are on {sorted(set(nodes))}"
    elif len(set(nodes)) > 1:
        return f"DeepEP serves up to {RANKS_OF_NODE} ranks over NVLink, these {ep} ranks are on {len(set(nodes))} nodes"
    problem = _nvlink_problem([device for device, _, node in found if node == mine[2]])
    problems: list[Any] = [None] * ep
    dist.all_gather_object(problems, problem, group)
    return next((p for p in problems if p), None)


def _node() -> str:
    import socket

    return os.environ.get("GROUP_RANK", "") + socket.gethostname()


def _nvlink_problem(devices: list[int]) -> str | None:
    """A pair of this node's GPUs that are joined by PCIe only."""
    here = torch.cuda.current_device()
    for other in sorted(set(devices) - {here}):
        if other >= torch.cuda.device_count():
            continue  # each rank sees its own device only: nothing can be asked
        if not torch.cuda.can_device_access_peer(here, other):
            return f"GPU {here} cannot reach the memory of GPU {other}: DeepEP needs NVLink between all GPUs of a node"
    name = torch.cuda.get_device_name()
    if "PCIE" in name.upper().replace("-", "").replace(" ", "") and len(set(devices)) > 2:
        return f"{name} are joined by NVLink in pairs only, DeepEP needs it between all {len(set(devices))} GPUs"
    return None


# --- buffers ---------------------------------------------------------------------------------------------------------


@dataclass
class _Buffers:
    """The buffer of a process group: one for all layers, since they exchange one after the other; it grows with H."""

    legacy: Any = None
    row_bytes: int = 0

    def close(self) -> None:
        if self.legacy is not None:
            torch.cuda.synchronize()
            self.legacy.destroy()
        self.legacy, self.row_bytes = None, 0


_buffers: dict[str, _Buffers] = {}


def release(group: str | None = None) -> None:
    """Frees the buffers of a process group, or of all; collective over the group. The next dispatch makes new ones."""
    for name in [group] if group else list(_buffers):
        if name in _buffers:
            _buffers.pop(name).close()


def buffer_bytes(row_bytes: int, ep: int) -> tuple[int, int]:
    """NVLink and RDMA bytes of a ``Buffer`` for rows of this size."""
    buffer = _library().Buffer
    nvl = rdma = 0
    for config in (buffer.get_dispatch_config(ep), buffer.get_combine_config(ep)):
        nvl = max(nvl, config.get_nvl_buffer_size_hint(row_bytes, ep))
        if ep > RANKS_OF_NODE:
            rdma = max(rdma, config.get_rdma_buffer_size_hint(row_bytes, ep))
    return nvl, rdma


def _legacy(call: Call, rows: Tensor) -> Any:
    row_bytes = rows.shape[1] * rows.element_size()
    mine = _buffers.setdefault(call.group.group_name, _Buffers())
    if mine.row_bytes < row_bytes:
        mine.close()
        nvl, rdma = buffer_bytes(row_bytes, call.ep)
        mine.legacy = _library().Buffer(call.group, nvl, rdma, explicitly_destroy=True)
        mine.row_bytes = row_bytes
    return mine.legacy


def wait_for(event: Any, *used: Any) -> Wait:
    """Makes the current stream wait. ``used`` live until then: DeepEP reads and writes them on its own stream."""
    kept = list(used)

    def wait() -> None:
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream().wait_event(event)
        else:
            event.current_stream_wait()
        kept.clear()

    return wait


# --- handles as bytes ------------------------------------------------------------------------------------------------

_DTYPES = (torch.int32, torch.bool, torch.uint8, torch.int64)


def pack_tensors(tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    """Tensors of up to three dimensions as one of bytes, and (dtype, dimensions, sizes) of each to read it by."""
    parts, own = [], [len(tensors)]
    for t in tensors:
        if t is None:
            own += [-1, 0, 0, 0, 0]
            continue
        own += [_DTYPES.index(t.dtype), *[t.dim(), *t.shape, 0, 0, 0][:4]]
        raw = t.contiguous().view(-1).view(torch.uint8)
        parts.append(torch.nn.functional.pad(raw, (0, -raw.shape[0] % 16)))
    return torch.cat(parts), own


def unpack_tensors(handle: Tensor, own: list[int]) -> list[Any]:
    found: list[Tensor | None] = []
    at = 0
    for i in range(own[0]):
        dtype, dims, *size = own[1 + 5 * i : 6 + 5 * i]
        if dtype < 0:
            found.append(None)
            continue
        shape = size[:dims]
        many = _DTYPES[dtype].itemsize
        for n in shape:
            many *= n
        found.append(handle[at : at + many].view(_DTYPES[dtype]).view(shape))
        at += (many + 15) // 16 * 16
    return found


# --- the transport ---------------------------------------------------------------------------------------------------


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


class DeepEP:
    """Along ``Buffer``."""

    packed = False

    def shapes(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        (tokens, hidden), top_k = x.shape, index.shape[1]
        n = call.ep * call.capacity if call.capacity else size("received")
        return Shapes((n, hidden), (n, top_k), (size("handle"),), (tokens, hidden), (tokens, top_k))

    def send(self, x: Tensor, index: Tensor, weights: Tensor, call: Call, kept: Dispatched | None) -> tuple[Dispatched, Wait]:
        if kept is not None:
            tokens, wait = self._again(x, kept.handle, kept.host, call)
            return Dispatched(tokens, *(t.clone() for t in kept[1:])), wait
        many = x.shape[0]
        x, index, weights = at_least_one(x, index, weights)
        rows = padded(x)
        buffer, payload = _legacy(call, rows), on_wire(rows, call)
        *layout, event = buffer.get_dispatch_layout(
            index, call.num_experts, previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        per_rank, per_node, per_expert, in_rank = layout
        worst, top_k = call.ep * call.capacity, index.shape[1]
        got, experts, got_weights, counts, handle, _ = buffer.dispatch(
            payload,
            topk_idx=index,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=worst,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            packed, own = pack_tensors(list(handle))
            experts, got = experts.int(), off_wire(got, x)
            done = theirs.record_event()
        for t in (packed, experts, got):
            t.record_stream(here)
        facts = {
            transports.KIND: transports.NAMES.index("deepep"),
            transports.LAYER: call.layer,
            transports.CAPACITY: call.capacity,
            transports.TOKENS: many,
            transports.TOP_K: top_k,
            transports.RECEIVED: got.shape[0],
            transports.ROWS: worst * min(top_k, call.local) if worst else sum(counts),
            transports.PAIRS: many,
        }
        sent = Dispatched(got, experts, got_weights, packed, make_host(facts, call.ep, own=own))
        return sent, wait_for(done, x, payload, index, weights, handle)

    def resend(self, x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        return self._again(x, handle, host, replace(call, wire=""))

    @staticmethod
    def _again(x: Tensor, handle: Tensor, host: Tensor, call: Call) -> tuple[Tensor, Wait]:
        rows = padded(x) if x.shape[0] and x.shape[1] % WHOLE else padded(sent_copy(x))  # padding makes a copy too
        buffer = _legacy(call, rows)
        payload, tensors = on_wire(rows, call), unpack_tensors(handle, Host.read(host).own)
        got, *_, event = buffer.dispatch(
            payload, handle=tuple(tensors), previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        if not call.wire and rows.shape[1] == x.shape[1]:
            return got, wait_for(event, rows, handle, got)
        here, theirs = torch.cuda.current_stream(), buffer.get_comm_stream()
        with torch.cuda.stream(theirs):
            got = off_wire(got, x)
            done = theirs.record_event()
        got.record_stream(here)
        return got, wait_for(done, rows, payload, handle)

    def bring_back(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, host: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        rows, sizes = padded(tokens).contiguous(), Host.read(host)
        buffer = _legacy(call, rows)
        weights = None if weights is None else weights.contiguous()
        back, back_weights, event = buffer.combine(
            rows,
            tuple(unpack_tensors(handle, sizes.own)),
            topk_weights=weights,
            previous_event=buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        if rows.shape[1] == tokens.shape[1]:
            done = event
        else:
            with torch.cuda.stream(buffer.get_comm_stream()):
                back = off_wire(back, tokens)
                done = buffer.get_comm_stream().record_event()
            back.record_stream(torch.cuda.current_stream())
        wait = wait_for(done, rows, weights, handle, back)
        if not sizes.facts[transports.TOKENS]:
            back, back_weights = back[:0].clone(), None if back_weights is None else back_weights[:0].clone()
        return back, back_weights, wait

    def collect(
        self, back: Tensor, back_weights: Tensor | None, handle: Tensor, host: Tensor, call: Call, hidden: int
    ) -> tuple[Tensor, Tensor | None]:
        return back.clone(), None if back_weights is None else back_weights.clone()


TRANSPORT = DeepEP()


# --- the backend -----------------------------------------------------------------------------------------------------


def refuses_tensors(node: fx.Node) -> str | None:
    """What both buffers cannot send."""
    given = arguments(node)
    x, index = value(given["x"]), value(given["index"])
    if x.device.type != "cuda":
        return f"DeepEP needs cuda, the tokens are on {x.device}"
    if x.dtype != torch.bfloat16:
        return f"DeepEP sends bfloat16, the tokens are {x.dtype}"
    if isinstance(x.shape[1], int) and x.shape[1] % 8:
        return f"DeepEP sends rows of whole 16 bytes, the hidden size is {x.shape[1]}"
    if index.shape[1] > 32:
        return f"DeepEP sends a token to up to 32 experts, here {index.shape[1]}"
    dtype = _dtype_of_results(node)
    if dtype is not None and dtype != torch.bfloat16:
        return f"DeepEP brings back bfloat16, the experts compute {dtype}"
    return None


def _refuses_dispatch(node: fx.Node) -> str | None:
    problem, given = refuses_tensors(node), arguments(node)
    if problem:
        return problem
    group = given["group"]
    problem = refuses_group(group)
    if problem is None and given["capacity"] and dispatch_combine._group(group).size() > RANKS_OF_NODE:
        return f"DeepEP's Buffer has no dispatch with a capacity between nodes ({dispatch_combine._group(group).size()} ranks)"
    return problem


def _dtype_of_results(node: fx.Node) -> torch.dtype | None:
    """What the experts, between this dispatch and its combine, compute in."""
    for item in node.users:
        for user in item.users:
            if user.meta.get("semantic", user.target) is grouped.grouped_mlp:
                return value(arguments(user)["up"]).dtype
    return None


BACKEND = Backend(
    "deepep",
    {
        dispatch_combine.dispatch: Kernel(
            dispatch_combine.dispatch_by("deepep"), _refuses_dispatch, "DeepEP's kernels, on their own stream"
        ),
    },
    available,
)
