"""Packed sequences, delimited by position ids that restart: each attends to itself only, as in Transformers."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

import moefx
from moefx.frontend.record import _packs_beside_cache
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.auto import auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("cached_captures")

PARTS = (15, 1, 24)


def packed():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (1, sum(PARTS)), generator=g)
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in PARTS])[None], "labels": ids}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gemma4_text"])
def test_a_packed_row_is_its_sequences(name):
    model = build(name)
    plain, given = copy.deepcopy(model), packed()
    moefx.optimize(model, compile=False)
    with torch.no_grad():
        alone = [plain(input_ids=t, use_cache=False).logits for t in given["input_ids"].split(PARTS, dim=1)]
    out = model(**given, use_cache=False)
    torch.testing.assert_close(out.logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    wanted = plain(**given, use_cache=False)  # with a cache Transformers does not look for packing
    torch.testing.assert_close(out.loss, wanted.loss)
    out.loss.backward()
    wanted.loss.backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda said, n=n: f"{n}: {said}")
    assert not moefx.report(model).fallbacks
    functions = moefx.report(model).program.functions.values()
    called = {n for f in functions for n in f.graph.nodes if n.meta.get("semantic", n.target) is moefx.ops.attention}
    masks = {None if n.args[3] is None else n.args[3].meta["val"] for n in called}
    # where sequences begin, and no mask of all pairs anywhere
    assert {None if m is None else (m.dtype, m.dim()) for m in masks} == {None, (torch.int32, 2)}
    assert not [
        n
        for f in functions
        for n in f.graph.nodes
        if isinstance(v := n.meta.get("val"), torch.Tensor) and v.dtype == torch.bool and v.dim() == 4
    ]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gemma4_text", "nemotron_h"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_with_a_cache_nothing_is_kept_apart(name, recomputed):
    """As in Transformers, whose default is a cache, which most models leave out where activations are checkpointed."""
    model, cacheless = build(name), recomputed and name != "nemotron_h"
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, given = copy.deepcopy(model), packed()
    moefx.optimize(model, compile=False)
    with pytest.warns(UserWarning, match="pass use_cache=False") if not cacheless else contextlib.nullcontext():
        found = model(**given).loss
    torch.testing.assert_close(found, plain(**given).loss)
    assert torch.allclose(found, plain(**given, use_cache=False).loss) == cacheless
    assert not moefx.report(model).fallbacks


def test_a_model_that_makes_its_masks_before_its_cache_keeps_rows_apart():
    """Gemma 4's class with images: with a cache, too."""
    torch.manual_seed(0)
    config = tiny_config("gemma4")
    plain = auto_class(config).from_config(config).train()
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    found, wanted = (m(**packed()).loss for m in (model, plain))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, plain(**packed(), use_cache=False).loss)


def test_where_nobody_knows_the_model_runs_as_it_is():
    """A model that breaks off when it is asked: nothing is taken for granted, and the report says what its blocks met."""

    class Breaks(torch.nn.Module):
        def forward(self, **_):
            raise ValueError("no positions here")

    assert _packs_beside_cache(Breaks(), torch.zeros(1, 3)) is None
    plain = build("qwen3_moe")
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    assert model._moefx.program.packs_beside_cache is False
    model._moefx.program.packs_beside_cache = None
    with pytest.warns(moefx.ShortfallWarning, match="Cache"):
        torch.testing.assert_close(model(**packed()).loss, plain(**packed()).loss)
    assert not torch.allclose(plain(**packed()).loss, plain(**packed(), use_cache=False).loss)


def test_a_mask_that_says_more_than_packing_stays_one():
    """Padding besides: as before, a boolean mask of all pairs."""
    model = build("qwen3_moe")
    plain, given = copy.deepcopy(model), packed() | {"attention_mask": (torch.arange(sum(PARTS)) < sum(PARTS) - 2)[None].long()}
    moefx.optimize(model, compile=False)
    kept = given["attention_mask"].bool()
    found, wanted = (m(**given, use_cache=False).logits[kept] for m in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_mask_of_the_users_own_stays_one():
    """Whatever it is made of: functions, or objects that can be called."""
    sequence = torch.tensor([[0, 0, 1, 1, 1]])
    both = masking_utils.and_masks(masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(sequence))
    how = {"batch_size": 1, "q_length": 5, "kv_length": 5, "device": torch.device("cpu")}
    said = hf.pattern_of(hf.attention_mask(sdpa_mask, mask_function=both, allow_is_causal_skip=False, **how))
    assert said.starts.tolist() == [[0, 0, 2, 2, 2]] and said.window is None
    for other in (functools.partial(lambda n, b, h, q, k: q - k < n, 2), lambda b, h, q, k: q - k < 2):
        joined = masking_utils.and_masks(both, other)
        mask = hf.attention_mask(sdpa_mask, mask_function=joined, allow_is_causal_skip=False, use_vmap=True, **how)
        assert hf.pattern_of(mask) is None
        assert mask[0, 0].int().tolist() == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1],
        ]


def test_what_replays_take_for_packed_is_what_is():
    """A recorded step cannot look whether position ids begin anew: those that do not are one sequence."""
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    for positions in (packed()["position_ids"], torch.arange(sum(PARTS))[None], 7 + torch.arange(sum(PARTS)).expand(2, -1)):
        given = {"input_ids": packed()["input_ids"].expand(len(positions), -1), "position_ids": positions}
        with hf.packed():
            found = model(**given).logits
        torch.testing.assert_close(found, model(**given).logits, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_packed_go_on_as_before():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    given = packed()
    with_positions = model(input_ids=given["input_ids"], position_ids=torch.arange(sum(PARTS))[None]).logits
    torch.testing.assert_close(with_positions, model(input_ids=given["input_ids"]).logits)
    assert float((with_positions - model(**given).logits).detach().abs().max()) > 0.1
