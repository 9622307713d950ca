"""The public functions: ``optimize``, ``parallelize``, ``restore``, ``report`` and ``explain``.

``optimize`` checks its arguments, captures and rewrites before it changes the model: an error leaves the model as it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from moefx import backends as backends_
from moefx import passes, transports
from moefx.analysis.explanation import Explanation, explanation
from moefx.analysis.report import Report
from moefx.distributed import dtensor_ops, expert_sharding, rank_monitor, state_dict
from moefx.distributed import parallelize as parallelize_
from moefx.distributed.layout import make_layout
from moefx.errors import MoefxError
from moefx.frontend.capture import capture
from moefx.frontend.export import CAPTURING
from moefx.frontend.record import default_example
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap
from moefx.internals import ambient_modes
from moefx.ir.graph import value
from moefx.ir.plan import Plan
from moefx.ir.program import Function, Program
from moefx.options import Options
from moefx.rewriting.pipeline import Pipeline
from moefx.runtime.install import install, uninstall
from moefx.runtime.router_tools import warn_balanced
from moefx.runtime.state import Optimized, state_of
from moefx.runtime.verify import verify as verify_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moefx.backends import Backend

Model = TypeVar("Model")


def _reads_positions(function: Function) -> bool:
    """Whether the function reads the rotary tables it is called with; layers without positions get them too."""
    tables = [i for i, name in function.call.template.names().items() if re.fullmatch(r"position_embeddings( \d+)?", name)]
    places = {n.name: n for n in function.graph.nodes if n.op == "placeholder"}
    return any(isinstance(value(u), Tensor) for i in tables for u in places[function.inputs[i]].users)


@ambient_modes.disabled()
def rewrite(program: Program, plan: Plan, pipeline: Pipeline, model: Any = None) -> Report:
    """Runs ``pipeline`` over a captured program and returns the report. The program's graphs are changed in place."""
    for function in program:
        experts = function.expects.get("experts", 0)
        if experts:
            function.expects.setdefault("route", experts)
        if function.expects.get("attention") and _reads_positions(function):
            function.expects.setdefault("rotary", function.expects["attention"])
    report = Report(program, plan, pipeline.run(program, plan))
    if model is not None:
        report.expected["experts"] = list(hf.experts_modules(model))
    return report


def _without_z_loss(report: Report, model: Any) -> list[str]:
    """Warnings about routers without logits, which a z-loss leaves out. Raises MoefxError if there is no other."""
    if not report.plan.router_z_loss:
        return []
    routes = {r.path(path): r for f in report.program for r in f.routes for path in f.instances}
    without = [path for path, r in routes.items() if r.logits is None]
    if len(without) == len(routes):
        raise MoefxError(
            f"router_z_loss={report.plan.router_z_loss}, but no router of {type(model).__name__} was captured, so there are no "
            "logits to take it from: leave it out, or add it to the loss yourself"
        )
    some = f"router_z_loss: without the logits of {len(without)} of {len(routes)} routers"
    return [f"{some}, of {without[0]} first"] if without else []


