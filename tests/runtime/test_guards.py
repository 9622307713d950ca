"""What people change after ``optimize`` is noticed: the block is captured anew, or its original forward runs and says so."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.frontend.reads import Reads
from moefx.runtime.guards import Guard
from tests.support.families import batch, build
from tests.support.parity import assert_same_step

pytestmark = pytest.mark.usefixtures("cached_captures")


def pair(prepare: Callable[[Any], None] = lambda m: None, family: str = "qwen3_moe") -> tuple[Any, Any]:
    """An optimized model and an untouched one, each prepared before."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build(family)
        prepare(model)
        found.append(model)
    return moefx.optimize(found[0], compile=False), found[1]


def functions(model: Any) -> int:
    return len([f for f in model._moefx.program if f.name != "head"])


# --- state that a patched forward reads ------------------------------------------------------------------------------


class Box:
    pass


class Slotted:
    __slots__ = ("number",)


def reading(read: Callable[[Any], Any], write: Callable[[Any, float], None]) -> tuple[Callable, Callable]:
    """Sets a number of a layer's mlp that its forward, replaced on the instance, multiplies with; changes it later."""

    def first(mlp: Any, number: float) -> None:
        write(mlp, number)
        mlp.forward = types.MethodType(lambda self, h: type(self).forward(self, h) * read(self), mlp)

    return first, write


def _item(mlp: Any, number: float) -> None:
    if hasattr(mlp, "factors"):
        mlp.factors[1] = number
    else:
        mlp.factors = [1.0, number]


def _entry(mlp: Any, number: float) -> None:
    vars(mlp).setdefault("_factors", {"inner": {}})["inner"]["a"] = number


def _object(mlp: Any, number: float) -> None:
    vars(mlp).setdefault("box", Box()).number = number


def _slot(mlp: Any, number: float) -> None:
    vars(mlp).setdefault("slotted", Slotted()).number = number


def _queue(mlp: Any, number: float) -> None:
    vars(mlp).setdefault("queue", collections.deque(maxlen=1)).append(number)


def _default(mlp: Any, number: float) -> None:
    if "scaled" not in vars(mlp):
        mlp.scaled = lambda h, factors=[0.0]: h * factors[0]
    mlp.scaled.__defaults__[0][0] = number


def _closure(mlp: Any, number: float) -> None:
    mlp.forward = (lambda number: types.MethodType(lambda self, h: type(self).forward(self, h) * number, mlp))(number)


STATE = {
    "attribute": reading(lambda m: m.number, lambda m, x: setattr(m, "number", x)),
    "private": reading(lambda m: m._number, lambda m, x: setattr(m, "_number", x)),
    "list": reading(lambda m: m.factors[1], _item),
    "nested_dict": reading(lambda m: m._factors["inner"]["a"], _entry),
    "object": reading(lambda m: m.box.number, _object),
    "slot": reading(lambda m: m.slotted.number, _slot),
    "deque": reading(lambda m: m.queue[0], _queue),
    "default": reading(lambda m: m.scaled(1.0), _default),
    "tensor": reading(lambda m: m.factor, lambda m, x: setattr(m, "factor", torch.tensor(x))),
    "all_attributes": reading(lambda m: vars(m)["number"], lambda m, x: setattr(m, "number", x)),
    "closure": (_closure, _closure),
}


@pytest.mark.parametrize("kind", STATE)
def test_layers_that_differ_in_what_their_forwards_read(kind):
    first, change = STATE[kind]

    def prepare(model: Any) -> None:
        for i, layer in enumerate(model.model.layers):
            first(layer.mlp, 0.5 + i)

    model, plain = pair(prepare)
    assert_same_step(model, plain)
    for m in (model, plain):
        change(m.model.layers[1].mlp, 3.0)
    assert_same_step(model, plain)
    for m in (model, plain):
        change(m.model.layers[1].mlp, 0.5)  # now as the first layer
        change(m.model.layers[0].mlp, 3.0)
    assert_same_step(model, plain)
    assert not moefx.report(model).fallbacks


def test_a_change_back_captures_nothing():
    model, plain = pair()
    for top_k in (1, 2, 1, 2, 1):
        for m in (model, plain):
            m.model.layers[0].mlp.gate.top_k = top_k
        assert_same_step(model, plain)
        many = functions(model)
    assert many == functions(model) == 3  # of a layer with 2 and with 1, and of the last norm


def test_what_no_forward_reads_changes_nothing():
    model, plain = pair(lambda m: [setattr(layer, "name_of_mine", str(i)) for i, layer in enumerate(m.model.layers)])
    before = functions(model)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.seen, layer.note, model.config.comment = i, [i], str(i)
    assert_same_step(model, plain)
    assert functions(model) == before == 2


def _act_fn(model: Any) -> None:
    model.model.layers[0].mlp.experts.act_fn = nn.GELU()


