"""Lazy logits are those of the forward that made them, or an error, wherever and whenever they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from moefx.errors import MoefxError
from moefx.frontend.lazy_logits import LazyLogits, Projection


def lazy(dtype=torch.float32):
    hidden, lm_head = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True), torch.nn.Linear(4, 5, bias=False, dtype=dtype)
    return LazyLogits(hidden, Projection(lm_head)), lm_head(hidden)


@pytest.mark.parametrize(
    "form",
    [lambda x: x * 2.5, lambda x: 2 * x, lambda x: x / 3, lambda x: torch.div(x, 3.0), lambda x: x.tanh(), lambda x: torch.mul(x, 2),
     lambda x: torch.tanh(x.float() / 30.0).mul(30.0), lambda x: (x * 0.5).to(torch.float64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_taken_later(form, dtype):
    logits, wanted = lazy(dtype)
    logits, wanted = form(logits), form(wanted)
    assert isinstance(logits, LazyLogits) and logits.logits is None
    assert logits.dtype == wanted.dtype and logits.shape == wanted.shape
    assert torch.equal(logits.detach(), wanted)


@pytest.mark.parametrize(
    "form",
    [lambda x: 2 / x, lambda x: x * torch.tensor(2.0), lambda x: x + 1, lambda x: torch.div(x, 2.0, rounding_mode="floor"), lambda x: x.mul_(2.0)],
)  # fmt: skip
def test_other_steps_read_the_logits(form):
    logits, wanted = lazy()
    found = form(logits)
    assert not isinstance(found, LazyLogits)
    torch.testing.assert_close(found, form(wanted))


# --- modes ---


MODES: dict[str, Callable[[], Any]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("made", MODES)
def test_computed_in_the_modes_of_the_forward(made, read, dtype):
    lm_head = nn.Linear(4, 8, dtype=dtype)
    x = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    with MODES[made]():
        hidden = x * 2
        logits, wanted = LazyLogits(hidden, Projection(lm_head)), lm_head(hidden)
    assert (logits.dtype, logits.requires_grad) == (wanted.dtype, wanted.requires_grad)
    with MODES[read]():
        logits.argmax(-1)
    assert torch.equal(logits.clone(), wanted.clone())
    assert logits.requires_grad == wanted.requires_grad and logits.is_inference() == wanted.is_inference()
    if wanted.requires_grad:
        given = (x, lm_head.weight, lm_head.bias)
        found = [torch.autograd.grad(out.float().logsumexp(-1).mean(), given, retain_graph=True) for out in (logits, wanted)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_a_target(around):
    logits, wanted = lazy()
    with around():
        target = logits * 2
    assert not target.requires_grad and not isinstance(target, LazyLogits)
    assert torch.equal(target, wanted.detach() * 2) and logits.requires_grad


def test_a_cast_outside_of_autocast_stays_lazy():
    """Accelerate casts outputs to float32 after its autocast context."""
    lm_head = nn.Linear(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.randn(2, 3, 4)
        logits, wanted = LazyLogits(hidden, Projection(lm_head)), lm_head(hidden)
    logits = logits.float()
    assert isinstance(logits, LazyLogits) and logits.logits is None
    assert torch.equal(logits.detach(), wanted.float())


# --- changes before they are read ---


def _step(optimizer: Callable, lm_head: nn.Linear) -> None:
    made = optimizer(lm_head.parameters(), lr=0.1)
    for p in lm_head.parameters():
        p.grad = torch.ones_like(p)
    made.step()


def _add(lm_head: nn.Linear) -> None:
    with torch.no_grad():
        lm_head.bias.add_(1)


def _replace_data(lm_head: nn.Linear) -> None:
    lm_head.weight.data = torch.ones(8, 4)


def _write_data(lm_head: nn.Linear) -> None:
    lm_head.weight.data[0, 0] += 1e-3


def _cast(lm_head: nn.Linear) -> None:
    lm_head.to(torch.float64)


def _load(lm_head: nn.Linear, assign: bool) -> None:
    lm_head.load_state_dict({n: t + 1 for n, t in lm_head.state_dict().items()}, assign=assign)


def _parametrize(lm_head: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(lm_head)


def _freeze(lm_head: nn.Linear) -> None:
    lm_head.requires_grad_(False)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "foreach AdamW": partial(torch.optim.AdamW, foreach=True),
    "fused AdamW": partial(torch.optim.AdamW, fused=True),
    "fused SGD": partial(torch.optim.SGD, fused=True),
    "Adafactor": torch.optim.Adafactor,
}
CHANGES: dict[str, tuple[Callable, str]] = {
    **{name: (partial(_step, o), "through .data or by a fused" if "fused" in name else "in place") for name, o in OPTIMIZERS.items()},
    "add_": (_add, r"bias was changed in place \(version 2, it was 1\)"),
    "data =": (_replace_data, "other data"),
    "data[...] +=": (_write_data, "through .data"),
    "to": (_cast, "cast to torch.float64 from torch.float32"),
    "load_state_dict": (partial(_load, assign=False), "in place"),
    "requires_grad_": (_freeze, "was frozen"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_have_changed(name):
    change, said = CHANGES[name]
    lm_head = nn.Linear(4, 8)
    hidden = torch.randn(2, 3, 4, requires_grad=True) * 1
    logits, again = (LazyLogits(hidden, Projection(lm_head)) for _ in range(2))
    wanted = lm_head(hidden).detach()
    assert torch.equal(again.detach(), wanted)
    change(lm_head)
    for _ in range(2):
        with pytest.raises(MoefxError, match=said):
            logits.sum()
    assert torch.equal(again.detach(), wanted)  # read before


@pytest.mark.parametrize(
    "change", [partial(_load, assign=True), _parametrize, lambda m: setattr(m, "weight", None), lambda m: m.requires_grad_()]
)
def test_the_parameters_of_the_forward_are_used(change):
    """Also where others have taken their places since, as after ``torch.func.functional_call``."""
    lm_head = nn.Linear(4, 8).requires_grad_(False)
    lm_head.weight.requires_grad_()
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    logits, wanted, given = LazyLogits(hidden, Projection(lm_head)), lm_head(hidden), (hidden, lm_head.weight)
    change(lm_head)
    assert torch.equal(logits.detach(), wanted.detach())
    found = [torch.autograd.grad(x.logsumexp(-1).sum(), given, retain_graph=True) for x in (logits, wanted)]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    logits.sum().backward()
    assert lm_head.bias is None or lm_head.bias.grad is None


@pytest.mark.parametrize("shape", [(5, 3), (8, 4), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_number_is_looked_at(dtype, shape):
    """Also where the bits do not fill 64-bit integers."""
    lm_head = nn.Linear(*reversed(shape), dtype=dtype)
    logits = LazyLogits(torch.randn(2, shape[1], dtype=dtype), Projection(lm_head))
    lm_head.weight.data[-1, -1] += 1
    with pytest.raises(MoefxError, match="through .data"):
        logits.sum()


def test_hidden_states_that_have_changed():
    lm_head, hidden = nn.Linear(4, 8), torch.randn(2, 3, 4)
    logits = LazyLogits(hidden, Projection(lm_head))
    hidden.mul_(2)
    with pytest.raises(MoefxError, match="lm_head's input was changed in place"):
        logits.sum()


# --- gradients of logits ---


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.float() * 2])
def test_hooks_of_the_caller(form):
    logits, wanted = map(form, lazy())
    seen = []
    for x in (logits, wanted):
        handle = x.register_hook(lambda g: seen.append(g) or 2 * g)
        x.retain_grad()
        x.logsumexp(-1).sum().backward()
        handle.remove()
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(logits.grad, wanted.grad)


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, x: x.register_hook(lambda g: g),
        lambda loss, x: x.retain_grad(),
        lambda loss, x: torch.autograd.grad(loss, x, allow_unused=True),
        lambda loss, x: torch.autograd.grad(loss, [x.float() * 2], allow_unused=True),
    ],
)
def test_no_gradient_reaches_logits_that_the_loss_did_without(ask):
    logits, _ = lazy()
    logits.skipped = True
    with pytest.raises(MoefxError, match="call the model without labels"):
        ask(logits.hidden.sum(), logits)
