"""Puts captured functions to work: a module keeps its class's name and parameters, its forward calls the graph."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moefx import ops
from moefx.distributed import aux_loss, checkpoint, expert_sharding, rank_monitor
from moefx.errors import CaptureError, MoefxError
from moefx.frontend.call_signature import Call, sizes_of
from moefx.frontend.call_template import call_key, flatten
from moefx.frontend.export import CAPTURING, capture_module, foreign_hooks
from moefx.frontend.head import capture_head_call, head_call, split_logits
from moefx.frontend.lazy_logits import LazyLogits
from moefx.integrations import fsdp
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.internals import surroundings
from moefx.internals.subclass import pickling, remove, subclass
from moefx.ir.program import Function
from moefx.ops import dispatch_combine
from moefx.runtime.router_state import Routing, recomputation_is_seen
from moefx.runtime.state import Optimized, unseen

#: A module's call is captured anew for at most this many kinds of calls (with and without mask, in training or not, ...).
MAX_VARIANTS = 8


@dataclass(eq=False)
class Site:
    """The runtime of one module: finds the function for a call, reads the parameters, runs it."""

    path: str
    state: Optimized
    functions: list[Function]
    routing: Routing
    routers: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)  #: of moefx.runtime.router_state: the routes of forwards that will run again
    memo: dict[Any, Function | None] = field(default_factory=dict)
    owners: dict[int, list[tuple[dict, str]]] = field(default_factory=dict)
    watched: list[tuple[dict, dict, int, nn.Module]] | None = None
    units: list[nn.Module] = field(default_factory=list)  #: FSDP's units inside the module
    adapters: list[nn.Module] = field(default_factory=list)  #: PEFT's layers inside the module
    holders: list[nn.Module] = field(default_factory=list)  #: modules inside that have parameters themselves
    weights: list[tuple] | None = None  #: dtypes and sizes of these parameters
    numbers: list[tuple[Callable, dict, Any]] = field(default_factory=list)  #: see ``_numbers``

    def __deepcopy__(self, memo: dict) -> Site:
        return type(self)(self.path, self.state, self.functions, copy.deepcopy(self.routing, memo), self.routers)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, original: Callable) -> Any:
        if hf.is_traced():
            if _only_graphs(self.state, self.routing, module.training):
                return _untraced(self, module, args, kwargs, original)
            return original(*args, **kwargs)
        if getattr(module, "_is_replica", False):
            return original(*args, **kwargs)
        requested = hf.requested()
        if self.state.bypass or hf.is_emitting():
            return original(*args, **kwargs)
        if "attentions" in requested or not self.intact(module):
            return original(*hf.own_masks(args), **hf.own_masks(kwargs))
        switches = adapters.switches(self.adapters)
        call, tensors = call_key(args, kwargs)
        key = module.training, switches, call
        try:
            function = self.memo[key]
        except KeyError:
            function = self.memo[key] = self.find(module, args, kwargs, switches)
            if len(self.memo) > 4096:  # a new length every step, for days
                self.memo.clear()
        if function is None:
            return original(*hf.own_masks(args), **hf.own_masks(kwargs))
        if not function.routes:
            out = self.run(module, function, tensors)
        else:
            out = self.run_routed(module, function, tensors)
        covered: Call = function.call
        if "router_logits" in requested:
            for path, template in covered.routers:
                router = module.get_submodule(path)
                for hook in router._forward_hooks.values():
                    hook(router, (), template.fill(out))
        for argument, template in covered.written:
            dictionary = kwargs[argument] if isinstance(argument, str) else args[argument]
            for name, value in template.fill(out):
                dictionary[name] = value
        assert covered.outputs is not None
        return covered.outputs.fill(out)

    def run(self, module: nn.Module, function: Function, tensors: list[Tensor]) -> Any:
        with dispatch_combine.layer(self.path) if self.state.plan.ep_size > 1 else contextlib.nullcontext():
            return self._run(module, function, tensors)

    def _run(self, module: nn.Module, function: Function, tensors: list[Tensor]) -> Any:
        run = self.state.runner(function)
        if not self.units:
            return run(*self.parameters(module, function), *function.constants, *tensors)
        tensors = fsdp.enter(self.units, tensors)
        out = run(*self.parameters(module, function), *function.constants, *tensors)
        return fsdp.leave(self.units, tensors, out)

    def run_routed(self, module: nn.Module, function: Function, tensors: list[Tensor]) -> Any:
        """Runs a function with routers: tells it whom to choose where that is decided, and notes whom it chose."""
        x, dispatches = tensors[0], None
        told = self.routing.told(self, function, tensors, module.training)
        if told is None:
            out = self.run(module, function, tensors)
        else:
            given, dispatches = told
            with dispatch_combine.sharing(dispatches):
                out = self.run(module, self.state.twin(function), [*tensors, *given])
        self.routing.saw(self, function, x, module.training, out, dispatches)
        return out

    def parameters(self, module: nn.Module, function: Function) -> list[Tensor]:
        owners = self.owners.get(id(function))
        if owners is None:
            owners = self.owners[id(function)] = [self._owner(module, name) for name in function.parameters]
        found = [d[name] for d, name in owners]
        return [p.to_local() if type(p.data) is DTensor else p for p in found] if self.state.plan.ep_size > 1 else found

    @staticmethod
    def _owner(module: nn.Module, name: str) -> tuple[dict, str]:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf

    def intact(self, module: nn.Module) -> bool:
        """Is the module as it was captured: the same submodules, no hook that the graph would skip?"""
        if self.watched is None:
            self.watched = [
                (m._modules, dict(m._modules), self._hooks(m), m) for path, m in module.named_modules() if m is not module
            ] + [(module._modules, dict(module._modules), -1, module)]
            self.units, self.adapters = fsdp.units(module), adapters.layers(module)
            self.numbers = list(_numbers(module))
            self.holders = [m for m in module.modules() if m._parameters]
            self.weights = None if self.units or fsdp.is_unit(module) else self._weights(module)
        for children, before, hooks, m in self.watched:
            if children != before or (hooks >= 0 and self._hooks(m) != hooks):
                return self._still_exact(module, children, before)
        if (self.weights is not None and self.weights != self._weights(module)) or any(
            read(held) != before for read, held, before in self.numbers
        ):
            self.forget()
            return self.intact(module)
        return True

    def forget(self) -> None:
        """The module, or what graphs hold of it, has changed: calls are captured anew."""
        self.functions, self.memo, self.owners, self.watched = [], {}, {}, None

    def _weights(self, module: nn.Module) -> list[tuple] | None:
        """What graphs hold of the parameters inside: dtypes and sizes. None: FSDP gathers them, in a dtype of its own."""
        found = [p for m in self.holders for p in m._parameters.values() if p is not None]
        return None if any(type(p.data) is DTensor for p in found) else [(p.dtype, p.shape) for p in found]

    @staticmethod
    def _hooks(m: nn.Module) -> int:
        return sum(map(len, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)))

    def _still_exact(self, module: nn.Module, children: dict, before: dict) -> bool:
        """Slow path of ``intact``: Transformers' own recording hooks are served, anything else means the original forward."""
        if children != before:
            new = sorted(k for k in {*children, *before} if children.get(k) is not before.get(k))
            reason = f"its submodule {new[0]} was replaced after optimize"
        else:
            hook = foreign_hooks(module)
            if hook is None:
                self.watched = None
                return self.intact(module)
            reason = f"the forward hook {hook} was added after optimize"
        self._fell_back(module, f"{reason}: its original forward runs; moefx.restore(model) and optimize again")
        return False

    def _fell_back(self, module: nn.Module, reason: str, detail: str = "", comes_of_it: str = "") -> None:
        warn = module.training and torch.is_grad_enabled()
        self.state.report.fell_back(self.path, reason, warn, detail, comes_of_it)

    def comes_of_it(self, module: nn.Module, args: tuple) -> str:
        """What it means for the caller that a call runs the original forward."""
        return "it runs in plain PyTorch"

    def find(self, module: nn.Module, args: tuple, kwargs: dict, switches: tuple) -> Function | None:
        """The function that covers this call, captured now if none does; None: the original forward must run."""
        if (self.units or fsdp.is_unit(module)) and any(disabled and merged for disabled, _, merged, _ in switches):
            raise MoefxError(
                f"an adapter of {self.path} is merged into the weights and disabled: PEFT would take it out of what FSDP has "
                "gathered for this call alone; call unmerge_adapter() on PEFT's model"
            )
        try:
            tensors, template = flatten(args, kwargs)
            for function in self.functions:
                if function.call.covers(tensors, template, module.training, switches):
                    return function
            if tensors and sum(f.call.device == tensors[0].device for f in self.functions) >= MAX_VARIANTS:
                raise CaptureError(f"it was captured for {MAX_VARIANTS} kinds of calls already{self._what_differs()}")
            others = [f.call for f in self.functions if f.call.adapters == switches]
            # numbers that differ from those of other calls are left open first: a graph that does not read them holds for all
            opened = [template.opened(other.template) for other in others]
            templates = dict.fromkeys([*(t for t in opened if t not in (None, template)), template])
            readings = list(Call.readings(tensors, template, module.training, sizes_of(module), others))
            calls = [replace(call, template=t, adapters=switches) for t in templates for call in readings]
            with CAPTURING:
                function = self.capture_one_of(module, calls)
        except CaptureError as error:
            self._fell_back(module, str(error), error.detail, self.comes_of_it(module, args))
            return None
        self.functions.append(function)
        return function

    def _what_differs(self) -> str:
        """The arguments whose numbers differ in most of the calls that the module was captured for: it reads them."""
        found: dict[str, set[float]] = {}
        for function in self.functions:
            for name, number in function.call.template.numbers().items():
                found.setdefault(name, set()).add(number)
        names = [name for name, numbers in found.items() if len(numbers) > MAX_VARIANTS // 2]
        return f", and computes with {', '.join(names)}, which differs each time" if names else ""

    def capture_one_of(self, module: nn.Module, calls: list[Call]) -> Function:
        """The function of the first reading of a call that can be captured; raises CaptureError, the first's, if none can."""
        first: CaptureError | None = None
        for call in calls:
            try:
                return self.capture(module, call)
            except CaptureError as error:
                first = first or error
        assert first is not None
        raise first

    def capture(self, module: nn.Module, call: Call) -> Function:
        key = (hf.structure(module), call)
        if key not in self.state.shared:
            routers = {p: module.get_submodule(p) for p in self.routers}
            try:
                with surroundings.none_of_them(), torch.enable_grad(), unseen():
                    function = self._export(module, call, routers)
                    self.state.lower(function)
                self.state.shared[key] = function
            except CaptureError as error:
                # an error would keep its frames, with the tensors of this step
                self.state.shared[key] = str(error), error.detail
        found = self.state.shared[key]
        if isinstance(found, tuple):
            raise CaptureError(*found)
        found.instances.append(self.path)
        return found

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        return capture_module(module, call, routers, type(module).__name__)


@dataclass(eq=False)
class HeadSite(Site):
    """The runtime of lm_head + loss; ``module`` is lm_head."""

    model_loss: Callable | None = None

    def __deepcopy__(self, memo: dict) -> HeadSite:
        return type(self)(self.path, self.state, self.functions, copy.deepcopy(self.routing, memo), model_loss=self.model_loss)

    def comes_of_it(self, module: nn.Module, args: tuple) -> str:
        numbers = args[0].numel() // args[0].shape[-1] * module.out_features
        return f"it runs in plain PyTorch, which stores all logits: {4 * numbers / 2**30:.2g} GiB in fp32"

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        assert isinstance(module, nn.Linear) and self.model_loss is not None
        return capture_head_call(self.model_loss, module, self.path, call)


class FusedLoss:
    """The model's loss function: reads hidden states where the logits were not read by anybody, else the logits."""

    def __init__(self, site: HeadSite, loss: Callable):
        self.site, self.loss = site, loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits, rest, named = split_logits(args, kwargs)
        if not isinstance(logits, LazyLogits):
            return self.loss(*args, **kwargs)
        lm_head: Any = logits.project

        def original(*_: Any, **__: Any) -> Any:
            return self.loss(logits.materialize(), *rest, **named)

        if logits.logits is not None:
            return original()
        try:
            tensors, template = head_call(logits.hidden, rest, named, logits.steps)
        except CaptureError as error:
            comes_of_it = self.site.comes_of_it(lm_head.module, (logits.hidden,))
            self.site._fell_back(lm_head.module, str(error), comes_of_it=comes_of_it)
            return original()
        args, kwargs = template.fill(tensors)
        return self.site(lm_head.module, args, kwargs, original)


class _Projection:
    """lm_head's own forward, and the module whose parameters the fused loss reads."""

    def __init__(self, module: nn.Module, forward: Callable):
        self.module, self.forward = module, forward

    def __call__(self, hidden: Tensor) -> Tensor:
        if isinstance(self.module.weight, DTensor) and not isinstance(hidden, DTensor):
            raise MoefxError(
                "the logits are read when lm_head's weight is spread over the ranks again: read them before loss.backward()"
            )
        return self.forward(hidden)


def _numbers(module: nn.Module) -> Iterator[tuple[Callable, dict, Any]]:
    """What graphs hold of the modules' own attributes: readers that are quick, what they read, and what it is now."""
    for m in module.modules():
        names = hf.numbers(m)
        if names and (not type(m).__module__.startswith("torch.nn") or isinstance(m, nn.modules.dropout._DropoutNd)):
            read = operator.itemgetter(*names)
            yield read, vars(m), read(vars(m))


# --- under another tool's trace --------------------------------------------------------------------------------------


def _compute_more(state: Optimized, routing: Routing, training: bool) -> bool:
    """Do the graphs compute what the original forward does not?"""
    plan = state.plan
    always = plan.ep_size > 1 or plan.balanced_routing or plan.check_numerics
    asked = routing.recorded is not None or routing.replayed is not None
    return always or asked or (training and (plan.router_z_loss > 0 or state.global_aux_loss))


def _only_graphs(state: Optimized, routing: Routing, training: bool) -> bool:
    """Do the graphs do what the original forward does not? Then nobody may trace that instead."""
    return _compute_more(state, routing, training) or (training and routing.counting)


@torch.compiler.disable(
    reason="an optimized model with ep_size above 1, router_z_loss, balanced_routing, check_numerics, or whose routes are "
    "recorded, replayed or counted, runs moefx's graphs, which are compiled already: call it without torch.compile, or without "
    "fullgraph"
)
def _untraced(run: Callable, *args: Any) -> Any:
    """Dynamo breaks its graph here; torch.export and torch.jit.trace, which cannot, get an error."""
    if hf.is_traced():
        raise MoefxError(
            "torch.export and torch.jit.trace see the model's own forward, which knows nothing of ep_size above 1, "
            "router_z_loss, balanced_routing, check_numerics, or of routes that are recorded, replayed or counted: "
            "moefx.restore(model) first"
        )
    return run(*args)


@torch._dynamo.assume_constant_result
def _say_what_is_compiled() -> None:
    """Runs while Dynamo traces, once for each graph that it makes."""
    warnings.warn(
        "torch.compile sees an optimized model: it compiles the model's own forward, not moefx's graphs, which are compiled "
        "already and faster; call the model without torch.compile",
        stacklevel=2,
    )


# --- classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def _class(base: type, make: Callable[[type], Callable]) -> type:
    """A subclass of ``base`` with another forward."""
    members: dict[str, Any] = {"forward": functools.wraps(base.forward)(make(base))}  # type: ignore[attr-defined]
    if make is _model_forward:
        members["save_pretrained"] = functools.wraps(base.save_pretrained)(_save_pretrained(base))  # type: ignore[attr-defined]
        members["__reduce_ex__"] = pickling(uninstall)
    return subclass(base, **members)


def _save_pretrained(base: type) -> Callable:
    plain = base.save_pretrained  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        if state_dict is not None or not fsdp.is_sharded(self) or kwargs.get("distributed_checkpoint"):
            return plain(self, save_directory, is_main_process, state_dict, **kwargs)
        unknown = set(kwargs) - {"max_shard_size", "save_original_format"}
        if unknown:
            raise MoefxError(
                f"save_pretrained of a model that is spread over ranks does not take {sorted(unknown)[0]}: save without, then "
                "load the folder in one process"
            )
        return checkpoint.save_pretrained(self, save_directory, **kwargs)

    return save_pretrained


def _block_forward(base: type) -> Callable:
    # GradientCheckpointingLayer.__init_subclass__ wraps this forward too: checkpointing works as before
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, *args, **kwargs):
        return self._moefx_site(self, args, kwargs, functools.partial(plain, self))

    return forward


