"""A training step as one CUDA graph: forward, loss and backward are recorded once, then replayed by one call.

Small micro-batches are launch-bound: the host starts kernels more slowly than the device runs them. A replay costs the host
next to nothing, whatever is in it: FSDP2's hooks and collectives, DeepEP's kernels. It is PyTorch's whole-network capture
("CUDA semantics", CUDA Graphs) around a model.

Gradients are allocated once, in the graph's memory pool, and each replay overwrites them. Optimizers, ``zero_grad`` and
clipping see ordinary ``.grad``; a gradient that exists when a step begins is copied and added, as autograd would do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moefx.errors import MoefxError
from moefx.frontend.reads import Reads
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap
from moefx.kernels import attention
from moefx.runtime import guards
from moefx.runtime.guards import StepGuard
from moefx.runtime.state import state_of

#: Steps that run eagerly before one is recorded: they compile, load kernels and allocate buffers that later steps reuse.
WARMUP = 3


@dataclass(eq=False)
class Recorded:
    """A recorded step: the CUDA graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[nn.Parameter, Tensor]
    places: list[int]  #: addresses of the parameters
    guards: list[StepGuard] = field(default_factory=list)  #: of the Python state of the model

    def replay(self, batch: Mapping[str, Any], check: Callable[[], None]) -> Tensor:
        """The loss of ``batch`` []; adds its gradients to ``.grad``.

        ``check`` is called while the device computes them: where it raises, they are left out.
        """
        for name, t in self.inputs.items():
            t.copy_(batch[name], non_blocking=True)
        before = {p: _moved(p.grad, self.gradients[p]) for p in self.gradients if p.grad is not None}
        self.graph.replay()
        try:
            check()
        except BaseException:
            for p, gradient in before.items():
                p.grad = gradient
            raise
        for p, gradient in self.gradients.items():
            p.grad = gradient
        if before:
            torch._foreach_add_([_local(t) for t in before.values()], [_local(self.gradients[p]) for p in before])  # type: ignore[arg-type]
            for p, gradient in before.items():
                p.grad = gradient
        return self.loss.clone()


class GraphedStep:
    """``loss = step(**batch)`` does what ``loss = model(**batch).loss; loss.backward()`` does. See :func:`cuda_graph`."""

    def __init__(self, model: Any, warmup: int, most: int, forward_backward: Callable[..., Tensor] | None = None):
        self.model, self.warmup, self.most = model, warmup, most
        self._forward_backward = forward_backward or self._plain
        self.replays = self.eager = 0  #: numbers of steps that were replayed, and that ran eagerly
        self.recorded: dict[tuple, Recorded] = {}
        self._seen: dict[tuple, int] = {}
        fsdp.reshard(model)  # an FSDP root shows other parameters after a forward without a backward
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # looking through all modules takes the host 5 ms a step for 48 layers with adapters; a module that is replaced later
        # is an error of its own
        self._checkpointable = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        # one stream for all steps: autograd waits for the streams that used a parameter before, which a recording must not
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, **batch: Any) -> Tensor:
        """The loss [], detached; gradients are in the parameters' ``.grad``."""
        # contiguous as the recorded inputs: for other strides compiled code would recompile, which it cannot while recorded
        batch = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in hf.count_as_tensor((), batch).items()}
        kind = self._kind(batch)
        found = self.recorded.get(kind)
        if found is None:
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            if seen <= self.warmup or len(self.recorded) >= self.most:
                self.eager += 1
                return self._step(batch)
            found = self.recorded[kind] = self._record(batch)
        self._check_memory(found)
        loss = found.replay(batch, lambda: self._check_state(found))
        self.replays += 1
        return loss

    def close(self) -> None:
        """Frees the graphs and their memory.

        With several ranks, call it before ``destroy_process_group``, which hung for two ranks with a live graph over NCCL.
        """
        for found in self.recorded.values():
            found.graph.reset()
        self.recorded.clear()

    def _kind(self, batch: Mapping[str, Any]) -> tuple:
        """What a recorded step depends on, besides the values of its tensors."""
        parts = [(n, (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v) for n, v in sorted(batch.items())]
        inner = unwrap(self.model)
        state = inner._moefx_router_state
        asked = state.tracks_load, state.recorded_routes is None, state.replayed_routes is None
        checkpointed = any(m.gradient_checkpointing for m in self._checkpointable)
        return *parts, inner.training, *asked, checkpointed, *(p.requires_grad for p in self._parameters)

    def _check_memory(self, found: Recorded) -> None:
        if found.places != [_local(p).data_ptr() for p in self._parameters]:
            raise MoefxError(
                "parameters were moved in memory after the step was recorded, which would read the old ones: make a new step "
                "with moefx.cuda_graph(model)"
            )

    def _check_state(self, found: Recorded) -> None:
        changed = next((difference for guard in found.guards if (difference := guard.difference())), None)
        if changed:
            raise MoefxError(
                f"{type(unwrap(self.model)).__name__} is not as it was when the step was recorded ({changed}), and a replay "
                "would not see it: change it back, or make a new step with moefx.cuda_graph(model)"
            )
        if not fsdp.reduces_gradients(self.model):
            raise MoefxError(
                "set_requires_gradient_sync(False) is on, and a recorded step reduces gradients each time: leave it out, "
                "gradients of several steps are summed in .grad anyway"
            )

    def _step(self, batch: Mapping[str, Any]) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), hf.packed(), attention.recorded():
            loss = self._forward_backward(**batch)
        here.wait_stream(self._stream)
        return loss

    def _plain(self, **batch: Any) -> Tensor:
        loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def _record(self, batch: Mapping[str, Any]) -> Recorded:
        before = [p.grad for p in self._parameters]
        inputs = {n: v.clone() for n, v in batch.items() if isinstance(v, Tensor)}
        for p in self._parameters:
            p.grad = None
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # the graph's pool cannot use what earlier steps reserved
        graph, watched, reads = torch.cuda.CUDAGraph(), guards.as_inside(self.model), Reads()
        try:
            # thread_local: other threads (NCCL's, moefx's) may call CUDA meanwhile
            recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with recording, hf.packed(), attention.recorded(), reads.recorded(watched):
                loss = self._forward_backward(**{**batch, **inputs})
            gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        except Exception as error:
            if _ran_out(error):  # hidden by the error of the recording that it ended
                raise torch.OutOfMemoryError(
                    f"memory ran out while a step of {type(unwrap(self.model)).__name__} was recorded: a replayed step keeps "
                    "all that it needs at once, and with dispatch_capacity buffers for the worst case. Take fewer tokens a "
                    "step, or train without moefx.cuda_graph"
                ) from error
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MoefxError(
                f"this step of {type(unwrap(self.model)).__name__} cannot be recorded as a CUDA graph, something in it waits "
                f"for the device or makes a call that a recording forbids ({said}): start again without moefx.cuda_graph, in "
                "a new process (after a failed recording torch 2.11 draws no random numbers, and kernels were seen to fail)"
            ) from error
        finally:
            for p, gradient in zip(self._parameters, before, strict=True):
                p.grad = gradient
        reads.close(watched)
        places = [_local(p).data_ptr() for p in self._parameters]
        return Recorded(graph, inputs, loss, gradients, places, guards.of_a_step(watched, reads))


