"""Bad input: a message of one sentence with the values and what to do, and an unchanged model."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moefx
from moefx import ops
from tests.support.families import COMMON, batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.fixture(scope="module")
def model():
    return build("qwen3_moe")


@pytest.fixture(autouse=True)
def untouched(model):
    before = [type(m) for m in model.modules()], model.config._attn_implementation, model.config._experts_implementation
    yield
    assert (
        [type(m) for m in model.modules()],
        model.config._attn_implementation,
        model.config._experts_implementation,
    ) == before
    assert not hasattr(model, "_moefx")


def fails(model, text, error=moefx.MoefxError, **options):
    with pytest.raises(error, match=text):
        moefx.optimize(model, compile=False, **options)


def test_ep_size_that_does_not_divide_the_experts(model):
    fails(model, r"ep_size=3 does not divide the 8 experts of model.layers.0.mlp.experts: choose one of 1, 2, 4, 8", ep_size=3)


def test_ep_size_without_a_process_group(model):
    fails(model, r"ep_size=2 needs a process group and none is initialized: start with torchrun", ep_size=2)


def test_ep_size_that_is_no_number(model):
    fails(model, r"ep_size=0 is not a positive whole number", ep_size=0)


def test_dense_model():
    config = AutoConfig.for_model("llama", **{**COMMON, "intermediate_size": 96})
    fails(AutoModelForCausalLM.from_config(config), "LlamaForCausalLM is dense: it has 0 experts modules")


def test_not_a_model():
    fails(torch.nn.Linear(2, 2), "PreTrainedModel, got Linear")


def test_already_optimized():
    model = moefx.optimize(build("mixtral"), compile=False)
    fails(model, "already optimized: call moefx.restore")
    with pytest.raises(moefx.MoefxError, match="already optimized"):
        moefx.capture(model)


def test_two_devices():
    model = build("qwen3_moe")
    model.lm_head.to("meta")
    fails(model, "lies on two devices: .* on cpu, lm_head.weight on meta")


def test_quantized():
    model = build("qwen3_moe")
    model.config.quantization_config = {"quant_method": "fp8"}
    fails(model, "is quantized")


def test_example_that_the_model_rejects(model):
    bad = {"input_ids": torch.full((2, 8), 1000)}  # the vocabulary has 256
    fails(model, r"rejects the example batch \(input_ids, use_cache, labels; resized to batch", example=bad)


def test_example_without_a_batch(model):
    fails(model, "example has no tensor", example={})


def test_unknown_backend(model):
    fails(model, "no backend is named 'tritn'; there are: .*torch, te, reference", backends=["tritn"])


def test_kernel_with_another_signature(model):
    mine = moefx.Backend("mine", {ops.rms_norm: moefx.Kernel(lambda x, weight: x)})
    fails(
        model,
        r"backend 'mine': the kernel of moefx.rms_norm takes \(x, weight\), the operation has \(x, weight, eps",
        backends=[mine],
    )


def test_pipeline_of_another_type(model):
    fails(model, "pipeline is a list", pipeline=[])


def test_a_pass_that_breaks_the_graph(model):
    class Breaks:
        name = "breaks"

        def run(self, function, plan):
            first = next(n for n in function.graph.nodes if n.op == "call_function")
            first.replace_all_uses_with(list(function.graph.nodes)[-2])
            return moefx.Changes()

    fails(
        model,
        "pass 'breaks' broke .* which is not defined before it",
        moefx.PassError,
        pipeline=moefx.passes.default().before("route", Breaks()),
    )


def test_strict_raises_where_a_router_is_not_known(monkeypatch):
    model = build("qwen3_moe")
    for m in model.modules():
        if type(m).__name__ == "Qwen3MoeTopKRouter":

            def forward(hidden, m=m):
                logits = torch.nn.functional.linear(hidden.reshape(-1, m.hidden_dim), m.weight)
                value, index = torch.topk(torch.softmax(logits, -1).sqrt(), 2)
                return logits, value, index

            m.forward = forward
    with pytest.raises(moefx.PassError, match="route: 0 of 1 in Qwen3MoeDecoderLayer"):
        moefx.optimize(model, compile=False, strict=True)
    with pytest.warns(moefx.ShortfallWarning, match="route: 0 of 1"):
        moefx.optimize(model, compile=False)
    assert moefx.verify(model, batch(2, 9)).ok  # as it was, and correct


def test_a_hook_that_is_added_later_is_said_once():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(
        moefx.ShortfallWarning, match="trains without its graph of model.layers.0 in this call: the hook .* on mlp would become"
    ):
        model(**batch(2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        model(**batch(2, 9))
    assert any("on mlp would become part of the graph" in reason for _, reason in moefx.report(model).fallbacks)


def test_training_without_a_graph_is_said_and_generating_is_not():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    ids = batch(2, 9)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", moefx.ShortfallWarning)
        model.eval().generate(ids, max_new_tokens=2, do_sample=False)
        model.train()(**batch(2, 9)).loss.backward()
    with pytest.warns(
        moefx.ShortfallWarning, match="trains without its graph of model.layers.0 in this call: its argument cache"
    ):
        model.model(ids)  # fills a cache


def test_optimize_verifies_and_reports(capsys):
    model = moefx.optimize(build("qwen3_moe"), compile=False, verify=True)
    report = moefx.report(model)
    assert "add_rms_norm" in report["residual_rms_norm"].diff() and "ops.route(" in report["route"].code
    text = str(moefx.explain(model, "model.layers.0.mlp"))
    assert "modeling_qwen3_moe.py" in text and "-> route, lower -> reference" in text
    assert max(map(len, str(report).splitlines())) <= 100
    with pytest.raises(moefx.MoefxError, match="no module 'model.layers.9'"):
        moefx.explain(model, "model.layers.9")


def test_frozen_and_tied_parameters():
    model = build("qwen3_moe", tie_word_embeddings=True)
    for p in model.model.layers[0].mlp.experts.parameters():
        p.requires_grad_(False)
    moefx.optimize(model, compile=False, strict=True)
    assert moefx.verify(model, batch(2, 9)).ok
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_attention_over_more_keys_than_queries_stays_the_models():
    from transformers import AutoModelForCausalLM

    from moefx.integrations.transformers.tiny_config import tiny_config

    torch.manual_seed(0)
    model = moefx.optimize(AutoModelForCausalLM.from_config(tiny_config("deepseek_v4")), compile=False)
    functions = moefx.report(model).program.functions.values()
    assert not any(n.target is moefx.ops.attention for f in functions for n in f.graph.nodes)
    assert moefx.report(model).kernels()["experts", "torch"][0] == 3
    assert model.config._attn_implementation == "eager"
    for b, s in ((1, 1), (2, 13), (2, 131)):  # no, some, and all kinds of windows of compressed keys
        assert moefx.verify(model, batch(b, s)).ok
    moefx.restore(model)
    assert model.config._attn_implementation == "eager"


def test_attention_that_is_not_causal_stays_so_where_python_runs_it():
    """Inkling 2 attends over the states of earlier blocks, by the model's own eager attention."""
    from transformers import AutoModelForCausalLM

    from moefx.integrations.transformers.tiny_config import tiny_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("inkling2_text"))
    plain = model(**batch(2, 9)).logits
    moefx.optimize(model, compile=False)
    assert moefx.verify(model, batch(2, 9)).ok  # whose original is run by Python
    torch.testing.assert_close(model(**batch(2, 9)).logits, plain)