def _lm_head_forward(base: type) -> Callable:
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, hidden):
        if not self._moefx_active or hf.is_emitting() or hf.is_traced() or fsdp.frees_weights(self):
            return plain(self, hidden)
        return LazyLogits(hidden, _Projection(self, functools.partial(plain, self)), self.out_features, hidden.dtype)

    return forward


def _aux_loss(model: Any, state: Optimized, mean_of_ranks: bool, everywhere: bool) -> contextlib.AbstractContextManager:
    """Who computes the auxiliary loss of this forward: all ranks together, a backend's kernel, or the model as it is."""
    if everywhere:
        return aux_loss.over_all_ranks(model, mean_of_ranks)
    found = next((b.kernel(ops.load_balancing_loss) for b in state.plan.backends if b.kernel(ops.load_balancing_loss)), None)
    if state.bypass or found is None or found.fn is ops.load_balancing_loss:
        return contextlib.nullcontext()  # nobody has more than the operation's own body: the model's function is as good
    return aux_loss.by_kernel(model, found.fn)


def _part_forward(base: type) -> Callable:
    """Of a model within the model: whoever calls it by itself gets graphs for the same masks."""
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, *args, **kwargs):
        if hf.is_traced():
            return plain(self, *args, **kwargs)
        with self._moefx_state.masks():
            return plain(self, *args, **kwargs)

    return forward


