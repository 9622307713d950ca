"""Derivatives that others take of an optimized model: torch.func, forward-mode AD, torch.autograd.functional, double backward."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.errors import MoefxError
from tests.support.families import batch, build

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
pytestmark = pytest.mark.usefixtures("cached_captures")


@functools.cache
def _optimized(family: str, experts: str = "eager") -> Any:
    return moefx.optimize(_plain(family, experts), compile=False)


def _plain(family: str, experts: str) -> Any:
    """With attention and experts whose forward and backward PyTorch can differentiate."""
    model = build(family)
    model.config._attn_implementation, model.config._experts_implementation = "eager", experts
    return model


def both(family: str, run: Callable[[Any], Any], experts: str = "eager") -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that ``run`` returns for an optimized model and for its untouched twin."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortfallWarning)
        for model in (copy.deepcopy(_optimized(family, experts)), _plain(family, experts)):
            found.append([x.detach() for x in tree_leaves(run(model)) if isinstance(x, Tensor)])
    assert found[0] and len(found[0]) == len(found[1])
    return found[0], found[1]


def _given(model: Any) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def _loss(model: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    examples = batch(2, 5)
    return lambda given: functional_call(model, given, (), examples).loss


def _of_embeddings(model: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x = model.get_input_embeddings()(batch(2, 5)["input_ids"]).detach()
    return lambda x: model(inputs_embeds=x, labels=batch(2, 5)["labels"]).loss, x


def grad(model):
    return torch.func.grad(_loss(model))(_given(model))


def grad_and_logits(model):
    def loss(given):
        out = functional_call(model, given, (), batch(2, 5))
        return out.loss + out.logits.logsumexp(-1).mean(), out.logits

    return torch.func.grad(loss, has_aux=True)(_given(model))


def vjp(model):
    out, pull = torch.func.vjp(_loss(model), _given(model))
    return out, pull(torch.tensor(2.0))


def per_sample_gradients(model):
    def loss(given, ids):
        return functional_call(model, given, (), {"input_ids": ids[None], "labels": ids[None]}).loss

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(_given(model), batch(2, 5)["input_ids"])


def ensemble(model):
    many = {n: torch.stack([t, 1.1 * t]) for n, t in _given(model).items()}
    return torch.func.vmap(_loss(model))(many)


def jvp(model):
    given = _given(model)
    return torch.func.jvp(_loss(model), (given,), ({n: torch.ones_like(t) for n, t in given.items()},))


def hessian_vector(model):
    loss, x = _of_embeddings(model)
    return torch.func.jvp(torch.func.grad(loss), (x,), (torch.ones_like(x),))


def forward_mode(model):
    loss, x = _of_embeddings(model)
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)))))


TRANSFORMS = [grad, grad_and_logits, vjp, per_sample_gradients, ensemble, jvp, hessian_vector, forward_mode]


@pytest.mark.parametrize("run", TRANSFORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_see_the_models_own_forward(family, run):
    # the loop over experts asks which have tokens, which vmap cannot; grouped products have no forward-mode AD
    batched = run in (per_sample_gradients, ensemble)
    found, wanted = both(family, run, "grouped_mm" if batched else "eager")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_report_says_so_once():
    model = copy.deepcopy(_optimized("qwen3_moe"))
    report = moefx.report(model)
    report._warned.clear()
    report.fallbacks.clear()
    with pytest.warns(ShortfallWarning, match="graph of the model in this call: torch.func or forward-mode AD") as said:
        for _ in range(3):
            grad(model)
    assert len(said) == 1
    assert [(path, n) for (path, _), n in report.fallbacks.items()] == [("the model", 3)]
    assert "ran the original forward 3 times: the model: torch.func" in str(report)


def test_what_only_graphs_do_is_not_left_out():
    model = moefx.optimize(build("qwen3_moe"), compile=False, router_z_loss=0.5)
    with pytest.raises(MoefxError, match=r"torch.func see .* router_z_loss.* moefx.restore\(model\) first"):
        grad(model)


# --- without transforms: the graphs run ---


def other_parameters(model):
    given = {n: (1.1 * t).requires_grad_() for n, t in _given(model).items()}
    out = functional_call(model, given, (), batch(2, 5))
    read_later = out.logits.logsumexp(-1).mean()  # the model has its own parameters again
    return out.loss, torch.autograd.grad(out.loss + read_later, list(given.values()), allow_unused=True)


def jacobian(model):
    return torch.autograd.functional.jacobian(*_of_embeddings(model))


def vectorized_jacobian(model):
    loss, x = _of_embeddings(model)
    return torch.autograd.functional.jacobian(lambda x: torch.stack([loss(x), 2 * loss(x)]), x, vectorize=True)


def vjp_of_autograd(model):
    return torch.autograd.functional.vjp(*_of_embeddings(model))


def gradients(model):
    given = [p for n, p in model.named_parameters() if "layers.0" in n]
    return torch.autograd.grad(model(**batch(2, 5)).loss, given)


@pytest.mark.parametrize("run", [other_parameters, jacobian, vectorized_jacobian, vjp_of_autograd, gradients])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_derivatives_by_autograd(family, run):
    found, wanted = both(family, run)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("trained", ["", "lm_head", "model.norm", "self_attn.o_proj", "experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_are_refused(family, trained):
    """Those of the fused loss would lack terms, without a word of autograd."""
    model = copy.deepcopy(_optimized(family))
    given = [p for n, p in model.named_parameters() if trained in n]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in given))
    loss = model(**batch(2, 5)).loss
    with pytest.raises(MoefxError, match=r"create_graph=True.*call moefx.restore\(model\) before"):
        loss.backward(create_graph=True)
    moefx.restore(model)
    loss = model(**batch(2, 5)).loss
    first = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True)
    sum(g.pow(2).sum() for g in first if g is not None).backward()
    assert any(p.grad.any() for p in given if p.grad is not None)


def test_second_derivatives_of_compiled_graphs_are_refused():
    model = moefx.optimize(build("qwen3_moe", num_hidden_layers=1), compile="aot_eager")
    with pytest.raises(RuntimeError, match="create_graph|double backward"):
        first = torch.autograd.grad(model(**batch(2, 5)).loss, list(model.parameters()), create_graph=True)
        sum(g.pow(2).sum() for g in first).backward()
