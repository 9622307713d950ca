"""Sparse attention to keys that an indexer chose (DeepSeek-V3.2, GLM-5 and others), against the original models.

These ask for the attention implementation by name."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefx
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against
from tests.support.families import batch

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.fixture(scope="module", params=["deepseek_v32", "hy_v4"])  # hy_v4: with sinks, and indices that layers share
def pair(request):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(request.param)).train()
    return plain, moefx.optimize(copy.deepcopy(plain), compile=False, strict=True)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 5), (1, 8), (3, 9), (2, 40)])  # the indexer takes 8
def test_all_gradients_are_the_untouched_models(pair, rows, length):
    plain, model = pair
    assert plain.config.index_topk == 8
    result = against(plain, model, batch(rows, length))
    assert result.ok, str(result)
    assert moefx.report(model).fallbacks == {}


def test_masked_tokens(pair):
    """Padding on the left, and keys to choose from that are fewer than the indexer takes."""
    plain, model = pair
    given = batch(2, 20)
    given["attention_mask"] = (torch.arange(20) >= torch.tensor([[0], [13]])).long()
    given["labels"] = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    result = against(plain, model, given)
    assert result.ok, str(result)


def test_generation_chooses_the_same_tokens(pair):
    """With a cache blocks run in Python, where attention gets the indices."""
    prompt = batch(2, 12, labels=False)["input_ids"]
    found = []
    for model in pair:
        found.append(model.eval().generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0))
        model.train()
    assert torch.equal(*found)