def _eps(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.3
    model.model.norm.variance_epsilon = 0.1


def _norm_topk_prob(model: Any) -> None:
    model.model.layers[1].mlp.gate.norm_topk_prob = False


def _mlp_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda h: h * 0.5


def _experts_forward(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    own = experts.forward
    experts.forward = lambda *given: own(*given) * 0.5


def _block_forward(model: Any) -> None:
    block = model.model.layers[1]
    around = block.forward
    block.forward = lambda h, **given: around(h * 0.5, **given)


def _other_norm(model: Any) -> None:
    torch.manual_seed(1)
    model.model.layers[0].input_layernorm = nn.LayerNorm(model.config.hidden_size)


def _default_dtype(model: Any) -> None:
    model.model.layers[0].mlp.forward = types.MethodType(
        lambda self, h: type(self).forward(self, h) * torch.ones(()).to(h.dtype) * torch.finfo(torch.get_default_dtype()).bits,
        model.model.layers[0].mlp,
    )


def _weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize(
    "change",
    [_act_fn, _eps, _norm_topk_prob, _mlp_forward, _experts_forward, _block_forward, _other_norm, _default_dtype, _weight_norm],
)
def test_changed_after_optimize(change):
    model, plain = pair()
    assert_same_step(model, plain)
    loss = plain(**batch(2, 9)).loss
    for m in (model, plain):
        change(m)
    assert abs(plain(**batch(2, 9)).loss - loss) > 1e-5 or change is _weight_norm
    assert_same_step(model, plain)


def test_a_forward_that_writes_attributes_runs():
    def prepare(model: Any) -> None:
        def forward(self, h):
            self.calls = getattr(self, "calls", 0) + 1
            self.kept.append(h.shape[1])
            return type(self).forward(self, h)

        mlp = model.model.layers[0].mlp
        mlp.kept, mlp.forward = [], types.MethodType(forward, mlp)

    model, plain = pair(prepare)
    assert any("writes the attribute mlp." in n.reason for n in moefx.report(model).program.not_captured)
    for m in (model, plain):
        m.model.layers[0].mlp.calls, m.model.layers[0].mlp.kept = 0, []
    for _ in range(3):
        assert_same_step(model, plain)
    assert model.model.layers[0].mlp.calls == 3
    assert model.model.layers[0].mlp.kept == [9, 9, 9]


def test_a_number_that_changes_each_step_is_named():
    def prepare(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.temperature = 1.0
        mlp.forward = types.MethodType(lambda self, h: type(self).forward(self, h) / self.temperature, mlp)

    model, plain = pair(prepare)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(11):
            for m in (model, plain):
                m.model.layers[0].mlp.temperature = 1.0 + i
            assert_same_step(model, plain)
    assert any("mlp.temperature was" in str(w.message) and "8 other states" in str(w.message) for w in said)


# --- hooks -----------------------------------------------------------------------------------------------------------

PLACES = {
    "block": lambda m: m.model.layers[0],
    "mlp": lambda m: m.model.layers[0].mlp,
    "experts": lambda m: m.model.layers[0].mlp.experts,
    "gate": lambda m: m.model.layers[0].mlp.gate,
    "q_proj": lambda m: m.model.layers[0].self_attn.q_proj,
    "norm": lambda m: m.model.layers[0].input_layernorm,
    "last_norm": lambda m: m.model.norm,
    "embedding": lambda m: m.model.embed_tokens,
    "inner_model": lambda m: m.model,
    "model": lambda m: m,
}
KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


def summed(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return float(x.detach().double().sum())
    if isinstance(x, tuple | list):
        return [summed(y) for y in x]
    return None


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_hooks_are_called_as_without(place, before):
    """Of all four kinds, as often and with the same values; what the forward hook returns counts."""
    logs: list[list] = [[], []]
    models = [build("qwen3_moe") for _ in range(2)]
    if not before:
        moefx.optimize(models[0], compile=False)
    handles = []
    for m, log in zip(models, logs, strict=True):
        for kind in KINDS:
            handles.append(
                getattr(PLACES[place](m), f"register_{kind}")(lambda _, *a, k=kind, log=log: log.append((k, summed(a))))
            )
    if before:
        moefx.optimize(models[0], compile=False)
        logs[0].clear()
    assert_same_step(*models)
    assert [k for k, _ in logs[0]] == [k for k, _ in logs[1]]
    assert len(logs[1]) >= 2  # token ids have no gradient, and PyTorch puts no backward hooks around a ModelOutput
    for (_, found), (_, wanted) in zip(*logs, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3) if all(isinstance(x, float) for x in wanted) else True
    for handle in handles:
        handle.remove()
    logs[0].clear()
    assert_same_step(*models)
    assert not logs[0]


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_a_hook_of_one_layer_is_not_shared():
    model, plain = pair(lambda m: m.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out * 2))
    assert_same_step(model, plain)


# --- the guard itself ------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    def __init__(self, number: Any):
        super().__init__()
        self.number = number
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) * (self.number if isinstance(self.number, float) else 1.0)


def guard_of(module: nn.Module) -> tuple[Guard, Reads]:
    reads = Reads()
    with reads.recorded(module):
        module(torch.ones(1, 3))
    reads.close(module)
    return Guard(module, [reads]), reads


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "number", 3.0),
        lambda m: delattr(m, "number"),
        lambda m: vars(m).__setitem__("number", 1),
        lambda m: setattr(m, "number", torch.tensor(2.0)),
        lambda m: setattr(m.inner, "forward", lambda x: x),
        lambda m: setattr(m, "inner", nn.Identity()),
        lambda m: m.inner.double(),
        lambda m: m.inner.register_forward_hook(print),
        lambda m: m.add_module("more", nn.Identity()),
        lambda m: setattr(m.inner, "bias", None),
    ],
)
def test_guard_notices(change):
    module = Reading(2.0)
    guard, reads = guard_of(module)
    assert not guard.changed()
    before = reads.state(module)
    change(module)
    assert guard.changed()
    assert before.difference(reads.state(module))


