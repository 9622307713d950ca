"""Attention implementations are kept: each part of a model has the one that it had, with the masks that it expects."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import moefx
from moefx import ops
from moefx.analysis.report import ShortfallWarning
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against
from tests.support.families import batch, build
from tests.support.parity import assert_same_step

LEFT = (torch.arange(9) >= torch.tensor([[0], [4]])).long()


def pair(name, **changes):
    plain = build(name, **changes)
    return plain, moefx.optimize(copy.deepcopy(plain), compile=False)


@pytest.fixture
def registered(monkeypatch):
    """An implementation of the user's, with a mask of its own kind; yields the masks that it was called with."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1).tril()
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return 2 * out, None  # it is nobody else's

    monkeypatch.setitem(AttentionInterface._global_mapping, "users", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "users", flash_attention_mask)
    return seen


def test_every_part_keeps_its_own():
    torch.manual_seed(0)
    wanted = {"text_config": "sdpa", "vision_config": "eager"}
    model = AutoModelForImageTextToText.from_config(tiny_config("qwen3_vl_moe"), attn_implementation=wanted)

    def names():
        return [model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation]

    assert names() == ["sdpa", "eager"]
    moefx.optimize(model, compile=False)
    assert names() == ["sdpa", "eager"]
    moefx.restore(model)
    assert names() == ["sdpa", "eager"]


@pytest.mark.parametrize("how", ["graphs", "generate"])
def test_a_users_implementation_gets_its_own_masks(registered, how):
    plain, model = pair("qwen3_moe", attn_implementation="users")
    given = batch(2, 9) | {"attention_mask": LEFT}
    if how == "graphs":
        result = against(plain, model, given)
        assert result.ok, str(result)
        assert not moefx.report(model).fallbacks, "it is traced into the graph as it is"
    else:
        prompt = {k: given[k] for k in ("input_ids", "attention_mask")}
        found = [m.eval().generate(**prompt, max_new_tokens=3, do_sample=False) for m in (model, plain)]
        assert torch.equal(*found)
    assert {None if m is None else m.dim() for m in registered} <= {None, 2} and any(m is not None for m in registered)


def test_flash_attention_gets_its_masks_where_no_graph_is_and_graphs_get_theirs():
    """The kind's own mask is that of padding; a graph reads a mask of all pairs, in which queries that are padding see nobody."""
    padding = LEFT.bool()
    given = {"batch_size": 2, "q_length": 9, "kv_length": 9, "device": "cpu", "attention_mask": padding}
    mask = hf.attention_mask(flash_attention_mask, **given)
    assert type(mask) is hf.LazyMask and torch.equal(hf.original_masks(mask), padding)
    wanted = sdpa_mask(**given, allow_is_causal_skip=False) & padding[:, None, :, None]
    assert torch.equal(mask & True, wanted)
    assert hf.attention_mask(flash_attention_mask, **given | {"attention_mask": torch.ones_like(padding)}) is None


@pytest.mark.parametrize(("name", "implementation"), [("gpt_oss", "eager"), ("qwen3_moe", "eager"), ("qwen3_moe", "sdpa")])
def test_rows_that_are_hidden_whole(name, implementation):
    """Eager attention gives such a query the mean of all values, SDPA gives it nothing; the loss here counts them too."""
    plain, model = pair(name, attn_implementation=implementation)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(
        ~(LEFT.bool()[:, None, None] & torch.ones(9, 9).tril().bool()), -3.4028234663852886e38
    )
    for mask in (LEFT, LEFT.flip(1), additive, additive == 0):  # eager adds the last as numbers
        result = against(plain, model, batch(2, 9) | {"attention_mask": mask})
        assert result.ok, str(result)
    assert not moefx.report(model).fallbacks


