"""``moefx.optimize``: check everything, capture, rewrite, and only then touch the model."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from . import adapters, dtensor_ops, exchange, hf, parallel, sharded, state_dict, surroundings, tuning
from . import backends as backends_
from .adapters import unwrap
from .capture import CAPTURING, capture
from .errors import MoefxError
from .graph import value
from .install import Optimized, install, state_of, uninstall
from .pipeline import Pipeline
from .program import Function, Program
from .report import Explanation, Report
from .report import explain as explain_report
from .routing import warn_balanced

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .backends import Backend
    from .plan import Plan

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
        mesh: instead of ``ep_size``, a DeviceMesh with a dimension "ep" (and optionally "dp_replicate"). With a dimension
            "efsdp" too it says how :func:`moefx.parallelize` spreads the whole model, dense parameters by FSDP2.
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
            tokens a sequence of a rank's micro-batch; True: (1, 4096). What was measured is kept (:mod:`moefx.tuning`).
        dispatch_dtype: "fp8": under expert parallelism, tokens are sent to their experts in e4m3 with a float32 scale for each
            128 numbers (:mod:`moefx.fp8_rows`), half of the bytes. Numerics change: each number that an expert reads is within
            2**-4 of itself. Gradients, and what the experts send back, keep the model's dtype.

    Raises:
        MoefxError: bad input, in one sentence; the model is untouched.
        PassError: a pass broke a graph, or under ``strict`` something promised is missing; the model is untouched.
        VerifyError: ``verify`` found a difference; the model is restored.
    """
    if mesh is not None and "efsdp" in (mesh.mesh_dim_names or ()):
        options = {k: v for k, v in locals().items() if k not in ("model", "mesh", "ep_size", "verify")}
        return _over_mesh(model, mesh, ep_size, verify, options)
    given, model = model, adapters.inside(model)
    hf.check(model)
    if getattr(model, "_moefx", None) is not None:
        raise MoefxError(f"{type(model).__name__} is already optimized: call moefx.restore(model) before optimizing it again")
    if pipeline is None:
        from .passes import default

        pipeline = default()
    if not isinstance(pipeline, Pipeline):
        raise MoefxError(f"pipeline is a {type(pipeline).__name__}: pass moefx.passes.default() or a moefx.Pipeline of passes")
    order = backends_.resolve(backends)
    ep_size, mesh = parallel.make_mesh(model, ep_size, mesh)  # type: ignore[arg-type]
    if not isinstance(router_z_loss, (int, float)) or not 0 <= router_z_loss < float("inf"):
        raise MoefxError(f"router_z_loss={router_z_loss!r} is not a coefficient: pass a number of 0 or more (1e-3 is usual)")
    if not isinstance(dispatch_capacity, int) or dispatch_capacity < 0:
        raise MoefxError(
            f"dispatch_capacity={dispatch_capacity!r} is not a number of tokens: pass the most that a rank has, or 0"
        )
    if dispatch_dtype not in (None, "fp8"):
        raise MoefxError(f'dispatch_dtype={dispatch_dtype!r} is not known: pass "fp8", or None for the dtype of the model')
    if dispatch_dtype and ep_size == 1:  # type: ignore[operator]
        raise MoefxError(f"dispatch_dtype={dispatch_dtype!r}, but ep_size=1: no token is sent anywhere; leave it out")
    plan = parallel.plan(model, order, ep_size, mesh, compile, strict)  # type: ignore[arg-type]
    plan = replace(
        plan, router_z_loss=float(router_z_loss), balanced_routing=balanced_routing, check_numerics=check_numerics,
        dispatch_capacity=dispatch_capacity, tune=tuning.Tune.of(tune), dispatch_dtype=dispatch_dtype or "",
    )  # fmt: skip
    if mesh is not None:
        parallel.move_to_mesh(model, mesh)  # type: ignore[arg-type]
    started = time.perf_counter()
    with CAPTURING:
        program = capture(model, example)
        captured = time.perf_counter()
        report = rewrite(program, plan, pipeline, model)
    report.seconds = {"capture": captured - started, "passes": time.perf_counter() - captured}
    shortfall = report.shortfall() + _without_z_loss(report, model)
    if shortfall:
        report.warn_or_raise(shortfall, strict)
    state = Optimized(program, plan, pipeline, report, hf.previous(model))  # type: ignore[arg-type]
    state.shards_experts = ep_size > 1 and sharded.experts_mesh(model) is None  # type: ignore[arg-type]
    if state.shards_experts:
        parallel.shard_experts(model, plan)  # type: ignore[arg-type]
    with surroundings.none_of_them():
        install(model, state)
    spread = next((p for p in model.parameters() if isinstance(p, DTensor)), None)  # type: ignore[attr-defined]
    if spread is not None:
        dtensor_ops.install(spread.device_mesh)
        state.hooks += state_dict.take_whole_tensors(model)  # type: ignore[arg-type]
    if balanced_routing:
        warn_balanced(model)
    if verify:
        _verify_or_restore(model, example)
    if given is not model:
        parallel.tell_ddp(given)  # type: ignore[arg-type]
        adapters.wrap(given)
    return given


def _over_mesh(model: Any, mesh: DeviceMesh, ep_size: int, verify: bool, options: dict[str, Any]) -> Any:
    from .parallelize import over_mesh

    if verify:
        raise MoefxError("verify=True needs whole parameters, the mesh spreads them: call moefx.verify on a small model")
    return over_mesh(model, mesh, ep_size, **options)


def _verify_or_restore(model: Any, example: Mapping[str, Any] | None) -> None:
    from .capture import default_example
    from .verify import verify

    try:
        verify(model, {**(example or default_example(model, 2, 16)), "use_cache": False}).raise_if_wrong()
    except Exception:
        restore(model)
        raise


def restore(model: Model) -> Model:
    """Back to the untouched forward, experts' parameters whole on every rank. Returns the same object."""
    state = state_of(model)
    inner = unwrap(model)
    if state.shards_experts:
        parallel.gather_experts(inner)  # type: ignore[arg-type]
    if state.plan.ep_group:
        exchange.release(state.plan.ep_group)
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
