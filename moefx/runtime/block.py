"""The forward of an optimized block: finds the function that covers a call, captures one if none does, and runs it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.errors import CaptureError, MoefxError
from moefx.frontend.call_signature import Call, sizes_of
from moefx.frontend.call_template import call_key, flatten
from moefx.frontend.captured import Captured
from moefx.frontend.export import CAPTURING, capture_module
from moefx.frontend.reads import Reads
from moefx.integrations import fsdp
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.internals import ambient_modes
from moefx.ir.program import Function
from moefx.ops import exchange
from moefx.runtime.guards import Guard
from moefx.runtime.recomputation import Originals
from moefx.runtime.router_state import RouterState
from moefx.runtime.state import Optimized, unseen
from moefx.runtime.tracing import only_graphs, untraced

#: At most this many kinds of calls (with and without mask, in training or not, ...) of a module are captured.
MAX_VARIANTS = 8
#: At most this many states of a module are captured for one kind of call, and so many of them are recognized at once.
MAX_STATES = MAX_SNAPSHOTS = 8


@dataclass(eq=False)
class Snapshot:
    """A state of a module: what it was, and the functions that hold in it."""

    guard: Guard
    functions: list[Function]
    memo: dict[Any, Function | None] = field(default_factory=dict)
    owners: dict[int, list[tuple[dict, str]]] = field(default_factory=dict)


@dataclass(eq=False)
class BlockForward:
    """Runs the calls of one module by captured functions."""

    path: str
    state: Optimized
    functions: list[Function]
    router_state: RouterState
    routers: tuple[type[nn.Module], ...] = ()  #: classes of the routers whose outputs Transformers records
    kept: list[Any] = field(default_factory=list)  #: recomputation.Kept: routes of forwards that will be recomputed
    originals: Originals = field(default_factory=Originals)
    snapshots: list[Snapshot] = field(default_factory=list)  #: of the module, the latest first
    now: Snapshot | None = None  #: that of the latest call
    failed: list[Reads] = field(default_factory=list)  #: what captures read that failed

    def __deepcopy__(self, memo: dict) -> BlockForward:
        return type(self)(self.path, self.state, self.functions, copy.deepcopy(self.router_state, memo), self.routers)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, original: Callable) -> Any:
        """What the module returns for a call; ``original`` is its original forward."""
        if hf.is_traced():
            if only_graphs(self.state, self.router_state, module.training):
                return untraced(self, module, args, kwargs, original)
            return original(*args, **kwargs)
        if getattr(module, "_is_replica", False):
            return original(*args, **kwargs)
        requested = hf.requested()
        if self.state.bypass or hf.is_emitting():
            return original(*args, **kwargs)
        if self.originals.run("attentions" in requested, args, kwargs):
            return original(*hf.original_masks(args), **hf.original_masks(kwargs))
        now = self.snapshot(module)
        call, tensors = call_key(args, kwargs)
        key = module.training, call
        try:
            function = now.memo[key]
        except KeyError:
            function = self.find(module, args, kwargs)
            now = self.snapshot(module)  # a capture reads more
            now.memo[key] = function
            if len(now.memo) > 4096:  # a new length in every step of a long run
                now.memo.clear()
        if function is None:
            return original(*hf.original_masks(args), **hf.original_masks(kwargs))
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
        """The flat outputs of ``function``."""
        with exchange.layer(self.path) if self.state.plan.ep_size > 1 else contextlib.nullcontext():
            return self._run(module, function, tensors)

    def _run(self, module: nn.Module, function: Function, tensors: list[Tensor]) -> Any:
        run = self.state.runner(function)
        units = self.units
        if not units:
            return run(*self.parameters(module, function), *function.constants, *tensors)
        tensors = fsdp.pre_forward(units, tensors)
        out = run(*self.parameters(module, function), *function.constants, *tensors)
        return fsdp.post_forward(units, tensors, out)

    def run_routed(self, module: nn.Module, function: Function, tensors: list[Tensor]) -> Any:
        """The flat outputs of a function with routers; forces its routes if they are given, and records them."""
        x, dispatches = tensors[0], None
        forced = self.router_state.forced_routes(self, function, tensors, module.training)
        if forced is None:
            out = self.run(module, function, tensors)
        else:
            given, dispatches = forced
            with exchange.reuse_dispatches(dispatches):
                out = self.run(module, self.state.replay_function(function), [*tensors, *given])
        self.router_state.record(self, function, x, module.training, out, dispatches)
        return out

    def parameters(self, module: nn.Module, function: Function) -> list[Tensor]:
        """The parameters of ``function``, read from ``module`` now; under expert parallelism this rank's shards."""
        assert self.now is not None
        known = self.now.owners
        owners = known.get(id(function))
        if owners is None:
            owners = known[id(function)] = [self._owner(module, name) for name in function.parameters]
        found = [d[name] for d, name in owners]
        return [p.to_local() if type(p.data) is DTensor else p for p in found] if self.state.plan.ep_size > 1 else found

    @staticmethod
    def _owner(module: nn.Module, name: str) -> tuple[dict, str]:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf

    @property
    def shared(self) -> Captured:
        """What was captured for this module and for others."""
        return self.state.shared

    @property
    def units(self) -> list[nn.Module]:
        """FSDP's units inside the module."""
        return [] if self.now is None else self.now.guard.units

    def snapshot(self, module: nn.Module) -> Snapshot:
        """The state of the module now, and what holds in it."""
        for i, known in enumerate(self.snapshots):
            if not known.guard.changed():
                if i:  # another list: threads may go through this one
                    self.snapshots = [known, *self.snapshots[:i], *self.snapshots[i + 1 :]]
                self.now = known
                return known
        guard = Guard(module, [*(f.reads for f in self.functions), *self.failed])
        holding = [f for f in self.functions if f.state.difference(f.reads.state(module), guard.sharded) is None]
        made = self.now = Snapshot(guard, holding)
        self.snapshots = [made, *self.snapshots[: MAX_SNAPSHOTS - 1]]
        return made

    def forget(self) -> None:
        """Drops the functions, so that calls are captured again."""
        self.functions, self.failed, self.snapshots = [], [], []

    def runs_kept(self, module: nn.Module, args: tuple) -> None:
        """Reports a call of a forward that is not the module's any more."""
        if not (hf.is_traced() or self.state.bypass or hf.is_emitting()):
            reason = "it calls a forward that was looked up before its class was given another one"
            self._fell_back(module, reason, consequence=self.consequence(module, args))

    def _fell_back(self, module: nn.Module, reason: str, detail: str = "", consequence: str = "") -> None:
        warn = module.training and torch.is_grad_enabled()
        self.state.report.fell_back(self.path, reason, warn, detail, consequence)

    def consequence(self, module: nn.Module, args: tuple) -> str:
        """What it costs the caller that this call runs the original forward."""
        return "it runs in plain PyTorch"

    def find(self, module: nn.Module, args: tuple, kwargs: dict) -> Function | None:
        """The function that covers this call, captured now if none does; None if the original forward must run.

        Raises:
            MoefxError: under FSDP, an adapter is merged and disabled.
        """
        now = self.now
        assert now is not None
        if now.guard.sharded and adapters.unmerges(module):
            raise MoefxError(
                f"an adapter of {self.path} is merged into the weights and disabled: PEFT would unmerge it from the parameters "
                "that FSDP has gathered for this call only; call unmerge_adapter() on the PEFT model"
            )
        try:
            tensors, template = flatten(args, kwargs)
            for function in now.functions:
                if function.call.covers(tensors, template, module.training):
                    return function
            if tensors and sum(f.call.device == tensors[0].device for f in now.functions) >= MAX_VARIANTS:
                raise CaptureError(f"it was captured for {MAX_VARIANTS} kinds of calls already{self._what_differs(now)}")
            stale = [f for f in self.functions if f not in now.functions and f.call.covers(tensors, template, module.training)]
            if len(stale) >= MAX_STATES:
                raise CaptureError(
                    f"it was captured in {MAX_STATES} other states already: {self._difference(module, stale[-1])}"
                )
            others = [f.call for f in now.functions]
            # numbers that differ between calls are left open first: a graph that does not read them covers all of them
            opened = [template.opened(other.template) for other in others]
            templates = dict.fromkeys([*(t for t in opened if t not in (None, template)), template])
            readings = list(Call.readings(tensors, template, module.training, sizes_of(module), others))
            calls = [replace(call, template=t) for t in templates for call in readings]
            with CAPTURING:
                function = self.capture_one_of(module, calls)
        except CaptureError as error:
            if error.reads is not None and error.reads not in self.failed:
                self.failed.append(error.reads)
                self.snapshots = []
            self._fell_back(module, str(error), error.detail, self.consequence(module, args))
            return None
        self.functions.append(function)
        self.snapshots = []  # their guards do not watch what this capture read
        return function

    def _difference(self, module: nn.Module, function: Function) -> str:
        """What of the module is not as it was when ``function`` was captured."""
        return str(function.state.difference(function.reads.state(module), bool(self.units)))

    @staticmethod
    def _what_differs(now: Snapshot) -> str:
        """The end of a reason: the arguments whose numbers differ in most of the captured calls: the module reads them."""
        found: dict[str, set[float]] = {}
        for function in now.functions:
            for name, number in function.call.template.numbers().items():
                found.setdefault(name, set()).add(number)
        names = [name for name, numbers in found.items() if len(numbers) > MAX_VARIANTS // 2]
        return f", and computes with {', '.join(names)}, which differs each time" if names else ""

    def capture_one_of(self, module: nn.Module, calls: list[Call]) -> Function:
        """The function of the first of ``calls``, readings of one call, that can be captured; else raises the first error."""
        first: CaptureError | None = None
        try:
            for call in calls:
                try:
                    return self.capture(module, call)
                except CaptureError as error:
                    first = first or error
            assert first is not None
            raise first
        finally:
            del first  # a frame that holds its own error keeps the step's tensors until the garbage collector runs

    def capture(self, module: nn.Module, call: Call) -> Function:
        """The function of ``call``, shared by modules of equal state. Raises CaptureError if it cannot be captured."""
        sharded = self.now is not None and self.now.guard.sharded
        found = self.shared.find(module, call, sharded)
        if found is None:
            # by class: a module with a router inside may have been replaced by one that has it elsewhere
            routers = {p: m for p, m in module.named_modules() if p and isinstance(m, self.routers)}
            try:
                with ambient_modes.disabled(), torch.enable_grad(), unseen():
                    function = self._export(module, call, routers)
                    self.state.lower(function)
                found = self.shared.add(module, call, function)
            except CaptureError as error:
                found = self.shared.add(module, call, error)
        if isinstance(found, CaptureError):
            raise found.again()
        if self.path not in found.instances:
            found.instances.append(self.path)
        return found

    def _export(self, module: nn.Module, call: Call, routers: dict[str, nn.Module]) -> Function:
        return capture_module(module, call, routers, type(module).__name__)


def run_block(module: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of an optimized block, around its own class's (``plain``)."""
    return module._moefx_forward(module, args, kwargs, plain)


def run_kept_block(module: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """A forward that someone has kept of an optimized block, whose class has another one now, which graphs are captured of."""
    module._moefx_forward.runs_kept(module, args)
    return plain(*hf.original_masks(args), **hf.original_masks(kwargs))