def test_attention_that_relies_on_its_mask():
    """NLLB's decoder says that it is not causal: its masks do it."""
    config = tiny_config("nllb-moe")
    config.encoder_layers = config.decoder_layers = config.num_hidden_layers = 2
    config.encoder_sparse_step = config.decoder_sparse_step = 2
    config.pad_token_id = config.decoder_start_token_id = 0
    config.dropout = config.attention_dropout = config.activation_dropout = config.encoder_layerdrop = (
        config.decoder_layerdrop
    ) = 0.0
    torch.manual_seed(0)
    plain = AutoModelForSeq2SeqLM.from_config(config).double().train()
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    ids = batch(2, 9)["input_ids"].clamp(min=2)
    for more in ({}, {"attention_mask": LEFT, "decoder_attention_mask": LEFT}, {"labels": ids[:, :5].contiguous()}):
        result = against(plain, model, {"input_ids": ids, "labels": ids, "use_cache": False, **more})
        assert result.ok, str(result)
    calls = [
        n
        for f in moefx.report(model).program.functions.values()
        for n in f.graph.nodes
        if n.meta.get("semantic", n.target) is ops.attention
    ]
    assert {n.kwargs["is_causal"] for n in calls} == {True, False} and all(
        n.args[3] is None for n in calls if n.kwargs["is_causal"]
    )


def test_masks_that_nobody_reads_are_not_made(monkeypatch):
    """Nor are they in a step of the optimized model: eager attention's is as large as the scores."""
    model = moefx.optimize(build("gpt_oss"), compile=False)
    model(**batch(2, 9))
    monkeypatch.setattr(hf.LazyMask, "read", lambda self: pytest.fail("a mask was made"))
    model(**batch(2, 12))["loss"].backward()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_output_attentions_set_later(implementation):
    found = []
    for model in pair("qwen3_moe", attn_implementation=implementation):
        try:
            model.config.output_attentions = True
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(torch.stack(model.eval()(**batch(2, 9)).attentions))
    if implementation == "eager":
        torch.testing.assert_close(*found)
    else:
        assert found[0] == found[1] and "sdpa" in found[0]


def test_a_cache_that_nobody_asked_for_is_said_once_and_is_right():
    plain, model = (m.eval() for m in pair("qwen3_moe"))
    ids = batch(2, 9)["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ShortfallWarning)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        model(ids, use_cache=False)
        model(ids, labels=ids)
        with pytest.warns(ShortfallWarning, match="pass use_cache=False"):
            caches = [m(ids).past_key_values for m in (model, plain)]
        model(ids)
    torch.testing.assert_close(*([layer.keys for layer in c.layers] for c in caches))


def test_configurations_name_nothing_of_moefx_for_attention():
    model = build("qwen3_moe")
    moefx.optimize(model, compile=False)
    assert copy.deepcopy(model.config)._attn_implementation == "sdpa"


def test_models_that_nothing_was_done_to_compile_whole():
    """The interfaces that moefx asks are everybody's."""
    model = build("qwen3_moe").eval()
    torch.compile(model.model.layers[0].self_attn, fullgraph=True, backend="eager")(
        torch.zeros(1, 4, 64), (torch.ones(1, 4, 16), torch.zeros(1, 4, 16)), None
    )


def test_an_implementation_of_experts_that_is_set_later_stays():
    model, plain = moefx.optimize(build("mixtral"), compile=False), build("mixtral")
    assert_same_step(model, plain)
    model.set_experts_implementation("eager")
    assert_same_step(model, plain)
    assert pickle.loads(pickle.dumps(model)).config._experts_implementation == "eager"
    assert moefx.restore(model).config._experts_implementation == "eager"
    assert_same_step(model, plain)


def test_an_implementation_of_experts_stays_when_an_adapted_model_is_pickled():
    """PEFT's model holds the configuration too; a name lost in it would run other experts, in float64 none at all."""
    model = get_peft_model(build("mixtral", experts_implementation="eager"), LoraConfig(r=2, target_modules=["q_proj"]))
    again = pickle.loads(pickle.dumps(moefx.optimize(model, compile=False)))
    base = again.get_base_model()
    assert base.config._experts_implementation == again.config._experts_implementation == "eager"
    assert again.config is base.config and not hasattr(base, "_moefx")
    moefx.restore(moefx.optimize(again, compile=False))
    assert base.config._experts_implementation == "eager"


@pytest.mark.parametrize("before", [True, False])
def test_more_heads_of_values_than_of_keys_are_left_to_the_models_attention(before):
    """Transformers' sdpa repeats each as often as it must; ``moefx.attention`` has one number of both."""
    model = build("qwen3_moe")
    untouched = copy.deepcopy(model)
    if not before:
        model = moefx.optimize(model, compile=False)
    for m in (model, untouched):
        torch.manual_seed(1)
        m.model.layers[0].self_attn.v_proj = torch.nn.Linear(64, 64, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", moefx.ShortfallWarning)
        model = moefx.optimize(model, compile=False) if before else model
        assert_same_step(model, untouched)
