"""Captures functions and models, and runs passes over them; compares a function with what passes made of it."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

import moefx
from moefx import backends
from moefx.api import rewrite
from moefx.cli.inspect import ranks
from moefx.distributed import expert_sharding
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import flatten
from moefx.frontend.capture import capture
from moefx.frontend.export import capture_module
from moefx.integrations import transformers as hf
from moefx.ir.graph import is_call
from moefx.options import Options
from moefx.passes import (
    Canonicalize,
    Changes,
)
from moefx.rewriting.pipeline import run_pass
from tests.support.families import build


class Wrap(nn.Module):
    """A function as a module, so that it is captured as blocks are."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(parameters)

    def forward(self, *inputs):
        return self.function(*self.weights, *inputs)


def captured(function, inputs, parameters=()):
    module = Wrap(function, *parameters)
    tensors, template = flatten(tuple(inputs), {})
    f = capture_module(module, Call.of(tensors, template, True), {}, "f")
    f.instances.append("f")
    return module, f


def run(passes, function, inputs, parameters=(), **close):
    """The function after the passes, the last pass's changes; outputs and gradients are those of the plain function.

    ``close``: tolerances where the function rounds more often than the operation does.
    """
    module, f = captured(function, inputs, parameters)
    plan = moefx.Plan(moefx.resolve(["reference"]))
    changes = Changes()
    for p in (Canonicalize(), *passes):
        changes = run_pass(p, f, plan)[0]
    f.graph_module.recompile()
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = module(*inputs)
    found = f.graph_module(*[dict(module.named_parameters())[n] for n in f.parameters], *f.constants, *inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    leaves = [t for t in (*module.parameters(), *inputs) if t.requires_grad]
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, **close)

    def grads(outs):
        return torch.autograd.grad(
            sum((o.float() ** 2).sum() for o in outs if o.is_floating_point()), leaves, allow_unused=True
        )

    for a, b in zip(grads(wanted), grads(found), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **close)
    return f, changes


def calls(f, op):
    return [n for n in f.graph.nodes if is_call(n, op)]


def norm(weight, x, eps=1e-5):
    h = x.to(torch.float32)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@contextlib.contextmanager
def rewritten_over_ranks(name, ep_size, pipeline, **changes):
    """The report of a family's model after ``pipeline``, on the meta device, within a fake group of ``ep_size`` ranks."""
    with torch.device("meta"):
        model = build(name, **changes)
    hf.check(model)
    with ranks(ep_size) as mesh:
        size, mesh = expert_sharding.make_mesh(model, ep_size, mesh)
        plan = expert_sharding.plan(model, Options(), backends.resolve(None), size, mesh)
        yield rewrite(capture(model), plan, pipeline, model)
