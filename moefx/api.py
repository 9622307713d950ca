"""What people call: ``optimize`` (check, capture, rewrite, only then touch the model), ``parallelize`` over it, ``restore``."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from moefx import backends as backends_
from moefx import passes
from moefx.analysis.report import Explanation, Report
from moefx.analysis.report import explain as explain_report
from moefx.distributed import dtensor_ops, expert_sharding, rank_monitor, state_dict
from moefx.distributed import parallelize as parallelize_
from moefx.errors import MoefxError
from moefx.frontend.capture import capture
from moefx.frontend.export import CAPTURING
from moefx.frontend.record import default_example
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap
from moefx.internals import surroundings
from moefx.ir.graph import value
from moefx.ir.plan import Options, Plan
from moefx.ir.program import Function, Program
from moefx.ops import dispatch_combine
from moefx.rewriting.pipeline import Pipeline
from moefx.runtime.install import install, uninstall
from moefx.runtime.router_state import warn_balanced
from moefx.runtime.state import Optimized, state_of
from moefx.runtime.verify import verify as verify_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moefx.backends import Backend

Model = TypeVar("Model")


def _reads_positions(function: Function) -> bool:
    """Does the function read the tables that it is called with? Layers without positions get them too."""
    tables = [i for i, name in function.call.template.names().items() if re.fullmatch(r"position_embeddings( \d+)?", name)]
    places = {n.name: n for n in function.graph.nodes if n.op == "placeholder"}
    return any(isinstance(value(u), Tensor) for i in tables for u in places[function.inputs[i]].users)


@surroundings.none_of_them()
def rewrite(program: Program, plan: Plan, pipeline: Pipeline, model: Any = None) -> Report:
    """Runs ``pipeline`` over a captured program; the report of what it did. The program's graphs are changed."""
    for function in program:
        experts = function.expects.get("experts", 0)
        if experts:
            function.expects.setdefault("route", experts)
        if function.expects.get("attention") and _reads_positions(function):
            function.expects.setdefault("rotary", function.expects["attention"])
    report = Report(program, plan, pipeline.run(program, plan))
    if model is not None:
        report.promised["experts"] = list(hf.experts_modules(model))
    return report


