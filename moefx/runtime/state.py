"""The state that ``optimize`` attaches to a model: program, plan, report, and the compiled code of its functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moefx.analysis.report import Report
from moefx.backends.compile import compiled
from moefx.errors import MoefxError
from moefx.frontend.captured import Captured
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap
from moefx.internals import ambient_modes
from moefx.ir.plan import Plan
from moefx.ir.program import Function, Program
from moefx.rewriting.pipeline import Pipeline
from moefx.runtime.blocks import masks_are_seen


def unseen() -> contextlib.AbstractContextManager:
    """Context that hides the hooks for saved tensors of activation checkpointing around a call, while a graph is made in it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


@dataclass(eq=False)
class Optimized:
    """All that ``optimize`` attaches to a model, apart from the classes of its modules."""

    program: Program
    plan: Plan
    pipeline: Pipeline
    report: Report
    implementations: hf.Names  #: the original ones of its experts
    runners: dict[int, Callable] = field(default_factory=dict)  #: by id of function
    replaying: dict[int, Function] = field(default_factory=dict)  #: by id of function: its replay function
    compiled: dict[tuple, Callable] = field(default_factory=dict)  #: by code and dtypes: equal graphs share compiled code
    shared: Captured = field(default_factory=Captured)  #: what was captured after ``optimize``
    heads: dict[Any, Captured] = field(default_factory=dict)  #: heads that were, by the value of their loss function
    bypass: bool = False  #: original forwards run (moefx.verify)
    global_aux_loss: bool = False  #: the auxiliary loss is over the tokens of all ranks
    hooks: list[RemovableHandle] = field(default_factory=list)  #: hooks of the model while it is optimized
    shards_experts: bool = False  #: ``optimize`` sharded the experts: ``restore`` gathers them

    def __deepcopy__(self, memo: dict) -> Optimized:
        return self  # a copied model shares graphs and compiled code; parameters are read from the module that is called

    def masks(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context in which ``model``, or a model inside it, makes lazy masks for the graphs."""
        plain = self.bypass or self.program.own_attention or hf.is_emitting()
        return contextlib.nullcontext() if plain else hf.lazy_masks(masks_are_seen(model))

    def runner(self, function: Function) -> Callable:
        """The function as a callable, compiled once however many instances share it."""
        if id(function) not in self.runners:
            given = [n.meta["val"] for n in function.graph.nodes if n.op == "placeholder"]
            # sizes too: a norm of heads and one of hidden states have the same code, and Dynamo would compile it for each
            inputs = tuple((v.dtype, tuple(d if isinstance(d, int) else None for d in v.shape)) for v in given)
            targets = tuple(n.target for n in function.graph.nodes if n.op == "call_function")
            same = (function.graph_module.code, targets, inputs)  # mostly a block in training and in evaluation
            if same not in self.compiled:
                self.compiled[same] = compiled(function.graph_module, self.plan)
            self.runners[id(function)] = self.compiled[same]
        return self.runners[id(function)]

    def replay_function(self, function: Function) -> Function:
        """The function with its routes as inputs; made when it is first needed."""
        if id(function) not in self.replaying:
            assert function.captured is not None
            replay_function = function.captured.replaying()
            with unseen(), ambient_modes.disabled():
                self.pipeline.run(Program(self.program.model_class, {replay_function.name: replay_function}, []), self.plan)
            self.replaying[id(function)] = replay_function
        return self.replaying[id(function)]

    def lower(self, function: Function) -> None:
        """Runs the pipeline over a function that was captured after ``optimize``."""
        self.program.add(function)
        partial = Program(self.program.model_class, {function.name: function}, [])
        self.report.extend(self.pipeline.run(partial, self.plan), function)
        shortfall = self.report.shortfall([function])
        if shortfall:
            self.report.warn_or_raise(shortfall, self.plan.strict)


def state_of(model: Any) -> Optimized:
    """The model's ``Optimized``; raises MoefxError if it is not optimized."""
    inner = unwrap(model)
    state = getattr(inner, "_moefx", None)
    if state is None:
        raise MoefxError(f"{type(model).__name__} is not optimized: call moefx.optimize(model) first")
    return state
