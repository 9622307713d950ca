"""Dictionaries that a model passes from layer to layer: what a captured layer may write to one."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

import moefx
from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import flatten
from moefx.frontend.export import capture_module
from tests.support.families import batch, build

KINDS = ["sliding_attention", "full_attention"]


class Notes(UserDict):
    """As Transformers' KVSharingDict is one."""


class Uses(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, notes):
        self.how(notes, x * 2)
        return x + 1


def capture(how, notes):
    x = torch.randn(3, 17, 8)
    tensors, template = flatten((x,), {"notes": notes})
    return capture_module(Uses(how), Call.of(tensors, template, True), {}, "uses")


def test_layers_share_their_keys_and_values():
    """Gemma 4 with a mixture of experts: two layers leave theirs for the last two, which look for them and stay Python."""
    layers = {"num_hidden_layers": 5, "layer_types": [KINDS[0], *KINDS * 2], "num_kv_shared_layers": 2}
    model = build("gemma4_text", **layers, hidden_size_per_layer_input=16, vocab_size_per_layer_input=256)
    moefx.optimize(model, compile=False)
    program = moefx.report(model).program
    served = {i for f in program for i in f.instances}
    assert {f"model.layers.{i}" for i in range(3)} <= served and not {"model.layers.3", "model.layers.4"} & served
    for i in (3, 4):  # what they have is captured in parts
        assert f"model.layers.{i}.experts" in served
    assert any("it reads its argument shared_kv_states, a KVSharingDict" in x.reason for x in program.not_captured)
    for rows, length in ((1, 1), (2, 13)):
        assert moefx.verify(model, batch(rows, length)).ok
    kept = model.model(**batch(2, 13, labels=False), return_shared_kv_states=True).shared_kv_states
    moefx.restore(model)
    wanted = model.model(**batch(2, 13, labels=False), return_shared_kv_states=True).shared_kv_states
    assert set(kept) == set(wanted) == set(KINDS)
    for kind in KINDS:
        for found, plain in zip(kept[kind], wanted[kind], strict=True):
            torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("how", [
    lambda notes, x: notes["a"], lambda notes, x: notes.get("a"), lambda notes, x: "a" in notes, lambda notes, x: len(notes),
    lambda notes, x: list(notes), lambda notes, x: notes == {}, lambda notes, x: notes.data, lambda notes, x: notes.update(a=x),
    lambda notes, x: bool(notes), lambda notes, x: notes.pop("a", None),
])  # fmt: skip
def test_looking_into_a_dictionary_is_refused(how):
    with pytest.raises(CaptureError, match="it reads its argument notes, a Notes"):
        capture(how, Notes())


def test_what_is_left_in_a_dictionary_is_an_output():
    function = capture(lambda notes, x: notes.__setitem__("a", (x, 3)), Notes(b=1))
    ((argument, template),) = function.call.written
    assert argument == "notes" and template.fill(("out", "left")) == (("a", ("left", 3)),)
    x = torch.randn(2, 5, 8)
    assert all(torch.equal(a, b) for a, b in zip(function.graph_module(x), (x + 1, x * 2), strict=True))


@pytest.mark.parametrize("notes", [{}, {"a": None}, {"a": 3}])
def test_writing_into_a_plain_dictionary_is_refused(notes):
    """A graph would leave it as it was."""
    with pytest.raises(CaptureError, match="it writes into a dictionary or list that it is given"):
        capture(lambda notes, x: notes.__setitem__("a", x), notes)
