"""An optimized model as a Python object: traced by other tools, constructed again, copied, changed and moved."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
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


# --- copies ---

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
cached = pytest.mark.usefixtures("cached_captures")


def with_adapter(model: Any) -> Any:
    torch.manual_seed(5)
    query = "q_proj" if hasattr(model.model.layers[0].self_attn, "q_proj") else "q_b_proj"
    return get_peft_model(model, LoraConfig(r=4, target_modules=[query, "o_proj"], init_lora_weights=False))


def assert_same_loss(model: Any, other: Any) -> None:
    torch.testing.assert_close(model(**batch(2, 9)).loss, other(**batch(2, 9)).loss)


def of(family: str) -> tuple[Any, Any]:
    plain = build(family)
    return moefx.optimize(copy.deepcopy(plain), compile=False), plain


@cached
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_a_copy(family, called):
    model, plain = of(family)
    if called:
        step(model)
    copied = copy.deepcopy(model)
    if called:
        step(copied)
    assert_same_step(with_adapter(copied), with_adapter(copy.deepcopy(plain)))
    assert_same_step(model, plain)


@cached
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_model_with_an_adapter(family):
    plain = with_adapter(build(family))
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    copied, other = copy.deepcopy(model), copy.deepcopy(plain)
    assert_same_step(copied, other)
    for m in (copied, other):
        m.merge_adapter()
    assert_same_loss(copied, other)
    again, another = copy.deepcopy(copied), copy.deepcopy(other)
    for m in (again, another):
        m.unmerge_adapter()
    assert_same_step(again, another)
    assert_same_loss(copied, other)  # still merged
    assert_same_step(model, plain)


@cached
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_model_in_training(family):
    """With gradients and hooks; then both are trained in turn, each with batches of its own."""
    models, plain = [of(family)[0]], [build(family)]
    for m in (models[0], plain[0]):
        m.lm_head.register_forward_hook(lambda module, args, out: out * 1.5)
        step(m)
    models.append(copy.deepcopy(models[0]))
    plain.append(copy.deepcopy(plain[0]))
    for m, p in zip(models, plain, strict=True):
        torch.testing.assert_close([x.grad for x in m.parameters()], [x.grad for x in p.parameters()], rtol=1e-3, atol=1e-6)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (*models, *plain)]
    for i in range(3):
        outs = [m(**batch(2, 9, seed=i + k)) for ms in (models, plain) for k, m in enumerate(ms)]
        for out in outs:
            out.loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert (models[0].lm_head.weight - models[1].lm_head.weight).abs().max() > 1e-3
    for m, p in zip(models, plain, strict=True):
        assert_same_step(m, p)


@cached
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_restore(family):
    model, plain = of(family)
    copied = copy.deepcopy(copy.deepcopy(model))
    moefx.restore(model)
    assert_same_step(copied, plain)
    assert_same_step(model, plain)
    assert type(copy.deepcopy(model)) is type(plain)
    moefx.restore(copied)
    assert type(copied) is type(plain)
    assert_same_step(copied, plain)
    assert_same_step(moefx.optimize(copied, compile=False), plain)


@cached
def test_a_shallow_copy():
    """It shares its modules with the model, as without moefx."""
    model, plain = of("qwen3_moe")
    copied = copy.copy(model)
    assert copied.lm_head is model.lm_head
    assert_same_step(copied, plain)
    moefx.restore(copied)
    assert_same_step(copied, plain)
    assert_same_step(model, plain)


@cached
def test_a_copied_block_in_another_place():
    model, plain = of("qwen3_moe")
    for m in (model, plain):
        m.model.layers.append(copy.deepcopy(m.model.layers[0]))
        m.config.num_hidden_layers = 3
        m.model.layers[2].self_attn.layer_idx = 2
    assert_same_step(model, plain)


def test_a_copy_of_a_compiled_model():
    model = moefx.optimize(build("qwen3_moe", num_hidden_layers=1), compile="aot_eager")
    copied = with_adapter(copy.deepcopy(model))
    assert_same_step(copied, with_adapter(build("qwen3_moe", num_hidden_layers=1)))
    assert_same_step(model, build("qwen3_moe", num_hidden_layers=1))


# --- pickles ---


def _torch_saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _module_hook(module: Any, args: Any, out: Any) -> Any:
    return out * 1.5


@cached
@pytest.mark.parametrize("through", [lambda x: pickle.loads(pickle.dumps(x)), _torch_saved], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*_module_hook")
def test_a_saved_model_is_the_original(family, through):
    model, plain = of(family)
    for m in (model, plain):
        m.lm_head.register_forward_hook(_module_hook)
        step(m)
    loaded, optimizer = through([model, torch.optim.SGD(model.parameters(), lr=0.1)])
    assert all(type(a) is type(b) for a, b in zip(loaded.modules(), plain.modules(), strict=True))
    assert optimizer.param_groups[0]["params"][0] is next(loaded.parameters())
    assert not any(n.startswith("_moefx") for m in loaded.modules() for n in vars(m))
    assert loaded.config.to_dict() == plain.config.to_dict()
    assert_same_step(loaded, plain)
    assert_same_step(model, plain)
    assert_same_step(moefx.optimize(loaded, compile=False), plain)


@cached
def test_a_saved_model_with_an_adapter():
    plain = with_adapter(build("qwen3_moe"))
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    loaded = _torch_saved(model)
    assert all(type(a) is type(b) for a, b in zip(loaded.modules(), plain.modules(), strict=True))
    assert_same_step(loaded, plain)
    assert_same_step(model, plain)


@cached
def test_what_holds_of_its_class():
    """As the README says."""
    model, plain = of("qwen3_moe")
    cls, own = type(model), type(plain)
    assert cls is not own and issubclass(cls, own) and isinstance(model, own) and model.__class__ is cls
    assert (cls.__name__, cls.__qualname__, cls.__module__, repr(cls)) == (
        own.__name__,
        own.__qualname__,
        own.__module__,
        repr(own),
    )
    peft = moefx.optimize(with_adapter(build("qwen3_moe")), compile=False)
    for m in (*model.modules(), peft, peft.base_model):
        found = pickle.loads(pickle.dumps(type(m)))
        assert found is _torch_saved(type(m)) and "moefx" not in repr(vars(found)) and issubclass(type(m), found)
        assert copy.copy(type(m)) is copy.deepcopy(type(m)) is type(m)
    assert pickle.loads(pickle.dumps(cls)) is own
    assert b"moefx" not in pickle.dumps(model) and b"moefx" not in pickle.dumps(cls)


def _append(model):
    layers = model.model.layers
    layers.append(copy.deepcopy(layers[1]))
    layers[2].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3


def _delete(model):
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1


def _swap(model):
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def _repeat(model):
    model.model.layers[1] = model.model.layers[0]


def _copy_without_a_new_index(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


@pytest.mark.parametrize("edit", [_append, _delete, _swap, _repeat, _copy_without_a_new_index])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")  # of the cache that layers with one index share
def test_layers_that_are_added_removed_and_exchanged(edit, before):
    """They count, are recorded and replayed under the names that they have now, and share a cache as without moefx."""
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    if before:
        edit(model)
    model = moefx.optimize(model, compile=False)
    moefx.enable_load_tracking(model)
    if not before:
        assert_same_step(model, plain)
        edit(model)
    edit(plain)
    for _ in range(2):
        assert_same_step(model, plain)
    if edit not in (_repeat, _copy_without_a_new_index):  # whose blocks run in Python, as long as they fill the cache
        names = [f"model.layers.{i}.mlp.experts" for i in range(len(model.model.layers))]
        assert {n: int(t.sum()) for n, t in moefx.expert_load(model).items()} == dict.fromkeys(names, 2 * 2 * 9 * 2)
        with moefx.record_routes(model) as routes:
            model(**batch(2, 9))
        assert list(routes) == names
        fewer = {n: routes[n] for n in names[:-1]}
        with pytest.raises(moefx.MoefxError, match=f"no routes to replay for {names[-1]}"), moefx.replay_routes(model, fewer):
            model(**batch(2, 9))
    model.config.use_cache = plain.config.use_cache = False
    for _ in range(2):
        assert_same_step(model, plain)


@pytest.mark.filterwarnings("error::moefx.ShortfallWarning")
def test_other_embeddings_are_no_layers():
    model, plain = moefx.optimize(build("qwen3_moe"), compile=False), build("qwen3_moe")
    assert_same_step(model, plain)
    for m in (model, plain):
        m.model.embed_tokens = copy.deepcopy(m.model.embed_tokens)
    assert_same_step(model, plain)


def test_a_layer_that_is_no_block_is_named():
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    model = moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    other = build("qwen3_moe").model.layers[1]
    for m in (model, plain):
        m.model.layers[1] = copy.deepcopy(other)
    with pytest.warns(moefx.ShortfallWarning, match="model.layers.1 in this call: it was added after optimize"):
        assert_same_step(model, plain)
    assert list(moefx.expert_load(moefx.enable_load_tracking(model) or model)) == ["model.layers.0.mlp.experts"]
