"""NCCL EP through Transformer Engine (2.20 and later): a row for each (token, expert), sorted on arrival, no host sync.

Experimental: it has not run on GPUs, only against a stand-in (tests/support/nccl_ep_standin.py).

Its functions are called directly, within moefx's own opaque operations: as torch operations they fail on torch 2.11 (IndexError
in increment_version), where this backend refuses until tests/gpu/dispatch_ranks.py has shown that direct calls work. There is
one configuration per process; it needs the most tokens of a rank (``dispatch_capacity``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from moefx.backends import Backend, Kernel
from moefx.backends.deepep import refuses_tensors
from moefx.errors import MoefxError
from moefx.internals import nccl
from moefx.ir.graph import arguments
from moefx.ops import dispatch_combine
from moefx.transports import Call, Dispatched, Header, Shapes, SummedInReturn, Wait, make_header, process_group


@functools.cache
def _library() -> Any:
    importlib.import_module("transformer_engine.pytorch")  # loads the libraries that the other links to
    return importlib.import_module("transformer_engine_torch")


#: The torch that Transformer Engine's EP operations fail on.
FAILS_ON = (2, 11)


def available() -> str | None:
    """Why NCCL EP cannot be used here, and what to do; None if it can."""
    problem = missing()
    if problem is None and tuple(int(n) for n in torch.__version__.split(".")[:2]) <= FAILS_ON:
        version = importlib.metadata.version("transformer-engine")
        return (
            f"transformer-engine {version}'s EP operations raise IndexError (increment_version) on torch {torch.__version__}: "
            "install torch 2.12 or later, or use the backend deepep, or name none"
        )
    return problem


def missing() -> str | None:
    """What NCCL EP needs and is missing here, and what to do; None if nothing is."""
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "transformer-engine is not installed: pip install moefx[te]"
    if tuple(int(n) for n in version.split(".")[:2]) < (2, 20):
        return f"transformer-engine {version} has no NCCL EP, 2.20 and later have: pip install -U moefx[te]"
    if not torch.cuda.is_available():
        return "NCCL EP needs a CUDA device, and there is none"
    found = nccl.version()
    if found < (2, 30, 4):
        return (
            f"NCCL EP needs NCCL 2.30.4 or later, this process has {'.'.join(map(str, found))}: pip install -U nvidia-nccl-cu13"
        )
    try:
        library = _library()
    except Exception as error:
        return f"transformer-engine does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    if not hasattr(library, "ep_initialize"):
        return f"transformer-engine {version} was built without NCCL EP"
    return None


# --- the one configuration -------------------------------------------------------------------------------------------

_configured: tuple[str, int, int, int] | None = None  #: group, experts, capacity, H


def _configure(call: Call, hidden: int) -> Any:
    global _configured
    library, wanted = _library(), (call.group.group_name, call.num_experts, call.capacity, hidden)
    if _configured != wanted:
        if _configured is not None:
            raise MoefxError(
                f"NCCL EP is configured for (group, experts, capacity, hidden) = {_configured} in this process, which can have "
                f"one configuration, and a layer needs {wanted}: use another backend for this model"
            )
        dist.barrier(group=call.group)  # makes NCCL's communicator, which is borrowed
        communicator = call.group._get_backend(torch.device("cuda"))._comm_ptr()  # type: ignore[attr-defined]
        library.ep_initialize(
            communicator, call.group.group_name, call.num_experts, call.capacity, _rows(call), hidden, 0, torch.bfloat16, False
        )
        _configured = wanted
    return library


def _rows(call: Call) -> int:
    """Rows of a rank in the worst case, for any K."""
    return call.ep * call.capacity * call.local


def release(group: str | None = None) -> None:
    """Gives NCCL's communicator back; collective over the group."""
    global _configured
    if _configured is not None and group in (None, _configured[0]):
        torch.cuda.synchronize()
        _library().ep_finalize()
        _configured = None


# --- the transport ---------------------------------------------------------------------------------------------------


def _done() -> None:
    """Nothing to wait for: the library runs on the current stream."""


