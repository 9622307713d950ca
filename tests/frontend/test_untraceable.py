"""Why a module is not captured: one sentence with its own arguments and lines; PyTorch's message is kept as a detail."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import flatten
from moefx.frontend.export import capture_module
from tests.support.families import batch, build


class Block(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.weight, self.compute = nn.Parameter(torch.ones(8)), compute

    def forward(self, x, other=None):
        return self.compute(x * self.weight)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda x: x.view(3, -1), "its graph would hold for one value only of the batch size (dimension 0 of input)"),
        (lambda x: x + torch.ones(x.shape[0], 17, 8), "one value only of the sequence length (dimension 1 of input)"),
        (
            lambda x: x if x.sum() > 0 else -x,
            "depends on values of its tensors, not only on their sizes (data-dependent) at test_untr",
        ),
        (lambda x: x + torch.ones(7, 8), "sizes do not fit together at test_untraceable.py:"),
        (lambda x: x.no_such_method(), "torch.export cannot follow it at test_untraceable.py:"),
    ],
)
def test_one_sentence(compute, reason):
    tensors, template = flatten((torch.randn(2, 9, 8),), {})
    with pytest.raises(CaptureError) as error:
        capture_module(Block(compute), Call.of(tensors, template, True, {8}), {}, "block")
    said = str(error.value)
    assert (
        reason in said
        and "\n" not in said
        and "Error" not in said.removesuffix("(AttributeError)")
        and "TORCH_LOGS" not in said
    )
    assert "called with input [B, S, 8]" in said or "fit" not in reason
    assert error.value.detail


def test_a_head_that_is_not_captured_says_how_many_logits_are_stored():
    """A loss of the user's own that knows one batch size only."""
    model = build("qwen3_moe", num_hidden_layers=1)
    plain = model.loss_function

    def loss(logits, labels, vocab_size, first=None, **options):
        if first is not None:
            logits = logits.view(3, -1, vocab_size)
        return plain(logits, labels, vocab_size, **options)

    model.loss_function = loss
    model = moefx.optimize(model, compile=False)
    model(**batch(3, 32))
    assert not moefx.report(model).fallbacks
    with pytest.warns(ShortfallWarning) as said:
        model(**batch(3, 1024 // 3 * 3), first=True).loss.backward()
    (text,) = [str(w.message) for w in said if "lm_head" in str(w.message)]
    assert "without its graph of lm_head in this call: its graph would hold for one value only of the batch size" in text
    assert text.endswith("it runs in plain PyTorch, which stores all logits: 0.0029 GiB in fp32")
    fallback = next(f for f in moefx.report(model).to_dict()["fallbacks"] if f["path"] == "lm_head")
    assert "Error" in fallback["detail"] and "Error" not in fallback["reason"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortfallWarning)  # once a reason, however long the batch
        model(**batch(3, 64), first=True)
