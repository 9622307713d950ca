"""PEFT adapters in captured blocks: the same loss and gradients as without moefx, also when adapters are switched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import moefx
from tests.support.families import batch, build
from tests.support.parity import assert_same_step

pytestmark = pytest.mark.usefixtures("cached_captures")

peft = pytest.importorskip("peft")


def adapted(family: str, optimize: bool, **options: Any) -> Any:
    model = peft.get_peft_model(build(family), peft.LoraConfig(r=4, lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return (moefx.optimize(model, compile=False, strict=True) if optimize else model).train()


ROUTER = ["gate.weight", "router.weight"]
CASES = {
    "all-linear": ("qwen3_moe", {"target_modules": "all-linear"}),
    "gate": ("deepseek_v3", {"target_modules": ["q_b_proj", "gate"]}),
    "router and experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": [*ROUTER, "gate_up_proj"]}),
    "experts on every token": ("llama4_text", {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "a router saved whole": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapted_parameters_are_captured(case):
    family, options = CASES[case]
    model = adapted(family, True, **options)
    assert_same_step(model, adapted(family, False, **options))
    assert not moefx.report(model).fallbacks


def test_adapted_layers_share_one_graph():
    options = {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    program = adapted("qwen3_moe", True, **options).get_base_model()._moefx.program
    assert ["model.layers.0", "model.layers.1"] in [f.instances for f in program]


def test_adapters_that_are_switched():
    """A graph holds the update of one state: off (DPO's reference), another adapter, merged, scaled."""
    options = {"target_modules": ["q_proj", "gate"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    losses: list[list[float]] = []
    for optimize in (False, True):
        model = adapted("qwen3_moe", False, **options)
        torch.manual_seed(3)
        model.add_adapter("second", peft.LoraConfig(r=4, init_lora_weights=False, **options))
        if optimize:
            moefx.optimize(model, compile=False)
        found: list[float] = []

        def look(model: Any = model, found: list[float] = found) -> None:
            with torch.no_grad():
                found.append(float(model(**batch(2, 9)).loss))

        look()
        with model.disable_adapter():
            look()
        model.set_adapter("second")
        look()
        model.merge_adapter()
        look()
        with model.disable_adapter():  # takes them out of the weights in the forward
            look()
        look()
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(2.0)
        look()
        losses.append(found)
    plain, ours = losses
    assert ours == pytest.approx(plain, abs=2e-5)
    assert len({round(x, 4) for x in plain}) >= 4  # they differ, so that a mistake shows


def test_layers_that_differ_in_scaling_alone():
    options = {"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}
    assert_same_step(adapted("qwen3_moe", True, **options), adapted("qwen3_moe", False, **options))


def test_restore_gives_peft_its_classes_back():
    model = adapted("qwen3_moe", True, target_modules=["q_proj"])
    moefx.restore(model)
    assert type(model) is peft.PeftModel and type(model.base_model) is peft.LoraModel


@pytest.mark.parametrize("reference_first", [True, False])
def test_kl_to_the_disabled_adapters(reference_first):
    """Issue: the reference had the adapters in it, so that KL was 0; or, if it came first, nothing required a gradient."""
    found = []
    for optimize in (False, True):
        model = adapted("qwen3_moe", optimize, target_modules=["q_proj", "v_proj"])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
        given, kls = {"input_ids": batch(2, 9)["input_ids"], "use_cache": False}, []

        def reference(model: Any = model, given: Any = given) -> torch.Tensor:
            with torch.no_grad(), model.disable_adapter():
                return model(**given).logits.log_softmax(-1)

        for _ in range(4):
            wanted = reference() if reference_first else None
            logits = model(**given).logits.log_softmax(-1)
            wanted = reference() if wanted is None else wanted
            kl = torch.nn.functional.kl_div(logits, wanted, log_target=True, reduction="batchmean")
            (kl + model(**batch(2, 9)).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            kls.append(float(kl))
        found.append(kls)
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-6)
    assert found[0][-1] > found[0][0] > 1e-3


def test_a_copy_of_adapters_added_later_is_whole():
    """PEFT's wrappers pass what they lack, ``__deepcopy__`` too, on to the optimized model inside."""
    model = peft.get_peft_model(
        moefx.optimize(build("qwen3_moe"), compile=False), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    for wrapper in (model, model.base_model):
        copied = copy.deepcopy(wrapper)
        assert type(copied) is type(wrapper)
        assert [n for n, _ in copied.named_parameters()] == [n for n, _ in wrapper.named_parameters()]
    assert type(copy.copy(model)) is type(model)
    assert_same_step(copy.deepcopy(model), model)
