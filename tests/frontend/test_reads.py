"""What a capture reads outside of the modules: classes, functions, hooks on all modules, the default dtype, configurations."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe

import moefx
from tests.support import families as settings
from tests.support.families import batch, build
from tests.support.parity import assert_same_step


def pair(family: str = "qwen3_moe") -> tuple[Any, Any]:
    return moefx.optimize(build(family), compile=False), build(family)


def test_a_class_and_a_function_that_are_replaced(monkeypatch):
    model, plain = pair()
    assert_same_step(model, plain)
    cls, rotary = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock, modeling_qwen3_moe.apply_rotary_pos_emb
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, h: forward(self, h) * 0.5)
    assert_same_step(model, plain)
    monkeypatch.setattr(modeling_qwen3_moe, "apply_rotary_pos_emb", lambda q, k, *a, **b: rotary(q * 2, k, *a, **b))
    assert_same_step(model, plain)
    monkeypatch.setattr(modeling_qwen3_moe, "rotate_half", lambda x: x)  # named by a function that the forward names
    assert_same_step(model, plain)
    monkeypatch.undo()
    assert_same_step(model, plain)
    assert not moefx.report(model).fallbacks


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_a_hook_on_all_modules(kind):
    model, plain = pair()
    assert_same_step(model, plain)
    called: dict[Any, list[str]] = {}
    for m in (model, plain):
        called[m] = []
        register = getattr(nn.modules.module, f"register_module_{kind}")
        handle = register(lambda module, *_, log=called[m]: log.append(type(module).__name__))
        try:
            m(**batch(2, 9)).loss.backward()
        finally:
            handle.remove()
    assert sorted(called[model]) == sorted(called[plain])
    before = len(moefx.report(model).fallbacks)
    assert_same_step(model, plain)
    assert len(moefx.report(model).fallbacks) == before


def test_a_method_of_experts_that_is_replaced(monkeypatch):
    model, plain = pair("gpt_oss")
    assert_same_step(model, plain)
    gate = modeling_gpt_oss.GptOssExperts._apply_gate
    monkeypatch.setattr(modeling_gpt_oss.GptOssExperts, "_apply_gate", lambda self, h: gate(self, h) * 0.5)
    with pytest.warns(moefx.ShortfallWarning, match="none of the activations"):
        assert_same_step(model, plain)


def test_an_attribute_of_the_configuration_that_a_forward_reads():
    model, plain = pair("deepseek_v3")
    for m in (model, plain):
        m.model.layers[-1].mlp.forward = lambda h, m=m: h * m.config.initializer_range
    assert_same_step(model, plain)
    for m in (model, plain):
        m.config.initializer_range = 3.0
    assert_same_step(model, plain)
    many = len(list(model._moefx.program))
    for m in (model, plain):
        m.config.output_hidden_states = True
    assert_same_step(model, plain)
    assert len(list(model._moefx.program)) == many


@pytest.mark.parametrize("name", ["repeat_kv", "eager_attention_forward"])
@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_an_attention_function_that_is_replaced(name, before, wraps, monkeypatch):
    """``moefx.attention`` stands for Transformers' own functions, not for what someone has put in their place."""
    function = getattr(modeling_gpt_oss, name)

    def patch() -> None:
        @(functools.wraps(function) if wraps else lambda f: f)
        def doubled(*args, **kwargs):
            found = function(*args, **kwargs)
            return (found[0] * 2, *found[1:]) if isinstance(found, tuple) else found * 2

        monkeypatch.setattr(modeling_gpt_oss, name, doubled)

    model, plain = build("gpt_oss"), build("gpt_oss")
    if before:
        patch()
        moefx.optimize(model, compile=False)
    else:
        moefx.optimize(model, compile=False)
        assert_same_step(model, plain)
        patch()
    assert_same_step(model, plain)
    monkeypatch.undo()
    assert_same_step(model, plain)