def _model_forward(base: type) -> Callable:
    plain = base.forward  # type: ignore[attr-defined]

    def forward(self, *args, **kwargs):
        state: Optimized = self._moefx
        if hf.is_traced():
            if _only_graphs(state, self._moefx_routing, self.training):
                return _untraced(untraced, self, args, kwargs)
            if self.training:
                _say_what_is_compiled()
            return plain(self, *args, **kwargs)
        if getattr(self, "_is_replica", False):
            _refuse_replica(state, self._moefx_routing, self.training)
            return plain(self, *args, **kwargs)
        return untraced(self, args, kwargs)

    def untraced(self, args, kwargs):
        state: Optimized = self._moefx
        self._moefx_routing.start()
        if state.shards_experts and state.plan.mesh is not None and torch.is_grad_enabled():
            expert_sharding.average_over_replicas(self, expert_sharding.replicas_of(state.plan.mesh))
        mean = kwargs.get("num_items_in_batch") is None
        everywhere = state.global_aux_loss and self.training and not state.bypass

        def total(x: Tensor) -> Tensor:
            return aux_loss.SumOverRanks.apply(x, aux_loss.gradient_scale(mean))  # type: ignore[no-untyped-call]

        with rank_monitor.named(), state.masks(), _aux_loss(self, state, mean, everywhere):
            out = run(self, args, kwargs)
            return self._moefx_routing.finish(state, out, kwargs.get("attention_mask"), total if everywhere else lambda x: x)

    def run(self, args, kwargs):
        state: Optimized = self._moefx
        if not state.bypass:
            kwargs = hf.count_as_tensor(args, kwargs)
        training = kwargs.get("labels") is not None or (self.training and torch.is_grad_enabled())
        ignores_packing = False
        if training and not state.bypass and kwargs.get("use_cache") is None:
            positions = len(args) > 1 or kwargs.get("position_ids") is not None
            beside_cache, packs = positions and _fills_a_cache(self), state.program.packs_beside_cache
            if not beside_cache or packs is not None:  # else it runs as it is, with its cache, and the report says so
                kwargs["use_cache"] = False  # a training step fills no cache that anybody reads
                ignores_packing = beside_cache and not packs
            if ignores_packing:
                state.report.ignored_packing(kwargs.get("position_ids"))
        fused = isinstance(vars(self).get("_loss_function"), FusedLoss) and not state.bypass
        unasked = not state.bypass and all(kwargs.get(k) is None for k in ("use_cache", "past_key_values", "cache"))
        lm_head = self.get_output_embeddings()
        if fused and not hasattr(lm_head, "_moefx_active"):
            _take_head(lm_head, self._loss_function.site)
        numbered = len(args) <= 1 and kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None
        with hf.unpacked() if (numbered and training) or ignores_packing else contextlib.nullcontext():
            if not fused or kwargs.get("labels") is None or not hasattr(lm_head, "_moefx_active"):
                out = plain(self, *args, **kwargs)
                if unasked and any(getattr(out, k, None) is not None for k in ("past_key_values", "cache")):
                    state.report.filled_a_cache()
                return out
            lm_head._moefx_active = True
            try:
                return plain(self, *args, **kwargs)
            finally:
                lm_head._moefx_active = False

    return forward