def _ran_out(error: BaseException | None) -> bool:
    """Is this an out-of-memory error, or was it caused by one?"""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _moved(gradient: Tensor, written: Tensor) -> Tensor:
    """The gradient of earlier steps, copied if it lies in the memory that the next replay writes."""
    return gradient.clone() if gradient is written else gradient


def cuda_graph(
    model: Any, *, warmup: int = WARMUP, most: int = 1, forward_backward: Callable[..., Tensor] | None = None
) -> GraphedStep:
    """Makes a training step that is recorded as a CUDA graph and replayed, for batches that are all of one kind::

        step = moefx.cuda_graph(model)
        for batch in batches:
            loss = step(**batch)  # instead of model(**batch).loss and loss.backward()
            optimizer.step(); optimizer.zero_grad()
        step.close()  # before destroy_process_group

    A kind is given by the shapes and dtypes of the batch, training or evaluation mode, and which parameters are frozen. The
    first ``warmup`` steps of a kind run eagerly, the next one is recorded. At most ``most`` kinds are recorded, others run
    eagerly (``step.replays`` and ``step.eager`` count the steps).

    A replay runs no Python: hooks of the model are not called. A hook, an attribute that a forward reads, an adapter's state or
    a submodule that is not as it was when the step was recorded is an error.
    ``num_items_in_batch`` may change from step to step, and so may ``position_ids``, which are always taken to be those of
    packed sequences: to check them, the host would have to wait.

    Memory: the peak memory of a step stays reserved, and gradients stay allocated, for each recorded kind.

    Args:
        model: optimized by :func:`moefx.optimize` or :func:`moefx.parallelize`, on a CUDA device. With ``ep_size`` > 1 it
            needs a ``dispatch_capacity``, so that the host does not wait for counts. All ranks make and call the step alike.
        warmup: steps of a kind before it is recorded; torch.compile needs some, FSDP2 two.
        most: how many kinds are recorded.
        forward_backward: replaces ``loss = model(**batch).loss; loss.backward()``: called with the batch as keyword arguments,
            it returns the loss [], detached. Its Python runs while a step is recorded, not in a replay.

    Raises:
        torch.OutOfMemoryError: while a step is recorded.
        MoefxError: the model waits for the device in each step (no ``dispatch_capacity``, ``check_numerics``), is on the CPU
            or in DDP; or, while a step is recorded, something in it cannot be recorded: then the process cannot be relied on.
    """
    state = state_of(model)
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise MoefxError(f"a CUDA graph needs a model on a CUDA device, this one is on {device}")
    if isinstance(model, DistributedDataParallel):
        raise MoefxError("DistributedDataParallel rebuilds its buckets while it runs: use moefx.parallelize instead")
    if state.plan.ep_size > 1 and not state.plan.dispatch_capacity:
        raise MoefxError(
            f"ep_size={state.plan.ep_size} without dispatch_capacity: in each layer the host waits for counts, which a CUDA "
            "graph cannot: pass the largest number of tokens of a rank as dispatch_capacity"
        )
    if state.plan.check_numerics:
        raise MoefxError("check_numerics=True waits for the device in each forward, which a CUDA graph cannot: leave it out")
    if warmup < 1 or most < 1:
        raise MoefxError(f"warmup={warmup} and most={most}: both must be 1 or more")
    return GraphedStep(model, warmup, most, forward_backward)
