"""An optimized model with PyTorch's tools: compiled for any length, copied, wrapped."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import moefx
from tests.support.families import batch, build


def test_compiled_once_for_all_lengths():
    """Compiled functions agree with the original; after the second shape nothing is compiled again.

    A batch of one is compiled apart: Dynamo takes sizes of 1 for constants.
    """
    torch._dynamo.reset()
    model = moefx.optimize(build("qwen3_moe"), compile="aot_eager", strict=True)
    for step, shape in enumerate(((2, 9), (3, 14), (4, 5))):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            result = moefx.verify(model, batch(*shape, seed=step))
        assert result.ok, f"{shape}: {result}"
    assert not moefx.report(model).fallbacks


def test_compiled_by_inductor():
    """Code that Inductor made for any length, forward and backward, on lengths that no vector width divides; one code for both
    layers. (Code for the first length only, as a model gets it at first: examples/quickstart.py, in test_examples.)"""
    torch._dynamo.reset()
    model = moefx.optimize(build("qwen3_moe"), strict=True)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        for shape in ((2, 9), (3, 13)):
            result = moefx.verify(model, batch(*shape))
            assert result.ok, str(result)
    assert len(model._moefx.compiled) == len(list(moefx.report(model).program))


def test_another_number_of_items_each_step_is_the_same_call():
    """A plain loop counts its labels: an int, which Transformers hands to every block."""
    model, plain = moefx.optimize(build("qwen3_moe"), compile=False, strict=True), build("qwen3_moe")
    known = []
    for items in (5, 7, 11.0):
        loss, wanted = (m(**batch(2, 9), num_items_in_batch=items).loss for m in (model, plain))
        torch.testing.assert_close(loss, wanted)
        known.append(len(list(moefx.report(model).program)))
    assert known[0] == known[1] and not moefx.report(model).fallbacks  # a float is another kind


def test_a_copy_trains_on_its_own_parameters():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    fresh = build("qwen3_moe")
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(0.5)
    loss, wanted = other(**batch(2, 9)).loss, fresh(**batch(2, 9)).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    assert all(p.grad is None for p in model.parameters())
    for p, w in zip(other.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, w.grad, rtol=1e-3, atol=1e-6)
    moefx.restore(other)
    assert moefx.verify(model, batch(2, 9)).ok  # the first is still optimized


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}


@pytest.mark.parametrize(("train", "checkpointed", "kind"), [
    (True, False, {}), (True, True, {}), (True, False, {"labels": None}), (True, False, {"num_items_in_batch": 5}),
    (True, False, PACKED), (False, False, {}),
])  # fmt: skip
def test_nothing_of_a_step_outlives_it(train, checkpointed, kind, cached_captures):
    """Without the collector, which comes when many objects are there, and knows nothing of how large they are."""
    model = moefx.optimize(build("qwen3_moe"), compile=False, router_z_loss=0.1).train(train)
    for module in (model.model.layers[0], model.model.norm):
        module.register_forward_hook(lambda *call: seen.extend(map(weakref.ref, (call[1][0], call[2]))))
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    given = {k: v for k, v in {**batch(2, 9), "use_cache": False, **kind}.items() if v is not None}
    for last in (False, True):
        seen = []
        gc.collect()
        gc.disable()
        try:
            out = model(**given)
            (out.logits.sum() if out.loss is None else out.loss).backward()
            model.zero_grad()
            del out
            alive = [r for r in seen if r() is not None]
        finally:
            gc.enable()
        assert seen and not (last and alive)  # the first call may be one that is captured
    assert not moefx.report(model).fallbacks


def test_embeddings_are_resized_between_steps():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    gc.disable()
    try:
        model(**batch(2, 9)).loss.backward()
        model.zero_grad()
        model.resize_token_embeddings(300)
    finally:
        gc.enable()
    assert moefx.verify(model, batch(2, 9)).ok


def test_ddp_of_an_optimized_model(tmp_path):
    """DDP's forward and gradients; report, verify and explain take the wrapper."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(moefx.optimize(build("qwen3_moe"), compile=False))
        original = build("qwen3_moe")
        for step in range(2):
            loss, wanted = model(**batch(2, 9, step)).loss, original(**batch(2, 9, step)).loss
            torch.testing.assert_close(loss, wanted)
            loss.backward()
            wanted.backward()
        for p, w in zip(model.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(p.grad, w.grad, rtol=1e-3, atol=1e-6)
        assert moefx.report(model)["route"].made_count == 2
        assert "moefx.experts" in str(moefx.explain(model, "model.layers.0.mlp"))
    finally:
        torch.distributed.destroy_process_group()


def test_blocks_of_which_some_are_checkpointed_share_their_graph():
    """As Transformers' ``every_n_layers`` leaves them, before optimize and after it."""
    model = build("qwen3_moe")
    model.gradient_checkpointing_enable()
    model.model.layers[1].gradient_checkpointing = False
    moefx.optimize(model, compile=False)
    assert len(moefx.report(model).program["Qwen3MoeDecoderLayer"].instances) == 2
    assert moefx.verify(model, batch(2, 9)).ok
    model.model.layers[1].gradient_checkpointing, model.model.layers[0].gradient_checkpointing = True, False
    assert moefx.verify(model, batch(2, 9)).ok


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_one_configuration(attention):
    """``from_config`` does not copy it: a second model finds the first one's implementations named."""
    config = build("qwen3_moe").config
    config._attn_implementation = attention
    torch.manual_seed(0)
    first, second, plain = (AutoModelForCausalLM.from_config(config) for _ in range(3))
    plain.load_state_dict(second.state_dict())
    for model in (first, second):
        moefx.optimize(model, compile=False, strict=True)
    assert moefx.verify(second, batch(2, 9)).ok
    ids = batch(2, 5)["input_ids"]
    assert torch.equal(*(m.eval().generate(ids, max_new_tokens=3, do_sample=False) for m in (second, plain)))
    for model in (first, second):
        moefx.restore(model)
    assert (config._attn_implementation, config._experts_implementation) == (attention, "grouped_mm")
