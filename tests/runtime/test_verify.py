"""moefx.verify where few parameters, or none, require a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moefx
from tests.support.families import batch, build

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
pytestmark = pytest.mark.usefixtures("cached_captures")


def trained(family: str, chosen: Callable[[str], bool]) -> Any:
    model = moefx.optimize(build(family), compile=False)
    for name, p in model.named_parameters():
        p.requires_grad_(chosen(name))
    return model


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_requires_a_gradient(family, labels):
    model = trained(family, lambda name: False)
    found = moefx.verify(model, batch(2, 9, labels=labels))
    assert found.ok and found.forward_only
    assert [r.name for r in found.rows] == (["loss", "logits"] if labels else ["logits"])
    assert "forward only: nothing that the loss depends on requires a gradient" in str(found)


def test_a_wrong_forward_is_found():
    model = trained("qwen3_moe", lambda name: False)
    plain = build("qwen3_moe").requires_grad_(False)
    plain.lm_head.weight.data[0] += 1
    found = moefx.runtime.verify.against(plain, model, batch(2, 9))
    assert found.forward_only and not found.ok and "WRONG" in str(found)


@pytest.mark.parametrize("part", ["lm_head", "gate.weight|router.weight", "norm.weight", "experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_part_is_trained(family, part):
    model = trained(family, lambda name: any(p in name for p in part.split("|")))
    found = moefx.verify(model, batch(2, 9))
    assert found.ok and not found.forward_only, str(found)
    wanted = {f"grad {n}" for n, p in model.named_parameters() if p.requires_grad}
    assert wanted and {r.name for r in found.rows} == {"loss", "logits"} | wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained(family):
    lora = LoraConfig(
        r=4, target_modules=["q_b_proj" if family == "deepseek_v3" else "q_proj", "o_proj"], init_lora_weights=False
    )
    model = moefx.optimize(get_peft_model(build(family), lora), compile=False)
    found = moefx.verify(model, batch(2, 9))
    assert found.ok and not found.forward_only, str(found)
    assert all("lora" in r.name for r in found.rows[2:]) and len(found.rows) > 4
    with model.disable_adapter():
        found = moefx.verify(model, batch(2, 9))
    assert found.ok and found.forward_only


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_in_other_modes(around):
    model = trained("qwen3_moe", lambda name: True)
    with around():
        found = moefx.verify(model, batch(2, 9))
    assert found.ok and not found.forward_only


def test_optimize_verifies_a_frozen_model():
    moefx.optimize(build("qwen3_moe").requires_grad_(False), compile=False, verify=True)
