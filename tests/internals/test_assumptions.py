"""Assumptions about PyTorch and Transformers: each is checked, holds here, and is reported where it does not hold."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from importlib import import_module

import pytest
import torch
from torch.autograd.function import BackwardCFunction
from transformers import masking_utils
from transformers.utils import output_capturing

import moefx
from moefx.frontend import custom_gradients as gradients
from moefx.frontend import length_guards
from moefx.integrations import transformers as hf
from moefx.internals import assumptions, torch_patches
from moefx.runtime import recomputation
from tests.support.families import build

capture_of = import_module("moefx.frontend.export")
NETS = {
    "custom_gradients": (gradients.custom_gradients_are_seen, torch_patches.AUTOGRAD_FUNCTION, BackwardCFunction),
    "questions": (length_guards.questions_are_seen, torch_patches.SYMBOLIC_TRUTH, torch.SymBool),
}


@pytest.fixture
def tried_again():
    for a in assumptions.ALL:
        a.reason = None
    yield
    for a in assumptions.ALL:
        a.reason = None


def test_all_hold_here():
    assert [a.what for a in assumptions.ALL if not a.holds()] == []
    assert len(assumptions.ALL) >= 6


@pytest.mark.parametrize("name", NETS)
def test_a_net_that_is_no_longer_asked_is_missed(name, tried_again, monkeypatch):
    """As PyTorch 2.14 did with what was patched before: the name is there, and nobody calls it."""
    assumption, patch, owner = NETS[name]

    class Elsewhere:
        __init__ = owner.__init__
        __bool__ = object.__repr__

    monkeypatch.setattr(patch, "owner", Elsewhere)
    monkeypatch.setattr(patch, "_ours", None)
    monkeypatch.setattr(patch, "_instead", ContextVar("other", default=None))
    with pytest.raises(moefx.CaptureError, match=r"does not hold .*: use torch 2.11 to 2.14"):
        assumption()
    model = build("qwen3_moe")
    with pytest.warns(moefx.ShortfallWarning, match=rf"with torch {torch.__version__}".replace("+", r"\+")):
        moefx.optimize(model, compile=False)
    assert {x.path for x in moefx.report(model).not_captured} >= {
        "model.layers.0",
        "model.layers.1",
    }  # nothing is captured unseen


def test_no_grad_regions_that_are_no_longer_nodes_are_missed(tried_again, monkeypatch):
    monkeypatch.setattr(gradients, "refuse_no_grad_values", lambda graph_module: None)
    with pytest.raises(moefx.CaptureError, match="torch.no_grad"):
        gradients.no_grad_is_seen()


def test_outputs_that_are_collected_elsewhere_are_missed(tried_again, monkeypatch):
    other = type(output_capturing._active_collector)("other")
    monkeypatch.setattr(output_capturing, "_active_collector", other)
    model = build("qwen3_moe")
    with pytest.raises(moefx.CaptureError, match="collected outputs .* use transformers"):
        moefx.optimize(model, compile=False)
    assert not hasattr(model, "_moefx") and model.config._attn_implementation != "moefx"


def test_recomputation_that_is_not_seen(tried_again, monkeypatch):
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    with pytest.raises(moefx.CaptureError, match="whether a backward is running"):
        recomputation.recomputation_is_seen()


def test_masks_that_no_longer_look_for_packing_are_missed(tried_again, monkeypatch):
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda *args: None)
    with pytest.raises(moefx.CaptureError, match="find_packed_sequence_indices"), hf.packed():
        pass
    with hf.unpacked():  # only slower
        pass


def test_a_trial_sees_nothing_of_what_is_around_it(tried_again):
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.device("meta"), torch.no_grad(), torch.inference_mode(), hooks:
        assert [a.what for a in assumptions.ALL if not a.holds()] == []


@pytest.mark.parametrize(
    ("uses", "said"),
    [
        (lambda x, w: _hooked(x @ w), "Tensor.register_hook"),
        (lambda x, w: (x @ w) * (2 if x.requires_grad else 3), r"asks for requires_grad \(test_assumptions.py:\d+\)"),
        (lambda x, w: _node_hooked(x @ w), "asks for grad_fn"),
        (lambda x, w: _saved(x @ w), "saved_tensors_hooks"),
    ],
)
def test_what_a_graph_would_lose_of_autograd_is_refused(uses, said):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return uses(x, self.w)

    tensors, template = capture_of.flatten((torch.randn(3, 17, 4),), {})
    with pytest.raises(moefx.CaptureError, match=said):
        capture_of.capture_module(Block(), capture_of.Call.of(tensors, template, True), {}, "block")


def _hooked(h):
    h.register_hook(lambda g: g * 10)
    return h * 2


def _node_hooked(h):
    h.grad_fn.register_hook(lambda *_: None)
    return h * 2


def _saved(h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return h.sin()


def test_a_thread_that_does_not_end_is_the_first_to_make_fake_tensors(monkeypatch):
    """Where torch is built for CUDA and sees no device, each thread would else leave a pointer to freed memory (torch 2.11)."""
    called = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: called.append(threading.current_thread()))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch_patches, "_guard_thread", None)
    for _ in range(2):
        torch_patches.keep_fake_device_guard()
    (thread,) = called
    assert thread is not threading.current_thread() and thread.is_alive() and thread.daemon
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch_patches, "_guard_thread", None)
    torch_patches.keep_fake_device_guard()
    assert len(called) == 1
