"""Families whose experts are Python loops of their own: captured as moefx.experts, against the original models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefx
from moefx import ops
from moefx.integrations.transformers import loop_experts as loops
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.ir.graph import is_call
from moefx.runtime.verify import against
from tests.support.parity import distances_in_bf16

pytestmark = pytest.mark.usefixtures("cached_captures")

FAMILIES = {"dbrx": "DbrxExperts", "longcat_flash": "LongcatFlashExperts", "jetmoe": "JetMoeMoE"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    config = tiny_config(request.param)
    if request.param == "longcat_flash":
        config.num_layers, config.num_hidden_layers = 1, 2  # a layer has two attentions; both numbers are in the configuration
    plain = AutoModelForCausalLM.from_config(config).train()
    return request.param, plain, moefx.optimize(copy.deepcopy(plain), compile=False)


def batch(model, rows, length, seed=0):
    ids = torch.randint(1, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 13), (1, 70)])
def test_losses_and_all_gradients_are_the_models(family, rows, length):
    _, plain, model = family
    against(plain, model, batch(plain, rows, length, seed=rows)).raise_if_wrong()
    assert not moefx.report(model).fallbacks


def test_bf16(family):
    name, plain, _ = family
    ours, own = distances_in_bf16(plain, batch(plain, 2, 13))
    assert ours <= 1.5 * own, (name, ours, own)


def test_router_logits_and_the_auxiliary_loss_are_the_models(family):
    _, plain, model = family
    own, ours = (m(**batch(plain, 2, 9), output_router_logits=True) for m in (plain, model))
    torch.testing.assert_close(ours.router_logits, own.router_logits)
    torch.testing.assert_close(ours.loss, own.loss)
    assert (ours.get("aux_loss") is None) == (own.get("aux_loss") is None)
    if own.get("aux_loss") is not None:
        torch.testing.assert_close(ours.aux_loss, own.aux_loss)


def test_recomputation_and_autocast(family):
    """Under autocast Transformers' own loop of DBRX adds bf16 to float32, which index_add_ refuses: float32 is the measure."""
    _, plain, _ = family
    model = moefx.optimize(copy.deepcopy(plain), compile="aot_eager")  # Inductor takes a minute for each
    found = []
    for m, on in ((plain, False), (model, False), (model, True)):
        m.zero_grad()
        if m.supports_gradient_checkpointing:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss = m(**batch(plain, 2, 13)).loss
        loss.backward()
        if m.supports_gradient_checkpointing:
            m.gradient_checkpointing_disable()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])))
    assert not moefx.report(model).fallbacks
    (exact, wanted), *others = found
    for (loss, gradient), near in zip(others, ((1e-6, 1e-4), (5e-3, 0.3)), strict=True):
        assert loss == pytest.approx(exact, rel=near[0])
        assert float((gradient - wanted).norm() / wanted.norm()) < near[1]


def test_experts_are_operations_and_nothing_promised_is_missing(family):
    name, plain, _ = family
    report = moefx.report(moefx.optimize(copy.deepcopy(plain), compile=False))
    many = sum(type(m).__name__ == FAMILIES[name] for m in plain.modules())
    found = sum(len(f.instances) for f in report.program for n in f.graph.nodes if n.meta.get("semantic") is ops.experts)
    assert found == many > 0 and report.shortfall() == []


def test_choices_of_experts_that_compute_nothing_take_no_products():
    """LongCat-Flash: its twelve experts are eight and four that give their token back."""
    model = moefx.optimize(
        AutoModelForCausalLM.from_config(tiny_config("longcat_flash")), compile=False, backends=["reference"]
    )
    (call,) = {
        n for f in moefx.report(model).program for n in f.graph.nodes if is_call(n) and n.meta.get("semantic") is ops.experts
    }
    up, down = (call.args[i].meta["val"].shape[0] for i in (3, 5))
    assert (up, down) == (12, 8)


def test_a_model_comes_back_and_others_are_left_alone(family):
    _, plain, _ = family
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    moefx.restore(model)
    assert all(type(m) is type(p) for m, p in zip(model.modules(), plain.modules(), strict=True))
    assert all(not loops.is_loop(m) for m in torch.nn.Sequential(torch.nn.Linear(2, 2)).modules())


def test_generation_runs_the_models_own_loop(family):
    _, plain, model = family
    ids = batch(plain, 2, 5)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = [m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (plain, model)]
    plain.train(), model.train()
    assert torch.equal(*texts)


def test_they_are_not_cut_over_ranks(family):
    _, plain, _ = family
    from moefx.distributed.expert_sharding import check_experts

    with pytest.raises(moefx.MoefxError, match="ep_size=2, but .* cannot be sharded across ranks: use ep_size=1"):
        check_experts(plain, 2)


def test_an_activation_that_is_unknown_leaves_the_loop():
    plain = AutoModelForCausalLM.from_config(tiny_config("dbrx")).train()
    for module in plain.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = torch.nn.Hardswish()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = moefx.optimize(copy.deepcopy(plain), compile=False)
    reasons = " ".join(x.reason for x in moefx.report(model).not_captured)
    assert "DbrxExperts: Gated._apply_gate is none of the activations" in reasons
    against(plain, model, batch(plain, 2, 7)).raise_if_wrong()