class Scale:
    """A plain object, which a forward calls."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, h):
        return self.scaled(h)

    def scaled(self, h):
        return h * self.factor * factor()


SCALE = Scale(0.5)


def calls_its_class(self, h):
    return type(self).forward(self, h)


def calls_the_class_above(self, h):
    return super(type(self), self).forward(h)


def calls_an_object(self, h):
    return SCALE(h)


def calls_what_it_holds(self, h):
    return self.scales[0]["a"].scaled(h)


def subclass(module):
    """Its class gets an empty subclass."""
    module.__class__ = type(type(module).__name__, (type(module),), {})


@pytest.mark.parametrize("forward", [calls_its_class, calls_the_class_above, calls_an_object, calls_what_it_holds])
def test_code_that_is_reached_in_other_ways_than_by_a_global(forward, monkeypatch):
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    for m in (model, plain):
        mlp = m.model.layers[0].mlp
        if forward is calls_the_class_above:
            subclass(mlp)
        mlp.scales = ({"a": SCALE},)
        mlp.forward = types.MethodType(forward, mlp)
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    cls = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
    own = cls.forward
    changes = [
        (SCALE, "factor", 2.0),
        (Scale, "scaled", lambda self, h: h * self.factor * 3),
        (Scale, "__call__", lambda self, h: h * 0.1),
        (cls, "forward", functools.wraps(own)(lambda self, h: own(self, h) * 0.5)),
    ]
    for change in changes:
        monkeypatch.setattr(*change)
        assert_same_step(model, plain)
    monkeypatch.undo()
    assert_same_step(model, plain)


def test_a_function_that_a_forward_reaches_through_its_class(monkeypatch):
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    for m in (model, plain):
        attention = m.model.layers[0].self_attn
        attention.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), attention)
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    rotary = modeling_qwen3_moe.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_qwen3_moe, "apply_rotary_pos_emb", lambda q, k, *a, **b: rotary(q * 2, k, *a, **b))
    assert_same_step(model, plain)
    monkeypatch.undo()
    assert_same_step(model, plain)


def _in_a_default(own):
    return lambda *args, own=own, **kwargs: own(*args, **kwargs)


def _in_a_positional_default(own):
    return lambda q, k, cos, sin, unsqueeze_dim=1, own=own: own(q, k, cos, sin, unsqueeze_dim)


def _in_an_attribute(own):
    def call(*args, **kwargs):
        return call.own(*args, **kwargs)

    call.own = own
    return call


def _in_a_container(own):
    return lambda *args, held=({"own": own},), **kwargs: held[0]["own"](*args, **kwargs)


def _in_a_cache(own):
    @functools.cache
    def find():
        return own

    return lambda *args, **kwargs: find()(*args, **kwargs)


def _in_an_object(own):
    class Call:
        def __init__(self, own):
            self.own = own

        def __call__(self, *args, **kwargs):
            return self.own(*args, **kwargs)

    return Call(own)


def _in_slots(own):
    class Call:
        __slots__ = ("own",)

        def __call__(self, *args, **kwargs):
            return self.own(*args, **kwargs)

    call = Call()
    call.own = own
    return call


HELD = [
    _in_a_default, _in_a_positional_default, _in_an_attribute, _in_a_container, _in_a_cache, _in_an_object, _in_slots,
    functools.partial,
]  # fmt: skip


@pytest.mark.parametrize("hold", HELD)
def test_a_replaced_function_that_holds_the_original_in_some_way(hold, monkeypatch):
    """What the original names counts however it is reached."""
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    monkeypatch.setattr(modeling_qwen3_moe, "apply_rotary_pos_emb", hold(modeling_qwen3_moe.apply_rotary_pos_emb))
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    half = modeling_qwen3_moe.rotate_half
    monkeypatch.setattr(modeling_qwen3_moe, "rotate_half", lambda x: half(x) * 0.5)
    assert_same_step(model, plain)


FACTORS = {"mlp": [0.5, {"b": 2.0}]}


def factor():
    return FACTORS["mlp"][1]["b"]


def test_an_attribute_of_an_imported_module(monkeypatch):
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    monkeypatch.setattr(settings, "SCALE", 0.5, raising=False)
    for m in (model, plain):
        mlp = m.model.layers[0].mlp
        mlp.forward = lambda h, mlp=mlp: type(mlp).forward(mlp, h) * settings.SCALE
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    monkeypatch.setattr(settings, "SCALE", 3.0)
    assert_same_step(model, plain)


def test_a_global_container_that_is_changed_in_place():
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    for m in (model, plain):
        mlp = m.model.layers[0].mlp
        mlp.forward = functools.wraps(type(mlp).forward)(lambda h, mlp=mlp: type(mlp).forward(mlp, h) * factor())
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    FACTORS["mlp"][1]["b"] = 3.0
    assert_same_step(model, plain)
    FACTORS["mlp"][1]["b"] = 2.0
    assert_same_step(model, plain)


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_experts_of_a_patched_class_where_no_graph_covers_them(monkeypatch):
    model, plain = build("glm4_moe"), build("glm4_moe")
    for m in (model, plain):
        m.set_experts_implementation("eager")
    moefx.optimize(model, compile=False)
    assert_same_step(model, plain)
    cls = type(plain.model.layers[1].mlp.experts)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs) * 0.7)
    for m in (model, plain):
        m.model.layers[1].mlp.experts.act_fn = nn.Sequential(nn.SiLU(), nn.Tanh())
    assert_same_step(model, plain)