def _refuse_replica(state: Optimized, routing: Routing, training: bool) -> None:
    """nn.DataParallel runs copies of the model, whose parameters are none, in threads that share all else. What is computed
    must not differ for that; routes are only counted without theirs.
    """
    if _compute_more(state, routing, training):
        raise MoefxError(
            "nn.DataParallel runs copies of the model that know nothing of ep_size above 1, router_z_loss, balanced_routing, "
            "check_numerics, or of routes that are recorded or replayed: start one process per GPU with torchrun"
        )
    state.report.runs_replicas()


def _fills_a_cache(model: Any) -> bool:
    """Would the model as it was fill a cache in this call, which does not say? Most then do not look for packed sequences."""
    recomputes = model.training and torch.is_grad_enabled() and hf.is_checkpointed(model)
    return bool(getattr(model.config.get_text_config(), "use_cache", False)) and not recomputes


def _take_head(lm_head: Any, site: HeadSite) -> None:
    """Makes ``lm_head`` give lazy logits; of a head that came after optimize, the loss is captured anew."""
    if not isinstance(lm_head, nn.Linear):
        what = f"lm_head is a {type(lm_head).__name__}, put there after optimize, and not linear: its logits are stored"
        site.state.report.fell_back(site.path, what, warn=torch.is_grad_enabled())
        return
    lm_head.__dict__["_moefx_active"] = False
    lm_head.__class__ = _class(type(lm_head), _lm_head_forward)  # type: ignore[arg-type]
    site.forget()


