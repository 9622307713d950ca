"""An optimized model as a Python object: traced by other tools, constructed again, copied, changed and moved."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.errors import MoefxError
from tests.support.families import batch, build
from tests.support.parity import assert_same_step, step


def optimized(family: str = "qwen3_moe", layers: int = 2, **options: Any) -> Any:
    return moefx.optimize(build(family, num_hidden_layers=layers), compile=False, **options)


# --- other tools ---


def test_torch_compile_makes_one_graph():
    """Training and evaluation under ``fullgraph=True``; the bits of the untouched model compiled the same way, and a word that
    nothing is gained."""
    found = []
    for model in (build("qwen3_moe", num_hidden_layers=1), optimized(layers=1)):
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            loss, gradients = step(compiled)
        with torch.no_grad():
            logits = compiled.eval()(**batch(2, 9, labels=False), use_cache=False).logits
        found.append((loss, list(gradients.values()), logits, any("moefx's graphs" in str(w.message) for w in said)))
    (*plain, silent), (*ours, warned) = found
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert warned and not silent


def test_generate_with_a_static_cache_compiled():
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # else a CPU is never compiled for
    tokens = []
    for model in (build("qwen3_moe", num_hidden_layers=1), optimized(layers=1)):
        torch._dynamo.reset()
        options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", compile_config=config)
        tokens.append(model.eval().generate(batch(2, 5)["input_ids"], **options))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict):
    given = dict(batch(2, 9, labels=False), use_cache=False)
    model = optimized(layers=1).eval()
    exported = torch.export.export(model, (), given, strict=strict).module()
    torch.testing.assert_close(exported(**given).logits, model(**given).logits)


def test_what_only_graphs_do_is_not_compiled_away():
    """The z-loss is no part of the model's own forward: Dynamo breaks its graph, torch.export gets a sentence."""
    torch._dynamo.reset()
    model = optimized(layers=1, router_z_loss=0.5)
    wanted, _ = step(model)
    assert torch.equal(step(torch.compile(model, backend="eager"))[0], wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="router_z_loss"):
        step(torch.compile(model, backend="eager", fullgraph=True))
    with pytest.raises(MoefxError, match=r"moefx.restore\(model\) first"):
        torch.export.export(model, (), batch(2, 9), strict=False)


@pytest.mark.parametrize(
    "around", [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad], ids=["meta", "inference", "no_grad"]
)
def test_optimize_within(around: Callable):
    model = build("qwen3_moe")
    with around():
        moefx.optimize(model, compile=False, strict=True)
    assert_same_step(model, build("qwen3_moe"))


# --- classes and configurations ---


def test_its_class_makes_plain_models(tmp_path):
    model = optimized()
    model.save_pretrained(tmp_path)
    assert "moefx" not in (tmp_path / "config.json").read_text()
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    for plain in (fresh, type(model).from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
        assert type(plain) is type(build("qwen3_moe")) and isinstance(model, type(plain))
        assert torch.equal(plain(**batch(2, 9)).loss, build("qwen3_moe")(**batch(2, 9)).loss)
    assert moefx.report(copy.deepcopy(model)) is moefx.report(model)
    block = copy.deepcopy(model.model.layers[0])
    assert hasattr(block, "_moefx_forward") and block.mlp.gate.weight is not model.model.layers[0].mlp.gate.weight


@pytest.mark.parametrize("names", [("sdpa", "grouped_mm"), ("eager", "eager")])
def test_a_copied_configuration_knows_what_it_said(names):
    model = build("qwen3_moe")
    model.config._attn_implementation, model.config._experts_implementation = names
    moefx.optimize(model, compile=False)
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    moefx.restore(moefx.optimize(other, compile=False))
    moefx.restore(model)
    for m in (other, model):
        assert (m.config._attn_implementation, m.config._experts_implementation) == names


# --- changes ---


def _another_top_k(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3


def _another_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 1.3


def _another_head(model: Any) -> None:
    torch.manual_seed(1)
    model.lm_head = torch.nn.Linear(64, 256, bias=True)


def _more_tokens(model: Any) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(260, mean_resizing=False)


def _backward_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_full_backward_hook(lambda m, given, out: tuple(2 * g for g in given))


CHANGES = [_another_top_k, _another_scaling, _another_head, _more_tokens, _backward_hook]


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__[1:] for c in CHANGES])
@pytest.mark.filterwarnings("ignore:.*would become part of the graph")
def test_changed_after_a_forward(change):
    model, plain = optimized(), build("qwen3_moe")
    with torch.no_grad():
        model(**batch(2, 9))
    for m in (model, plain):
        change(m)
    assert_same_step(model, plain)
    assert hasattr(model.lm_head, "_moefx_head")  # its logits are not stored


def test_a_router_cast_to_another_dtype():
    """A graph that was captured with a float32 router has no cast of its weight."""
    model, plain = optimized("deepseek_v3", 2), build("deepseek_v3", num_hidden_layers=2)
    model(**batch(2, 9))
    for m in (model, plain):
        m.model.layers[1].mlp.gate.to(torch.bfloat16)
    assert_same_step(model, plain)


def test_counts_follow_the_model():
    model = optimized()
    moefx.enable_load_tracking(model)
    model(**batch(2, 9))
    routing = model._moefx_router_state
    path = next(iter(routing.tokens_per_expert))
    routing.tokens_per_expert = {p: n.to("meta") for p, n in routing.tokens_per_expert.items()}
    routing._count(
        path, model._moefx.program["Qwen3MoeDecoderLayer"].routes[0], torch.zeros(3, 2, dtype=torch.int64, device="meta")
    )
    assert routing.tokens_per_expert[path].is_meta


def replica_of(model):
    """What nn.DataParallel calls on each GPU: modules that share all but their tables, whose parameters are tensors."""
    modules = list(model.modules())
    copies = [m._replicate_for_data_parallel() for m in modules]
    at = {id(m): c for m, c in zip(modules, copies, strict=True)}
    for m, c in zip(modules, copies, strict=True):
        for name, child in m._modules.items():
            if child is not None:
                setattr(c, name, at[id(child)])
        for name, p in m._parameters.items():
            if p is not None:
                setattr(c, name, p * 1)
            else:
                c._parameters[name] = None
        c._buffers.update(m._buffers)
    return copies[0]


def test_copies_of_data_parallel_run_the_models_own_forward():
    plain = build("qwen3_moe")
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    with pytest.warns(ShortfallWarning, match="start one process per GPU with torchrun"):
        replica_of(model)(**batch(2, 9)).loss.backward()
    with moefx.replay_routes(model, {}), pytest.raises(MoefxError, match="recorded or replayed routes"):
        replica_of(model)(**batch(2, 9))
    plain(**batch(2, 9)).loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
