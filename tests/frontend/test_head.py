"""Logits that are scaled or capped before the loss: the head is still one operation, and logits can be read."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefx
from moefx import ops
from moefx.frontend.lazy_logits import LazyLogits
from moefx.integrations.transformers.tiny_config import tiny_config

MODELS = {"granitemoe": {"logits_scaling": 6.0}, "cohere2_moe": {"logit_scale": 0.3}, "beam": {"final_logit_softcapping": 0.5}}


def build(name):
    torch.manual_seed(0)
    config = tiny_config(name)
    for key, number in MODELS[name].items():
        assert hasattr(config, key)
        setattr(config, key, number)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_gradients_and_logits(name, dtype):
    model = moefx.optimize(build(name).to(dtype), compile=False)
    (node,) = [
        n
        for n in moefx.report(model).program["head"].graph.nodes
        if n.meta.get("semantic", n.target) is ops.linear_cross_entropy
    ]
    key, number = next(iter(MODELS[name].items()))
    assert node.kwargs["softcap" if "cap" in key else "scale"] == (1 / number if key == "logits_scaling" else number)
    ids = torch.randint(0, 200, (2, 11))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    # logits may be float32 where all before them is bfloat16: Beam's experts round once more than the model does
    tolerance = 5e-2 if dtype == torch.bfloat16 else None
    result = moefx.verify(model, {"input_ids": ids, "labels": labels}, tolerance=tolerance)
    assert result.ok, str(result)
    assert moefx.verify(model, {"input_ids": ids, "labels": labels, "num_items_in_batch": 17}, tolerance=tolerance).ok
    assert not moefx.report(model).fallbacks
    found = model(input_ids=ids, labels=labels)
    assert isinstance(found.logits, LazyLogits) and found.logits.logits is None  # the loss did without
    moefx.restore(model)
    torch.testing.assert_close(
        found.logits + 0,
        model(input_ids=ids).logits,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )
