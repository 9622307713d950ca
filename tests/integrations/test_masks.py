"""Attention masks: a causal sliding window becomes an argument of the operation, other masks stay tensors."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import masking_utils

import moefx
from moefx import ops
from moefx.backends import resolve
from moefx.backends.torch import refuses_flash
from moefx.integrations import transformers as hf
from moefx.ir.graph import arguments
from tests.support.families import batch, build


def mask(function, length=6, local_size=4, **kwargs):
    given = {"batch_size": 1, "q_length": length, "kv_length": length, "local_size": local_size, "device": "cpu", **kwargs}
    return hf.attention_mask(masking_utils.sdpa_mask, mask_function=function, **given)


def window_of(found):
    said = hf.pattern_of(found)
    return None if said is None or said.starts is not None else said.window


def test_a_sliding_window_is_noted():
    found = mask(masking_utils.sliding_window_causal_mask_function(4))
    assert window_of(found) == 4
    distance = torch.arange(6)[:, None] - torch.arange(6)
    assert torch.equal(found[0, 0], (distance >= 0) & (distance < 4))
    assert window_of(mask(masking_utils.sliding_window_causal_mask_function(4), length=3)) == 4


@pytest.mark.parametrize("what", ["chunks", "padding", "packing", "more queries than keys"])
def test_other_masks_are_not(what):
    window = masking_utils.sliding_window_causal_mask_function(4)
    if what == "chunks":
        found = mask(masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)))
    elif what == "padding":
        found = mask(window, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]], dtype=torch.bool))
    elif what == "packing":
        packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1, 1]]))
        found = mask(masking_utils.and_masks(window, packed))
    else:
        found = mask(window, q_length=1, kv_length=6, q_offset=5)
    assert found is not None and window_of(found) is None


def test_the_captured_block_knows_its_window_and_needs_no_mask():
    model = build("gpt_oss")
    calls = [arguments(n) for f in moefx.capture(model) for n in f.graph.nodes if n.target is ops.attention]
    assert [c["window"] for c in calls] == [8, None] and [c["mask"] for c in calls] == [None, None]
    moefx.optimize(model, compile=False, strict=True)
    for length in (5, 8, 9, 20):  # shorter than the window, as long, longer
        assert moefx.verify(model, batch(2, length)).ok
    functions = {id(f) for p in ("model.layers.0", "model.layers.1") for f in model.get_submodule(p)._moefx_forward.functions}
    assert len(functions) == 2, "lengths around the window are not kinds of calls"


def test_sinks_need_a_cuda_device_in_16_bits():
    q = torch.empty(1, 2, 3, 8)
    assert "float32 on cpu" in refuses_flash(q, q, 0.0)
    program = moefx.capture(build("gpt_oss"))
    moefx.rewrite(program, moefx.Plan(resolve("torch")), moefx.passes.default())
    notes = [n.meta["moefx"] for f in program for n in f.graph.nodes if n.meta.get("semantic") is ops.attention]
    assert [n.kernel for n in notes] == ["reference", "reference"] and all("float32 on cpu" in n.why for n in notes)


@pytest.mark.parametrize("when", ["before", "after", "a partial", "a patched forward"])
def test_code_on_a_layer_sees_the_masks_of_transformers(when):
    """SDPA attention is called without a mask if the sequence is shorter than its window."""
    seen = []

    def look(kwargs):
        mask = kwargs["attention_mask"]
        seen.append(None if mask is None else mask.clone())

    def hook(module, args, kwargs):
        look(kwargs)

    def watched(model):
        layer = model.get_submodule("model.layers.0")
        if when == "a patched forward":
            own = layer.forward
            layer.forward = lambda *args, **kwargs: (look(kwargs), own(*args, **kwargs))[1]
        else:
            layer.register_forward_pre_hook(functools.partial(hook) if when == "a partial" else hook, with_kwargs=True)

    def run(model):
        seen.clear()
        for length in (1, 5, 9, 5):
            model(**batch(2, length))
        return list(seen)

    wanted_model, model = build("gemma4_text"), build("gemma4_text")
    watched(wanted_model)
    if when == "before":
        watched(model)
    moefx.optimize(model, compile=False)
    if when != "before":
        watched(model)
    wanted, found = run(wanted_model), run(model)
    assert [w is None for w in wanted] == [f is None for f in found] == [True, True, False, True]
    assert torch.equal(wanted[2], found[2])