def _after_forward(model: Any, args: Any, out: Any) -> None:
    """After FSDP's own hook. Without gradients no backward will free what the forward gathered."""
    if torch.is_grad_enabled():
        return
    for logits in out if isinstance(out, tuple) else (getattr(out, "logits", None),):
        if isinstance(logits, LazyLogits):
            logits.materialize()  # lm_head's weight is about to go
    fsdp.reshard(model)


def install(model: Any, state: Optimized) -> None:
    """Makes every instance of every function run it. Nothing else of the model changes: same names, same parameters."""
    recomputation_is_seen()
    hf.use(model, not state.program.own_attention)
    routers, routing = hf.routers(model), Routing()
    by_path: dict[str, list[Function]] = {}
    for function in state.program:
        for path in function.instances:
            by_path.setdefault(path, []).append(function)
    for path, functions in by_path.items():
        module = model.get_submodule(path)
        if functions[0].name == "head":
            continue
        inner = [p.removeprefix(f"{path}.") for p in routers if p.startswith(f"{path}.")]
        module.__dict__["_moefx_site"] = Site(path, state, list(functions), routing, inner)
        module.__class__ = _class(type(module), _block_forward)  # type: ignore[arg-type]
    head = state.program.functions.get("head")
    if head is not None:
        loss = model.loss_function
        state.loss = vars(model).get("_loss_function")
        lm_head = model.get_submodule(head.instances[0])
        site = HeadSite(head.instances[0], state, [], routing, model_loss=loss)
        _take_head(lm_head, site)
        site.functions = [head]
        model.loss_function = FusedLoss(site, loss)
    for path, functions in by_path.items():
        if functions[0].name != "head":
            module = model.get_submodule(path)
            module._moefx_site.intact(module)  # from here on, what is replaced inside is noticed
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model and not hasattr(type(part), "_moefx_base"):
            part.__dict__["_moefx_state"] = state
            part.__class__ = _class(type(part), _part_forward)  # type: ignore[arg-type]
    model.__dict__["_moefx"], model.__dict__["_moefx_routing"] = state, routing
    if fsdp.is_unit(model):
        state.hooks.append(model.register_forward_hook(_after_forward))
    model.__class__ = _class(type(model), _model_forward)  # type: ignore[arg-type]


def uninstall(model: Any) -> None:
    """The model as it was before ``install``."""
    state: Optimized = model._moefx
    remove(model)
    for hook in state.hooks:
        hook.remove()
    if isinstance(vars(model).get("_loss_function"), FusedLoss):
        if state.loss is None:
            del model._loss_function
        else:
            model.loss_function = state.loss
    hf.restore(model, state.implementations)
