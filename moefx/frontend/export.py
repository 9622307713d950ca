"""Exports one module with torch.export, and refuses what its graph would not compute exactly."""

from __future__ import annotations

import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call, sizes_of
from moefx.frontend.call_template import flatten, flatten_output
from moefx.frontend.custom_gradients import (
    custom_gradients_are_seen,
    no_grad_is_seen,
    refuse_no_grad_values,
    refusing_custom_gradients,
    refusing_foreign_parameters,
)
from moefx.frontend.functionalize import functionalize
from moefx.frontend.length_guards import questions_are_seen, refuse_limits, refusing_questions
from moefx.frontend.module_state import foreign_hooks, global_hooks
from moefx.frontend.readings import OWN
from moefx.frontend.reads import Reads, Written, reads_are_seen
from moefx.frontend.untraceable import untraceable
from moefx.integrations import peft as adapters
from moefx.integrations import transformers as hf
from moefx.integrations.unsharded_view import unsharded_view
from moefx.internals.silence import silent
from moefx.ir.graph import aten
from moefx.ir.naming import input_names, name_nodes
from moefx.ir.program import Function

#: Held while modules are captured and their graphs rewritten: torch.export and fx keep state that all threads share.
CAPTURING = threading.RLock()


class _Entry(nn.Module):
    """The module to export, as a function of the tensors of its call."""

    def __init__(self, module: nn.Module, call: Call, routers: dict[str, nn.Module], reads: Reads, outputs: Callable):
        super().__init__()
        self.reads = reads
        # templates of what it returned go to `outputs`: torch.export undoes what a forward writes to the module
        self.block, self.template, self.routers, self.outputs = module, call.template, list(routers.items()), outputs
        self.sizes = call.sizes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        seen: dict[str, Any] = {}  # in the order in which they run, as Transformers collects them
        hooks = [m.register_forward_hook(lambda _, __, out, path=p: seen.__setitem__(path, out)) for p, m in self.routers]
        written: dict[Any, dict] = {}
        try:
            args, kwargs = self.template.fill(tensors, written)
            _, before = flatten(args, kwargs)
            state = Written(self.block)
            with self.reads.recorded(self.block), refusing_foreign_parameters():
                # of its class: hooks of the block, and a forward put around its own, run around its graph too
                out = type(self.block).forward(self.block, *args, **kwargs)
            state.refuse_changes()
        except RuntimeError as error:  # for data-dependent control flow torch.export would print the whole graph so far
            raise untraceable(error, self.template.names(), self.sizes) from error
        finally:
            for h in hooks:
                h.remove()
        after, template = flatten(args, kwargs)
        if template != before or any(a is not b for a, b in zip(after, tensors, strict=True)):
            raise CaptureError("it writes into a dictionary or list that it is given")
        flat: list[Tensor] = []
        outputs = flatten_output(out, flat)
        left = tuple((argument, flatten_output(tuple(w.items()), flat)) for argument, w in written.items() if w)
        self.outputs((outputs, left, tuple((path, flatten_output(x, flat)) for path, x in seen.items())))
        return tuple(flat)


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Context without activation checkpointing, which wraps a block's call and is not part of its graph."""
    before = [(m, m.gradient_checkpointing) for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for m, _ in before:
        m.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, value in before:
            m.gradient_checkpointing = value


def hook_inside(module: nn.Module) -> str | None:
    """The first hook inside that is neither one of Transformers' output recording nor one of FSDP; None if there is none."""
    for name in global_hooks():
        return f"{name} on all modules"
    for path, m in module.named_modules():
        for hook, backward in foreign_hooks(m) if path else ():  # its own run around the call, also around a captured one
            return f"{getattr(hook, '__qualname__', hook)}{' (backward)' if backward else ''} on {path}"
    return None


def capture_module(module: nn.Module, call: Call, routers: dict[str, nn.Module], name: str) -> Function:
    """Exports ``module`` for the calls that ``call`` describes.

    Args:
        module: a block, for instance.
        call: template, dtypes and sizes of its call.
        routers: modules inside whose outputs the function returns too, by path.
        name: of the function.

    Raises:
        CaptureError: the graph would not be exact: Python control flow depends on a size or on data, a custom backward would
            be lost, a buffer is written, a hook would be part of the graph.
    """
    for assumption in (custom_gradients_are_seen, no_grad_is_seen, questions_are_seen, reads_are_seen):
        assumption()
    hook = hook_inside(module)
    if hook:
        raise CaptureError(f"the hook {hook} would become part of the graph")
    if adapters.unmerges(module):
        raise CaptureError("PEFT unmerges disabled adapters from the weights in this call")
    hf.find_layouts(module)
    tensors = call.example(sizes_of(module))
    returned: list[Any] = []
    reads = Reads()
    entry = _Entry(module, call, routers, reads, returned.append)
    entry.training = module.training
    try:
        with (
            # a failure becomes a sentence of the report: its stack is not logged as well
            silent("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"),
            CAPTURING,
            _without_checkpointing(module),
            unsharded_view(module),
            hf.emitting() as callers,
            refusing_custom_gradients(),
            refusing_questions(),
            torch.enable_grad(),
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),  # with symbolic sizes it costs more than it saves
            torch.autocast(call.device.type if call.device.type != "meta" else "cpu", enabled=False),
        ):
            exported = _export(entry, tensors, call)
            refuse_no_grad_values(exported.graph_module)
            if not functionalize(exported.graph):
                exported = exported.run_decompositions({})
    except CaptureError as error:
        error.reads = reads
        raise
    except Exception as error:
        raise _refusal(error, call).having_read(reads) from error
    finally:
        reads.close(module)
    outputs, written, of_routers = returned[-1]
    call = replace(call, outputs=outputs, routers=of_routers, written=written)
    function = _function(module, exported, call, name, callers)
    function.reads = reads
    return function