@pytest.mark.parametrize("value", [[1.0, [2.0]], {"a": (1, {2})}, (1, [2]), {1, 2}], ids=str)
def test_guard_notices_items_in_place(value):
    module = Reading(value)
    guard, reads = guard_of(module)
    before = reads.state(module)
    assert before.difference(reads.state(copy.deepcopy(module))) is None
    inner: Any = value
    while isinstance(inner, tuple):
        inner = inner[-1]
    if isinstance(inner, dict):
        inner["a"] = 5
    elif isinstance(inner, set):
        inner.add(7)
    else:
        inner[0] = 9.0
    assert guard.changed()
    assert "number was" in str(before.difference(reads.state(module)))


def test_no_comparison_of_other_code_runs():
    class Wild:
        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    module = Reading([Wild(), torch.ones(3)])
    guard, _ = guard_of(module)
    assert not guard.changed()
    module.number = [Wild(), torch.ones(3)]
    assert guard.changed()


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
@pytest.mark.parametrize("errors", [0, 1, 2])
def test_a_capture_keeps_nothing_of_its_step(errors, monkeypatch):
    """Else the embedding has an autograd node of its old size in the next step.

    ``errors``: how many exports raise an error that is a variable of its own frame; the second one's end is that of the capture.
    """
    model, plain = pair()
    own, raised = torch.export.export, []

    def export(*args, **kwargs):
        if len(raised) == errors:
            return own(*args, **kwargs)
        try:
            raise ValueError("Constraints violated")
        except ValueError as error:
            kept = error  # a cycle of this frame, as torch 2.11 makes one
        raised.append(None)
        raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION, str(kept)) from kept

    monkeypatch.setattr(torch.export, "export", export)
    gc.collect()
    gc.disable()
    try:
        for m in (model, plain):
            m.model.layers[0].self_attn.scaling = 0.31 + errors  # no other test captured that
            m.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert_same_step(model, plain)
        assert len(raised) == errors
        for m in (model, plain):
            m.zero_grad()
            torch.manual_seed(1)
            m.resize_token_embeddings(300, mean_resizing=False)
        assert_same_step(model, plain)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_a_forward_that_runs_the_experts_of_another_module_under_checkpointing():
    """As in a deep copy, whose patched forward closes over the module of the original: its routes are replayed all the same."""
    model, plain = build("qwen3_moe"), build("qwen3_moe")
    for m in (model, plain):
        other = m.model.layers[0].mlp
        m.model.layers[1].mlp.forward = lambda h, other=other: type(other).forward(other, h) * 0.7
    moefx.optimize(model, compile=False)
    for m in (model, plain):
        m.gradient_checkpointing_enable()
    assert_same_step(model, plain)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        assert_same_step(*copy.deepcopy((model, plain)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hooks", ["none", "copies"])
@pytest.mark.filterwarnings("ignore:.*sdpa.*")
def test_output_attentions_under_checkpointing(reentrant, hooks):
    """Attention weights are asked for in the forward only: the recomputation runs the same forward."""
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
    model, plain = pair()
    for m in (model, plain):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.enable_input_require_grads()
    given = [{"output_attentions": True}, {}, {"output_attentions": True}, {"output_attentions": True}, {}]
    found = []
    for m in (model, plain):
        with copies if hooks == "copies" else contextlib.nullcontext():
            for more in given:
                m(**batch(2, 9), **more).loss.backward()
            if hooks == "none":
                losses = [m(**batch(2, 9), **more).loss for more in given[:2]]  # two forwards are waiting for their backwards
                for loss in losses:
                    loss.backward()
        found.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_a_hook_on_attention_sees_its_weights(implementation, before):
    """Eager attention returns them; ``moefx.attention`` does not, so that such a module has no graph of its own."""
    model, plain, seen = build("qwen3_moe"), build("qwen3_moe"), {}
    for m in (model, plain):
        m.config._attn_implementation = implementation

    def watch(m: Any) -> None:
        seen[m] = []
        m.model.layers[0].self_attn.register_forward_hook(lambda _, __, out: seen[m].append(out[1]))

    if before:
        watch(model)
    moefx.optimize(model, compile=False)
    if not before:
        assert_same_step(model, plain)
        watch(model)
    watch(plain)
    seen[model].clear()
    assert_same_step(model, plain)
    (found,), (wanted,) = seen[model], seen[plain]
    assert (found is None) == (wanted is None)
    if wanted is not None:
        torch.testing.assert_close(found, wanted)