class NCCLEP(SummedInReturn):
    """The transport over Transformer Engine's NCCL EP."""

    def shapes(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, size: Callable[[str], Any]) -> Shapes:
        """See :meth:`moefx.transports.Transport.shapes`."""
        (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
        rows = call.ep * call.capacity * min(top_k, call.local)
        return Shapes((rows, hidden), (rows, 1), (size("handle"),), (tokens, hidden), (tokens, top_k))

    @staticmethod
    def _at_least_one(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A rank without tokens sends a row of zeros, with weights of zero, to the first experts."""
        if x.shape[0]:
            return x.contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous()
        first = torch.arange(topk_ids.shape[1], device=topk_ids.device).unsqueeze(0)
        return x.new_zeros(1, x.shape[1]), first, topk_weights.new_zeros(1, topk_ids.shape[1]).float()

    def dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: Call, kept: Dispatched | None
    ) -> tuple[Dispatched, Wait]:
        """See :meth:`moefx.transports.Transport.dispatch`."""
        library = _configure(call, x.shape[1])
        num_tokens, top_k = topk_ids.shape
        rows = call.ep * call.capacity * min(top_k, call.local)
        x, topk_ids, topk_weights = self._at_least_one(x, topk_ids, topk_weights)
        counts = torch.empty(call.local, dtype=torch.int32, device=x.device)
        handle = torch.empty(library.ep_handle_mem_size(top_k, 0), dtype=torch.uint8, device=x.device)
        total = torch.empty(1, dtype=torch.int64, device=x.device)  # written by 2.20.2, not needed: rows have a fixed number
        library.ep_prepare(handle, topk_ids, counts, top_k, 0, total)
        received, weights = x.new_empty(rows, x.shape[1]), topk_weights.new_empty(rows)
        library.ep_dispatch(handle, topk_ids, x, topk_weights, received, weights)
        expert = torch.bucketize(torch.arange(rows, device=x.device), counts.cumsum(0), right=True)
        experts = torch.where(expert < call.local, expert, -1).int().unsqueeze(1)
        header = Header(
            "te_ep",
            call.layer,
            call.capacity,
            tokens=num_tokens,
            top_k=top_k,
            received=rows,
            permuted=rows,
            sent=num_tokens,
        )
        return Dispatched(received, experts, weights.unsqueeze(1), handle, make_header(header, call.ep)), _done

    def redispatch(self, x: Tensor, handle: Tensor, cpu_metadata: Tensor, call: Call) -> tuple[Tensor, Wait]:
        """See :meth:`moefx.transports.Transport.redispatch`."""
        x = x.contiguous() if x.shape[0] else x.new_zeros(1, x.shape[1])
        received = x.new_empty(Header.read(cpu_metadata).permuted, x.shape[1])
        _library().ep_combine_bwd(handle, x, received)
        return received, _done

    def return_rows(
        self, tokens: Tensor, weights: Tensor | None, handle: Tensor, cpu_metadata: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None, Wait]:
        """See :meth:`moefx.transports.Transport.return_rows`."""
        header = Header.read(cpu_metadata)
        rows = max(header.tokens, 1)
        returned = tokens.new_empty(rows, tokens.shape[1])
        if weights is None:
            _library().ep_combine(handle, tokens.contiguous(), returned)
            return *self.own_rows(returned, None, header.tokens), _done
        returned_weights = weights.new_empty(rows, header.top_k)
        _library().ep_dispatch_bwd(handle, tokens.contiguous(), weights.reshape(-1), returned, returned_weights)
        return *self.own_rows(returned, returned_weights, header.tokens), _done


TRANSPORT = NCCLEP()


def _refuses(node: fx.Node) -> str | None:
    problem, given = refuses_tensors(node), arguments(node)
    if problem:
        return problem.replace("DeepEP", "NCCL EP")
    if given["dispatch_dtype"]:
        return "NCCL EP sends bfloat16 here, dispatch_dtype asks for FP8"
    if not given["capacity"]:
        return "NCCL EP needs the most tokens of a rank: pass dispatch_capacity to optimize"
    if process_group(given["group"]).size() < 2:
        return "NCCL EP needs 2 ranks or more"
    return None


BACKEND = Backend(
    "te_ep",
    {dispatch_combine.dispatch: Kernel(dispatch_combine.dispatch_with("te_ep"), _refuses, "NCCL EP, no host sync")},
    available,
    opt_in=True,
)
