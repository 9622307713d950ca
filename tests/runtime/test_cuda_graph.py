"""A recorded step without a GPU: all but the replay, which tests/gpu/test_cuda_graph.py tests."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch import nn

import moefx
from moefx.runtime.cuda_graph import GraphedStep, Recorded, _ran_out
from tests.support.families import batch, build


class Replays:
    """Stands for a graph: writes what a backward of ``x -> sum(w * x)`` would, into the same memory each time."""

    def __init__(self, recorded):
        self.recorded = recorded

    def replay(self):
        (w,) = self.recorded.gradients
        x = self.recorded.inputs["x"]
        self.recorded.loss.copy_((w.detach() * x).sum())
        self.recorded.gradients[w].copy_(x)


def recorded(w):
    made = Recorded(None, {"x": torch.zeros(3)}, torch.zeros(()), {w: torch.full((3,), 7.0)}, [])
    made.graph = Replays(made)
    return made


def passes():
    pass


def fails():
    raise moefx.MoefxError("it has changed")


def test_gradients_add_up_until_they_are_none():
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    step, plain = recorded(w), nn.Parameter(w.detach().clone())
    losses = []
    for i in range(6):
        x = torch.tensor([1.0, -1.0, 0.5]) * (i + 1)
        losses.append(step.replay({"x": x}, passes))
        loss = (plain * x).sum()
        loss.backward()
        assert torch.equal(losses[-1], loss.detach()) and torch.equal(w.grad, plain.grad)
        if i == 1:
            w.grad = plain.grad = None
        if i == 3:  # as zero_grad(set_to_none=False)
            w.grad.zero_()
            plain.grad.zero_()
    assert len({float(x) for x in losses}) == 6  # not one tensor that all replays write


def test_a_gradient_of_another_step_is_kept():
    w = nn.Parameter(torch.ones(3))
    step = recorded(w)
    (w * 10).sum().backward()
    before = w.grad
    step.replay({"x": torch.ones(3)}, passes)
    assert w.grad is before and torch.equal(w.grad, torch.full((3,), 11.0))


@pytest.mark.parametrize("earlier", [None, "a replay's", "another step's"])
def test_a_step_that_must_not_be_replayed_leaves_gradients_alone(earlier):
    w = nn.Parameter(torch.ones(3))
    step = recorded(w)
    if earlier == "a replay's":
        step.replay({"x": torch.ones(3)}, passes)
    elif earlier:
        w.sum().backward()
    with pytest.raises(moefx.MoefxError, match="it has changed"):
        step.replay({"x": torch.full((3,), 5.0)}, fails)
    assert w.grad is None if earlier is None else torch.equal(w.grad, torch.ones(3))


def test_memory_that_ran_out_is_found_behind_the_error_that_hides_it():
    def recording():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("capturing stream has unjoined work")

    with pytest.raises(RuntimeError) as caught:
        recording()
    assert _ran_out(caught.value) and not _ran_out(RuntimeError("operation not permitted when stream is capturing"))


def test_refusals():
    with pytest.raises(moefx.MoefxError, match="is not optimized"):
        moefx.cuda_graph(build("qwen3_moe"))
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    with pytest.raises(moefx.MoefxError, match="needs a model on a CUDA device, this one is on cpu"):
        moefx.cuda_graph(model)
    model(**batch(1, 5)).loss.backward()  # and nothing has changed


class Runs:
    """Stands for a CUDA graph: recording runs the step, a replay does nothing."""

    def replay(self):
        pass


@pytest.fixture
def recording(monkeypatch):
    """``torch.cuda`` without a GPU, as far as recording a step uses it."""

    class Stream:
        def wait_stream(self, other):
            pass

    for name, stand_in in {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": Runs, "graph_pool_handle": lambda: None,
        "synchronize": lambda: None, "empty_cache": lambda: None, "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda *_, **__: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _embedding_hook(model):
    model.model.embed_tokens.register_forward_hook(lambda *_: None)


def _top_k(model):
    model.model.layers[1].mlp.gate.top_k = 1


def _loss(model):
    model.config.router_aux_loss_coef = 0.5
    model.router_aux_loss_coef = 0.5


def _model_hook(model):
    model.register_forward_hook(lambda *_: None)


def _layer_hook(model):
    model.model.layers[0].register_full_backward_hook(lambda *_: None)


def _forward(module):
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)


def _layer_forward(model):
    _forward(model.model.layers[1])


def _model_forward(model):
    _forward(model)


def _submodule(model):
    model.model.norm = torch.nn.Identity()


@pytest.mark.parametrize(
    "change",
    [_hook, _embedding_hook, _top_k, _loss, _model_hook, _layer_hook, _layer_forward, _model_forward, _submodule],
)
@pytest.mark.usefixtures("recording", "cached_captures")
def test_a_model_that_was_changed_is_not_replayed(change):
    model = moefx.optimize(build("qwen3_moe", output_router_logits=True), compile=False)
    step = GraphedStep(model, warmup=2, most=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        step(**batch(2, 9))
        optimizer.step()
        optimizer.zero_grad()
    assert (step.eager, step.replays) == (2, 3)
    change(model)
    with pytest.raises(moefx.MoefxError, match="not as it was when the step was recorded"):
        step(**batch(2, 9))


@pytest.mark.usefixtures("recording", "cached_captures")
def test_an_error_names_what_was_changed_and_ends_when_it_is_changed_back():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    step = GraphedStep(model, warmup=2, most=1)
    gate = model.model.layers[1].mlp.gate
    for _ in range(3):
        step(**batch(2, 9))
    gate.top_k = 1
    with pytest.raises(moefx.MoefxError, match=re.escape("MoeForCausalLM.model.layers.1: mlp.gate.top_k was 2, is 1")):
        step(**batch(2, 9))
    gate.top_k = 2
    step(**batch(2, 9))
    model.config.architectures = ["another list"]  # another object; nothing reads it
    gate.top_k = int("2")
    step(**batch(2, 9))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
@pytest.mark.usefixtures("recording", "cached_captures")
def test_training_changes_nothing_that_a_recorded_step_reads(family):
    model = moefx.optimize(build(family), compile=False)
    moefx.enable_load_tracking(model)
    step = GraphedStep(model, warmup=2, most=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(6):
        step(**batch(2, 9), num_items_in_batch=10 + i)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i == 3:  # an evaluation in between
            model.eval()
            with torch.no_grad():
                model(**batch(2, 9))
            model.train()
    assert (step.eager, step.replays) == (2, 4)