def optimize(
    model: Model,
    *,
    ep_size: int = 1,
    mesh: DeviceMesh | None = None,
    example: Mapping[str, Any] | None = None,
    pipeline: Pipeline | None = None,
    backends: Sequence[str | Backend] | None = None,
    compile: bool | str = True,
    strict: bool = False,
    verify: bool = False,
    router_z_loss: float = 0.0,
    balanced_routing: bool = False,
    check_numerics: bool = False,
    dispatch_capacity: int = 0,
    tune: bool | tuple[int, int] = False,
    dispatch_dtype: str | None = None,
) -> Model:
    """Rewrites a Transformers mixture-of-experts model in place for training, and returns it.

    Each distinct block is captured as a graph, rewritten by the passes of ``pipeline`` and compiled. Parameter names,
    ``save_pretrained`` and ``generate`` stay as they are. The model's class becomes a subclass of its own, under the same name;
    a pickled model has the original class.

    Args:
        model: a ``PreTrainedModel`` with experts (a language model, with images or without, a reward model, a classifier or a
            bare model), or a PEFT model around one, on one device (or on meta), before DDP, FSDP or torch.compile.
        ep_size: number of ranks that the experts are sharded across. Their parameters become DTensors, so create the
            optimizer afterwards. Under NCCL a model on the CPU is moved to this rank's GPU: the current one, else LOCAL_RANK's.
        mesh: a DeviceMesh with a dimension "ep" and optionally "dp_replicate", instead of ``ep_size``.
        example: keyword arguments of the model's forward that show what kinds of inputs it gets (default: input_ids, labels).
        pipeline: the passes to run (default: ``moefx.passes.default()``).
        backends: names or ``Backend`` objects in order of preference (default: all that are not opt-in, see
            :func:`moefx.resolve`).
        compile: compile each function with torch.compile: True for Inductor, a string for another compiler backend.
        strict: raise, instead of warning, if an expected operation was not matched.
        verify: compare the loss and all gradients with the original model on ``example``, and raise if they differ.
        router_z_loss: coefficient of ``sum over layers of mean(logsumexp(router logits)^2)``, added to the loss (arXiv
            2202.08906). The mean is over tokens that are not padding, under ``parallelize`` over those of all ranks.
        balanced_routing: assign tokens to experts in turn, whatever the router computes. For benchmarks only: routers learn
            nothing.
        check_numerics: raise MoefxError, naming step and layer, if routing logits are NaN or infinite. Costs one device sync
            per forward.
        dispatch_capacity: under expert parallelism, the most tokens that a rank ever has in one call. Buffers then have the
            worst-case size (``ep_size * dispatch_capacity`` tokens per rank, all of which may choose its experts), and no
            exchange needs a device sync. 0: one device sync per layer, and buffers of the actual size.
        tune: give an expensive operation to the fastest of the backends that accept it, instead of the first. The size of a
            rank's micro-batch, (sequences, tokens per sequence); True: (1, 4096). Measurements are cached
            (:mod:`moefx.backends.tuning`).
        dispatch_dtype: "fp8": under expert parallelism, tokens are dispatched as e4m3 with a float32 scale per 128 numbers,
            half of the bytes. Numerics change: each number that an expert reads is within 2**-4 of itself. Gradients, and
            what experts send back, keep the model's dtype.

    Returns:
        The same object.

    Raises:
        MoefxError: an argument is wrong; the model is unchanged.
        PassError: a pass broke a graph, or with ``strict`` an expected operation is missing; the model is unchanged.
        VerifyError: ``verify`` found a difference; the model is restored.
    """
    done: Model = _optimize(
        model,
        Options(
            ep_size=ep_size,
            mesh=mesh,
            example=example,
            pipeline=pipeline,
            backends=backends,
            compile=compile,
            strict=strict,
            verify=verify,
            router_z_loss=router_z_loss,
            balanced_routing=balanced_routing,
            check_numerics=check_numerics,
            dispatch_capacity=dispatch_capacity,
            tune=tune,
            dispatch_dtype=dispatch_dtype,
        ),
    )
    return done


def _optimize(model: Any, options: Options) -> Any:
    given, model = model, adapters.unwrap_peft(model)
    hf.check(model)
    if getattr(model, "_moefx", None) is not None:
        raise MoefxError(f"{type(model).__name__} is already optimized: call moefx.restore(model) before optimizing it again")
    pipeline = passes.default() if options.pipeline is None else options.pipeline
    if not isinstance(pipeline, Pipeline):
        raise MoefxError(f"pipeline is a {type(pipeline).__name__}: pass moefx.passes.default() or a moefx.Pipeline of passes")
    order = backends_.resolve(options.backends)
    ep_size, mesh = expert_sharding.make_mesh(model, options.ep_size, options.mesh)
    plan = expert_sharding.plan(model, options, order, ep_size, mesh)
    if mesh is not None:
        expert_sharding.move_to_mesh(model, mesh)
    started = time.perf_counter()
    with CAPTURING:
        program = capture(model, options.example)
        captured = time.perf_counter()
        report = rewrite(program, plan, pipeline, model)
    report.seconds = {"capture": captured - started, "passes": time.perf_counter() - captured}
    shortfall = report.shortfall() + _without_z_loss(report, model)
    if shortfall:
        report.warn_or_raise(shortfall, options.strict)
    state = Optimized(program, plan, pipeline, report, hf.original_implementations(model))
    state.shards_experts = ep_size > 1 and expert_sharding.experts_mesh(model) is None
    if state.shards_experts:
        expert_sharding.shard_experts(model, plan)
    with ambient_modes.disabled():
        install(model, state)
    spread = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if spread is not None:
        dtensor_ops.install(spread.device_mesh)
        state.hooks += state_dict.take_whole_tensors(model)
    if options.balanced_routing:
        warn_balanced(model)
    if options.verify:
        _verify_or_restore(model, options.example)
    if given is not model:
        expert_sharding.tell_ddp(given)
        adapters.wrap(given)
    return given


