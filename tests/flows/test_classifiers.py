"""Models without a language modeling head: sequence and token classifiers, reward models, base models."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import moefx
from moefx.integrations.transformers.auto import auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against
from tests.support.parity import distances_in_bf16, of_a_checkpoint
from tests.support.spawn import run

pytestmark = pytest.mark.usefixtures("cached_captures")

KINDS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def build(family, kind="sequence"):
    config = copy.deepcopy(tiny_config(family))
    config.pad_token_id, config.num_labels = 0, 3
    torch.manual_seed(0)
    return KINDS[kind].from_config(config).train()


def batch(kind, rows, length, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 250, (rows, length), generator=random)
    labels = torch.randint(0, 3, (rows,) if kind == "sequence" else (rows, length), generator=random)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_losses_and_all_gradients_are_the_models(family, kind):
    plain = build(family, kind)
    model = moefx.optimize(copy.deepcopy(plain), compile=False, strict=True)
    for shape in ((1, 1), (2, 13), (1, 70)):
        against(plain, model, batch(kind, *shape)).raise_if_wrong()
    ids = batch(kind, 2, 13)["input_ids"]
    padded = {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([11, 12]), 0), **batch(kind, 2, 13)}
    against(plain, model, padded).raise_if_wrong()
    assert not moefx.report(model).fallbacks


def test_bf16():
    ours, own = distances_in_bf16(build("qwen3_moe"), batch("sequence", 4, 21), strict=True)
    assert ours <= 1.5 * own, (ours, own)


def test_a_bare_model():
    torch.manual_seed(0)
    plain = AutoModel.from_config(copy.deepcopy(tiny_config("qwen3_moe"))).train()
    model = moefx.optimize(copy.deepcopy(plain), compile=False, strict=True)
    states = []
    for m in (plain, model):
        states.append(m(batch("token", 2, 9)["input_ids"], use_cache=False).last_hidden_state)
        states[-1].pow(3).mean().backward()
    torch.testing.assert_close(*states)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-7, msg=name)


def over_ranks(rank, world, folder):
    batches = [batch("sequence", 2, 9 + r, seed=r) for r in range(world)]
    return of_a_checkpoint(rank, world, folder, AutoModelForSequenceClassification, batches)


def test_a_reward_model_over_ranks(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    assert run(over_ranks, 2, str(tmp_path)) == [[], []]


def test_the_class_that_a_configuration_names():
    config = AutoConfig.for_model("qwen3_moe")
    for named, wanted in (
        (None, AutoModelForCausalLM),
        ("Qwen3MoeForCausalLM", AutoModelForCausalLM),
        ("Qwen3MoeForSequenceClassification", AutoModelForSequenceClassification),
        ("Qwen3MoeForTokenClassification", AutoModelForTokenClassification),
        ("SomebodysOwn", AutoModelForCausalLM),
    ):
        config.architectures = [named] if named else None
        assert auto_class(config) is wanted
