"""The fused loss and the lazy logits of an optimized model, against an untouched twin: read anywhere, watched, changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.errors import MoefxError
from moefx.frontend.export import capture_module
from moefx.frontend.lazy_logits import LazyLogits
from tests.frontend.test_head import MODELS
from tests.frontend.test_head import build as build_scaled
from tests.support.families import batch, build
from tests.support.parity import assert_same_step, step

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
pytestmark = pytest.mark.usefixtures("cached_captures")


@functools.cache
def _optimized(family: str, compile: bool | str) -> Any:
    return moefx.optimize(build(family), compile=compile)


def twins(family: str = "qwen3_moe", compile: bool | str = False) -> tuple[Any, Any]:
    """An optimized model and its untouched twin; the report is shared by all that a test gets of a family."""
    model = copy.deepcopy(_optimized(family, compile))
    moefx.report(model)._warned.clear()
    return model, build(family)


def is_fused(model: Any) -> bool:
    logits = model(**batch(2, 9)).logits
    return isinstance(logits, LazyLogits) and logits.skipped


def assert_same(models: tuple[Any, Any], run: Callable[[Any], torch.Tensor]) -> None:
    """``run(model)`` is a loss: it and all gradients agree."""
    found = []
    for m in models:
        m.zero_grad()
        loss = run(m)
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in m.named_parameters() if p.grad is not None}})
    ours, wanted = found
    assert ours.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- logits that a metric reads, and a loss uses ---


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize(("family", "compile"), [*((f, False) for f in FAMILIES), ("qwen3_moe", "aot_eager")])
def test_a_metric_before_the_loss(family, compile, around):
    def run(model: Any) -> torch.Tensor:
        out = model(**batch(2, 9))
        with around():
            accuracy = (out.logits.argmax(-1) == batch(2, 9)["input_ids"]).float().mean()
        return out.loss + (1 + accuracy) * out.logits.float().logsumexp(-1).pow(2).mean()

    assert_same(twins(family, compile), run)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_of_its_own_logits(family):
    def run(model: Any) -> torch.Tensor:
        out = model(**batch(2, 9))
        with torch.no_grad():
            target = out.logits / 2
        return F.kl_div(F.log_softmax(out.logits, -1), F.softmax(target, -1), reduction="batchmean") + out.loss

    assert_same(twins(family), run)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_forward_under_autocast(family):
    """Outside of it they would be computed in float32."""
    found = []
    for model in twins(family):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch(2, 9))
        assert out.logits.dtype == torch.bfloat16 and out.logits.requires_grad
        (out.logits.float().logsumexp(-1).mean()).backward()
        found.append((out.loss.detach(), out.logits.detach(), model.lm_head.weight.grad))
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_an_evaluation(family, around):
    found = []
    for model in twins(family):
        with around():
            out = model.eval()(**batch(2, 9))
        assert not out.logits.requires_grad
        with torch.no_grad():
            found.append((out.loss.clone(), out.logits * 1))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_head_trains(family):
    models = twins(family)
    for m in models:
        m.requires_grad_(False)
        m.get_output_embeddings().requires_grad_()
    assert all(m(**batch(2, 9)).logits.requires_grad for m in models)
    assert_same(models, lambda m: m(**batch(2, 9)).logits.logsumexp(-1).mean())
    assert_same(models, lambda m: m(**batch(2, 9)).loss)


# --- logits that are read after a step ---


def _sgd(**options: Any) -> Callable:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, **options).step()


def _data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


STEPS: dict[str, Callable] = {
    "for loop": _sgd(foreach=False),
    "foreach": _sgd(foreach=True),
    "fused": _sgd(fused=True),
    "data =": _data,
    "load_state_dict": lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_read_after_a_step(family, name):
    model, plain = twins(family)
    for read_before in (True, False):
        outs = [m(**batch(2, 9)) for m in (model, plain)]
        for out in outs:
            out.loss.backward()
        if read_before:
            torch.testing.assert_close(outs[0].logits.detach(), outs[1].logits.detach(), rtol=1e-3, atol=1e-3)
        for m in (model, plain):
            STEPS[name](m)
            m.zero_grad()
        if read_before:
            torch.testing.assert_close(outs[0].logits.detach(), outs[1].logits.detach(), rtol=1e-3, atol=1e-3)
        else:
            with pytest.raises(MoefxError, match=r"first read after lm_head's weight was .* before optimizer.step\(\)"):
                outs[0].logits.argmax(-1)
    plain.load_state_dict(model.state_dict())
    assert_same_step(model, plain)


@pytest.mark.parametrize("what", ["loss", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backward_after_a_step(family, what):
    for model in twins(family):
        out = model(**batch(2, 9))
        objective = out.loss if what == "loss" else out.logits.logsumexp(-1).mean()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_after_a_change_of_the_head(family):
    """The fused loss has its gradients since the forward, so it does not need the weight any more."""
    model, _ = twins(family)
    _, wanted = step(model)
    model.zero_grad()
    loss = model(**batch(2, 9)).loss
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)


def test_a_gradient_of_logits_that_were_not_computed():
    model, _ = twins()
    out = model(**batch(2, 9))
    with pytest.raises(MoefxError, match="call the model without labels"):
        out.logits.register_hook(lambda g: g)


# --- a head that someone watches or has changed ---


def _hook(kind: str) -> Callable:
    """Puts a hook on lm_head that notes what it is called with, and changes it; returns what it notes, and its handle."""

    def put(lm_head: Any) -> tuple[list, Any]:
        seen: list[Any] = []

        def own_hook(module, *given):
            assert module is lm_head and not any(isinstance(x, LazyLogits) for x in given)
            flat = [x for g in given for x in (g if isinstance(g, tuple) else (g,)) if x is not None]
            seen.append([x.detach().clone() for x in flat])
            changed = given[0] if kind == "backward" else given[-1]
            return changed * 1.5 if kind == "forward" else tuple(None if x is None else x * 1.5 for x in changed)

        register = {
            "forward": lm_head.register_forward_hook,
            "forward_pre": lm_head.register_forward_pre_hook,
            "backward": lm_head.register_full_backward_hook,
            "backward_pre": lm_head.register_full_backward_pre_hook,
        }[kind]
        return seen, register(own_hook)

    return put


def run_watched(models: tuple[Any, Any], put: Callable, steps: int = 2) -> list[Any]:
    """Compares steps with the hook, and what it was called with; removes it."""
    seen, handles = zip(*(put(m.get_output_embeddings()) for m in models), strict=True)
    for _ in range(steps):
        assert_same_step(*models)
    assert len(seen[0]) == steps
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-5)
    return list(handles)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_after_optimize(family, kind):
    models = twins(family)
    assert is_fused(models[0])
    with pytest.warns(ShortfallWarning, match=r"lm_head has the .*hook .*own_hook.*stores all logits: .* GiB") as said:
        handles = run_watched(models, _hook(kind))
    assert len(said) == 1
    assert not is_fused(models[0])
    for h in handles:
        h.remove()
    assert is_fused(models[0])
    assert_same_step(*models)


@pytest.mark.filterwarnings("ignore:.*on all modules")
def test_a_hook_on_all_modules():
    models, seen = twins(), []

    def own_hook(module, args, out):
        if isinstance(module, torch.nn.Linear) and out.shape[-1] == 256:
            seen.append(type(out))
            return out * 1.5
        return out

    handle = torch.nn.modules.module.register_module_forward_hook(own_hook)
    try:
        assert_same_step(*models)
    finally:
        handle.remove()
    assert seen == [torch.Tensor] * 2
    assert is_fused(models[0])


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
@pytest.mark.filterwarnings("ignore:.*(own_hook|backward hook)")
def test_a_hook_before_optimize(kind):
    models = build("qwen3_moe"), build("qwen3_moe")
    seen, handle = _hook(kind)(models[0].lm_head)
    with pytest.warns(ShortfallWarning, match=r"head: lm_head has the .*own_hook.*; the logits of all tokens are stored"):
        moefx.optimize(models[0], compile=False)
    assert not seen  # the example is not the user's
    expected, other = _hook(kind)(models[1].lm_head)
    assert_same_step(*models)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-5)
    handle.remove(), other.remove()
    assert is_fused(models[0])
    assert_same_step(*models)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: torch.nn.utils.parametrizations.weight_norm(head),
        lambda head: torch.nn.utils.weight_norm(head),
        lambda head: torch.nn.utils.parametrize.register_parametrization(head, "weight", torch.nn.Tanh()),
    ],
    ids=["weight_norm", "old weight_norm", "Tanh"],
)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore:.*(weight_norm|WeightNorm|computed in each call)")
def test_a_computed_weight(change, before):
    model, plain = (build("qwen3_moe"), build("qwen3_moe")) if before else twins()
    change(plain.lm_head)
    if before:
        change(model.lm_head)
        moefx.optimize(model, compile=False)
    else:
        assert is_fused(model)
        change(model.lm_head)
    assert_same_step(model, plain)
    assert not is_fused(model)
    if torch.nn.utils.parametrize.is_parametrized(plain.lm_head):
        for m in (model, plain):
            torch.nn.utils.parametrize.remove_parametrizations(m.lm_head, "weight")
        assert_same_step(model, plain)
        assert is_fused(model)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.filterwarnings("ignore:.*forward of its own")
def test_a_forward_of_its_own(before):
    def double(model: Any) -> None:
        plain = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 2 * plain(hidden)

    model, plain = (build("qwen3_moe"), build("qwen3_moe")) if before else twins()
    double(model), double(plain)
    if before:
        moefx.optimize(model, compile=False)
        assert "forward" in vars(model.lm_head)
    assert_same_step(model, plain)
    del model.lm_head.forward, plain.lm_head.forward
    assert_same_step(model, plain)
    assert is_fused(model)


# --- another loss ---


def scaled(logits, labels, vocab_size, scale=1.0, **kwargs):
    return scale * ForCausalLMLoss(logits, labels, vocab_size, **kwargs)


def smoothed(logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=0.1)


class _Loss:
    scale = 1.0

    def __call__(self, *args, **kwargs):
        return self.scale * ForCausalLMLoss(*args, **kwargs)


@pytest.mark.parametrize("loss", [scaled, functools.partial(scaled, scale=3.0), smoothed, _Loss(), _Loss().__call__])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::moefx.analysis.report.ShortfallWarning")
def test_another_loss_function(family, loss):
    models = twins(family)
    assert_same_step(*models)
    own = models[0].loss_function
    assert own is models[1].loss_function
    for m in models:
        m.loss_function = loss
        assert m.loss_function is loss
    assert_same_step(*models)
    for m in models:
        del m._loss_function
    assert_same_step(*models)
    assert is_fused(models[0]) and models[0].loss_function is own


def test_a_loss_function_that_wraps_the_models():
    models = twins()
    for m in models:
        m.loss_function = lambda *args, own=m.loss_function, **kwargs: 0.5 * own(*args, **kwargs)
    assert_same_step(*models)
    assert is_fused(models[0])


def test_a_coefficient_that_changes():
    """In a partial, in a closure, and in an object; each step has the value that it has then."""
    models, holder = twins(), _Loss()
    for scale in (1.0, 2.0, 1.0):
        holder.scale = scale
        for loss in (functools.partial(scaled, scale=scale), lambda *a, s=scale, **k: s * ForCausalLMLoss(*a, **k), holder):
            for m in models:
                m.loss_function = loss
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ShortfallWarning)
                assert_same_step(*models)
    assert any("not a function" in reason for _, reason in moefx.report(models[0]).fallbacks)


FACTOR = 1.0
FACTORS = {"loss": 1.0}


class _Settings:
    factor = 1.0


def by_number(*args, **kwargs):
    return FACTOR * ForCausalLMLoss(*args, **kwargs)


def by_container(*args, **kwargs):
    return (lambda x: FACTORS["loss"] * x)(ForCausalLMLoss(*args, **kwargs))


def by_class(*args, **kwargs):
    return _Settings.factor * ForCausalLMLoss(*args, **kwargs)


@functools.wraps(ForCausalLMLoss)
def decorated(*args, **kwargs):
    return by_number(*args, **kwargs)


@pytest.mark.parametrize(
    "loss", [by_number, by_container, by_class, decorated, functools.partial(by_number, ignore_index=-100)]
)
@pytest.mark.filterwarnings("ignore:.*whose attributes may change")
def test_a_loss_that_reads_what_changes(loss, monkeypatch):
    models = twins()
    monkeypatch.setattr("moefx.frontend.head.capture_module", capture_module)  # the tests' cache does not know these names
    for factor in (1.0, 2.0, 1.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        monkeypatch.setitem(FACTORS, "loss", factor)
        monkeypatch.setattr(_Settings, "factor", factor)
        for m in models:
            m.loss_function = loss
        assert_same_step(*models)
    assert is_fused(models[0]) == (loss is not by_class)


def test_a_new_loss_in_each_step():
    """It is not captured for ever."""
    models = twins()
    for i in range(10):
        for m in models:
            m.loss_function = functools.partial(scaled, scale=1.0 + i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShortfallWarning)
            assert_same_step(*models)
    assert any("8 other loss functions" in reason for _, reason in moefx.report(models[0]).fallbacks)


def test_another_loss_type(monkeypatch):
    monkeypatch.setitem(LOSS_MAPPING, "Smoothed", smoothed)
    models = twins()
    assert_same_step(*models)
    for m in models:
        m.loss_type = "Smoothed"
    assert_same_step(*models)
    assert (step(models[0])[0] - step(twins()[0])[0]).abs() > 1e-3


def test_another_cap_in_the_configuration():
    plain = build_scaled("beam")
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    for cap in (0.5, 0.1, 0.5, None):
        for m in (model, plain):
            m.config.final_logit_softcapping = cap
        assert_same_step(model, plain)


@pytest.mark.parametrize("name", ["granitemoe", "cohere2_moe"])
def test_another_scaling(name):
    (key, number), plain = next(iter(MODELS[name].items())), build_scaled(name)
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    for factor in (1, 2, 1):
        for m in (model, plain):
            for holder in (m, m.config):
                if hasattr(holder, key):
                    setattr(holder, key, number * factor)
        assert_same_step(model, plain)