def _without_z_loss(report: Report, model: Any) -> list[str]:
    """What a router z-loss would leave out. Raises MoefxError if that is everything."""
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
    """Makes a Transformers mixture of experts train on rewritten, compiled graphs. Returns the same object.

    Args:
        model: a ``PreTrainedModel`` with experts (a language model, with images or without, a reward model, a classifier, a
            bare model), or a PEFT model around one, on one device (or on meta), before DDP, FSDP or torch.compile.
        ep_size: over how many ranks the experts are spread. Their parameters become DTensors; build the optimizer after. Under
            NCCL a model on the CPU is moved to this rank's GPU: the current one, else that of LOCAL_RANK.
        mesh: instead of ``ep_size``, a DeviceMesh with a dimension "ep" (and optionally "dp_replicate").
        example: keyword arguments of the model's forward that show what kinds of inputs it gets (default: input_ids, labels).
        pipeline: the passes, ``moefx.passes.default()`` if None.
        backends: names or ``Backend`` objects in order of preference (default: torch, reference).
        compile: compile each function with torch.compile: True for Inductor, a string for another compiler backend.
        strict: raise, instead of warning, if something that the model promises is not raised.
        verify: compare loss and all gradients with the original model on ``example`` and raise if they differ.
        router_z_loss: adds this times ``sum over layers of mean(logsumexp(router logits)^2)`` to the loss (arXiv 2202.08906);
            the mean is over tokens that are not padding, under ``parallelize`` over those of all ranks.
        balanced_routing: send tokens to experts in turn, whatever the routers say. For benchmarks only: nothing is learnt.
        check_numerics: raise MoefxError, naming forward and layer, when routing logits are NaN or infinite. The host waits
            once a forward.
        dispatch_capacity: under expert parallelism, the most tokens that a rank ever has in one call. Exchanges then use
            buffers of the worst case (``ep_size * dispatch_capacity`` tokens a rank, all of which may choose its experts)
            and the host never waits for counts. 0: it waits once a layer, and buffers are as large as the data says.
        tune: where several backends take an operation that costs much, the fastest gets it instead of the first. Sequences and
            tokens a sequence of a rank's micro-batch; True: (1, 4096). Measurements are kept (:mod:`moefx.backends.tuning`).
        dispatch_dtype: "fp8": under expert parallelism, tokens are sent to their experts in e4m3 with a float32 scale for each
            128 numbers (:mod:`moefx.transports.fp8_rows`), half of the bytes. Numerics change: each number that an expert
            reads is within 2**-4 of itself. Gradients, and what the experts send back, keep the model's dtype.

    Raises:
        MoefxError: bad input, in one sentence; the model is untouched.
        PassError: a pass broke a graph, or under ``strict`` something promised is missing; the model is untouched.
        VerifyError: ``verify`` found a difference; the model is restored.
    """
    return _optimize(
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


def _optimize(model: Any, options: Options) -> Any:
    given, model = model, adapters.inside(model)
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
        expert_sharding.move_to_mesh(model, mesh)  # type: ignore[arg-type]
    started = time.perf_counter()
    with CAPTURING:
        program = capture(model, options.example)
        captured = time.perf_counter()
        report = rewrite(program, plan, pipeline, model)
    report.seconds = {"capture": captured - started, "passes": time.perf_counter() - captured}
    shortfall = report.shortfall() + _without_z_loss(report, model)
    if shortfall:
        report.warn_or_raise(shortfall, options.strict)
    state = Optimized(program, plan, pipeline, report, hf.previous(model))  # type: ignore[arg-type]
    state.shards_experts = ep_size > 1 and expert_sharding.experts_mesh(model) is None  # type: ignore[arg-type]
    if state.shards_experts:
        expert_sharding.shard_experts(model, plan)  # type: ignore[arg-type]
    with surroundings.none_of_them():
        install(model, state)
    spread = next((p for p in model.parameters() if isinstance(p, DTensor)), None)  # type: ignore[attr-defined]
    if spread is not None:
        dtensor_ops.install(spread.device_mesh)
        state.hooks += state_dict.take_whole_tensors(model)  # type: ignore[arg-type]
    if options.balanced_routing:
        warn_balanced(model)
    if options.verify:
        _verify_or_restore(model, options.example)
    if given is not model:
        expert_sharding.tell_ddp(given)  # type: ignore[arg-type]
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
    """Spreads a model over all ranks (FSDP2, HSDP, expert parallelism) and optimizes it. Returns the model.

    Call it on every rank, after ``torch.distributed.init_process_group``. Under NCCL a rank trains on the current CUDA device
    if one was chosen, else on that of LOCAL_RANK. Every decoder block is an FSDP2 unit, its experts are another on the ranks
    that hold the same experts; embeddings, final norm and lm_head belong to the root. Where each rank is alone with its experts
    (``ep_size`` is all ranks) these are in no unit, and neighbouring blocks share one. All ranks see their own batches;
    gradients come out as the mean over all ranks.

    Args:
        model: a checkpoint folder in Hugging Face layout, of which each rank reads only its own shards; or a model, with or
            without PEFT around it, the same on every rank; or a model on the meta device, which gets random weights.
        ep_size: ranks that share one copy of the experts; divides the number of experts and the ranks of a replica.
        dp_replicate: copies of the whole model (HSDP): gradients are reduced inside a copy, then summed over copies.
        mp_policy, reshard_after_forward, offload_policy: as in ``torch.distributed.fsdp.fully_shard``.
        dtype: of the parameters, if ``model`` is a folder (default: what its configuration says).
        global_aux_loss: with ``output_router_logits``, the auxiliary load-balancing loss is that of all ranks' tokens
            together, as one process would compute it (one small all-reduce); otherwise each rank's own.
        lost_after: seconds without a sign of life after which a rank counts as lost, the others say which and end
            (:func:`moefx.watch_ranks`); 0: nobody watches.
        options: of :func:`moefx.optimize` (``compile``, ``pipeline``, ``backends``, ``strict``, ``example``, ...).

    Raises:
        MoefxError: bad sizes; a checkpoint that lacks a tensor of the model, has one too many, or one of another shape.
    """
    for name in ("mesh", "verify"):
        if name in options:
            raise MoefxError(f"parallelize does not take {name}: it makes its own meshes; call moefx.verify on a small model")
    chosen = Options(**options)
    layout = parallelize_.layout(ep_size, dp_replicate, mp_policy, reshard_after_forward, offload_policy, model)
    if lost_after:
        rank_monitor.watch(lost_after)
    spread = parallelize_.spread(model, layout, dtype)
    _optimize(spread.train(), chosen)
    adapters.inside(spread)._moefx.global_aux_loss = global_aux_loss and dist.get_world_size() > 1
    return spread


def restore(model: Model) -> Model:
    """Back to the untouched forward, experts' parameters whole on every rank. Returns the same object."""
    state = state_of(model)
    inner = unwrap(model)
    if state.shards_experts:
        expert_sharding.gather_experts(inner)  # type: ignore[arg-type]
    if state.plan.ep_group:
        dispatch_combine.release(state.plan.ep_group)
    uninstall(inner)
    adapters.unwrap_classes(model)
    return model


def report(model: Any) -> Report:
    """What ``optimize`` did to this model, and what has happened since."""
    return state_of(model).report


def explain(model: Any, path: str) -> Explanation:
    """Each node of the module ``path``: the model's line -> passes -> kernel and why; and what was not rewritten, and why."""
    state_of(model)
    inner = unwrap(model)
    if path not in dict(inner.named_modules()):
        raise MoefxError(f"{type(inner).__name__} has no module {path!r}: see model.named_modules()")
    return explain_report(state_of(model).report, path)