def _export(entry: _Entry, tensors: list[Tensor], call: Call) -> Any:
    """torch.export with every lettered size dynamic. Raises if one would become a constant."""

    def export(names: Callable[[str], Any]) -> Any:
        shapes = tuple({i: names(n) for i, n in enumerate(size) if isinstance(n, str)} for size in call.sizes)
        return torch.export.export(entry, tuple(tensors), dynamic_shapes=(shapes,), strict=False)

    named = {n: Dim(f"size_{n}") for n in ("a", "b", "c", "d", "e", "f", "g", *OWN)}
    try:
        # one Dim a letter: batch and sequence are the same in every input
        return export(lambda n: named.get(n, Dim.DYNAMIC))
    except torch._dynamo.exc.UserError as error:
        _forget_locals(error)
        # a named Dim must satisfy every guard for all values; torch 2.11 has guards that always hold and that it cannot prove
        exported = export(lambda n: Dim.DYNAMIC)
        refuse_limits(exported)
        return exported


def _refusal(error: Exception, call: Call) -> CaptureError:
    found = untraceable(error, call.template.names(), call.sizes)
    _forget_locals(error)
    return found


def _forget_locals(error: BaseException) -> None:
    """Clears the frames that an error, and those that led to it, came through.

    One that is a variable of such a frame is a reference cycle (``ShapeEnv.produce_guards_verbose`` of torch 2.11 keeps its
    own), and it holds the frames above as well: with a capture inside a step, the hidden states of that step.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            left += [found.__cause__, found.__context__]


def _function(module: nn.Module, exported: Any, call: Call, name: str, callers: list) -> Function:
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"it writes {spec.target or 'an input'} ({spec.kind.name.lower().replace('_', ' ')})")
    parameters: list[str] = []
    constants: list[Tensor] = []
    inputs: list[str] = []
    kinds: list[int] = []
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            parameters.append(spec.target.removeprefix("block."))
            kinds.append(0)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants.append(exported.constants[spec.target])
            kinds.append(1)
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            kinds.append(2)
        else:
            raise CaptureError(f"it has an input of kind {spec.kind.name.lower().replace('_', ' ')}")
    graph = fx.Graph()
    old = [n for n in exported.graph.nodes if n.op == "placeholder"]
    copied: dict[fx.Node, fx.Node] = {}
    # parameters, then constants, then inputs, in whatever order torch.export had them
    for kind in (0, 1, 2):
        for node, k in zip(old, kinds, strict=True):
            if k == kind:
                copied[node] = graph.node_copy(node)
                copied[node].name = node.name.removeprefix("p_block_").removeprefix("b_block_")
                copied[node].target = copied[node].name
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op not in ("call_function", "output"):
            if node.op == "call_module" and "guards" in str(node.target) and not node.users:
                continue
            raise CaptureError(f"its graph has a {node.op} of {node.target}")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"it uses the higher-order operator {node.target.name()}")
        if node.target is aten._assert_scalar.default or node.target is torch._C._set_grad_enabled:
            continue
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.eliminate_dead_code()  # what computed the assertions
    fake = next(n.meta["val"].fake_mode for n in copied.values() if isinstance(n.meta.get("val"), Tensor))
    called = input_names(call.template.names(), list(inspect.signature(module.forward).parameters), len(inputs))
    inputs = name_nodes(graph, parameters, called)
    graph_module = fx.GraphModule(nn.Module(), graph)
    made = Function(
        name, type(module).__name__, graph_module, [], parameters, constants, inputs, call, fake, promises(module, callers)
    )
    made.captured = made.copy()
    return made


def promises(module: nn.Module, callers: list[tuple[str, nn.Module]]) -> dict[str, int]:
    """How many of each semantic operation are expected, by the structure of the module."""
    inside = {id(m) for m in module.modules()}
    counts = {"rms_norm": sum(hf.is_norm(m) for m in module.modules())}
    counts["dense_experts"] = sum(hf.is_dense_experts(m) for m in module.modules())
    for kind in ("experts", "attention"):
        counts[kind] = len({id(m) for k, m in callers if k == kind and id(m) in inside})
    return {k: v for k, v in counts.items() if v}
