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


def lazy(dtype=torch.float32):
    hidden, weight = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True), torch.randn(5, 4, dtype=dtype)
    return LazyLogits(hidden, lambda h: h @ weight.T, 5, dtype), hidden @ weight.T


@pytest.mark.parametrize(
    "form",
    [lambda x: x * 2.5, lambda x: 2 * x, lambda x: x / 3, lambda x: torch.div(x, 3.0), lambda x: x.tanh(), lambda x: torch.mul(x, 2),
     lambda x: torch.tanh(x.float() / 30.0).mul(30.0), lambda x: (x * 0.5).to(torch.float64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_taken_later(form, dtype):
    logits, wanted = lazy(dtype)
    logits, wanted = form(logits), form(wanted)
    assert isinstance(logits, LazyLogits) and logits.logits is None
    assert logits.dtype == wanted.dtype and logits.shape == wanted.shape
    assert torch.equal(logits.detach(), wanted)


@pytest.mark.parametrize(
    "form",
    [lambda x: 2 / x, lambda x: x * torch.tensor(2.0), lambda x: x + 1, lambda x: torch.div(x, 2.0, rounding_mode="floor"), lambda x: x.mul_(2.0)],
)  # fmt: skip
def test_other_steps_read_the_logits(form):
    logits, wanted = lazy()
    found = form(logits)
    assert not isinstance(found, LazyLogits)
    torch.testing.assert_close(found, form(wanted))