def _verify_or_restore(model: Any, example: Mapping[str, Any] | None) -> None:
    try:
        verify_(model, {**(example or default_example(model, 2, 16)), "use_cache": False}).raise_if_wrong()
    except Exception:
        restore(model)
        raise


def parallelize(
    model: Any,
    *,
    ep_size: int = 1,
    dp_replicate: int = 1,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int = True,
    offload_policy: OffloadPolicy | None = None,
    dtype: torch.dtype | None = None,
    global_aux_loss: bool = True,
    lost_after: float = 60.0,
    **options: Any,
) -> Any:
    """Shards a model across all ranks (FSDP2, HSDP, expert parallelism), optimizes it and returns it.

    Call it on every rank, after ``torch.distributed.init_process_group``. Under NCCL a rank trains on the current CUDA device
    if one was chosen, else on LOCAL_RANK's. Every decoder block is an FSDP2 unit; its experts are another unit, on the ranks
    that hold the same experts. Embeddings, final norm and lm_head belong to the root. If ``ep_size`` is the number of ranks,
    experts are in no unit, and neighbouring blocks share one. Each rank has its own batches; gradients are the mean over all
    ranks.

    One script serves one process and many: in one process, with or without a process group, the model is moved to the GPU (if
    there is one) and optimized, nothing is sharded, and those methods of FSDP2 that a training loop calls
    (``set_requires_gradient_sync``, ``set_modules_to_forward_prefetch``, ...) have no effect.

    Args:
        model: a checkpoint folder in Hugging Face layout, from which each rank reads its own shards; a model, with or without
            PEFT, the same on every rank; or a model on the meta device, which gets random weights.
        ep_size: number of ranks that share one copy of the experts; divides the number of experts and the ranks of a replica.
        dp_replicate: number of replicas of the whole model (HSDP): gradients are reduced within a replica, then across them.
        mp_policy: as in ``torch.distributed.fsdp.fully_shard``.
        reshard_after_forward: as in ``fully_shard``.
        offload_policy: as in ``fully_shard``.
        dtype: dtype of the parameters, if ``model`` is a folder (default: the configuration's).
        global_aux_loss: with ``output_router_logits``, compute the auxiliary load-balancing loss over all ranks' tokens, as
            one process would (one small all-reduce); otherwise over each rank's own.
        lost_after: seconds without a heartbeat after which a rank counts as lost, and the others name it and exit
            (:func:`moefx.watch_ranks`). 0: ranks are not monitored.
        options: options of :func:`moefx.optimize` (``compile``, ``pipeline``, ``backends``, ``strict``, ``example``, ...).

    Returns:
        The sharded model, in training mode.

    Raises:
        MoefxError: sizes that do not divide; no process group, where more than one rank is needed; a checkpoint with a missing,
            an unexpected or a differently shaped tensor.
    """
    for name in ("mesh", "verify"):
        if name in options:
            raise MoefxError(f"parallelize does not take {name}: it makes its own meshes; call moefx.verify on a small model")
    chosen = Options(**options)
    layout = make_layout(ep_size, dp_replicate, mp_policy, reshard_after_forward, offload_policy, model)
    several = layout.world_size > 1
    if lost_after and several:
        rank_monitor.watch(lost_after)
    sharded = parallelize_.shard(model, layout, dtype)
    _optimize(sharded.train(), chosen)
    adapters.unwrap_peft(sharded)._moefx.global_aux_loss = global_aux_loss and several
    return sharded


def restore(model: Model) -> Model:
    """Restores the original forward, gathers the experts' parameters on every rank, and returns the same object."""
    state = state_of(model)
    inner = unwrap(model)
    if state.shards_experts:
        expert_sharding.gather_experts(inner)
    if state.plan.ep_group:
        transports.release(state.plan.ep_group)
    uninstall(inner)
    adapters.unwrap_classes(model)
    return model


def report(model: Any) -> Report:
    """The report of an optimized model: what ``optimize`` did to it, and what has happened since."""
    return state_of(model).report


def explain(model: Any, path: str) -> Explanation:
    """Explains the nodes of the module ``path``: source lines, passes, kernels and why; and what was not rewritten, and why."""
    state_of(model)
    inner = unwrap(model)
    if path not in dict(inner.named_modules()):
        raise MoefxError(f"{type(inner).__name__} has no module {path!r}: see model.named_modules()")
    return explanation(state_of(model).report, path)
