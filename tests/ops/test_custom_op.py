"""Opaque operations keep the contract of ``torch.library``: opcheck of the differentiable ones, and dispatch modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moefx.errors import MoefxError
from moefx.kernels import linear_cross_entropy as chunked
from moefx.ops.custom_op import opaque

CALLS: list[torch.Size] = []


@opaque("test_double")
def double(x: Tensor, by: float = 2.0) -> tuple[Tensor, Tensor]:
    """x times ``by``, and the sign of x."""
    CALLS.append(x.shape)
    return x * by, x.sign()


@double.register_fake
def _(x, by=2.0):
    return torch.empty_like(x), torch.empty_like(x)


@opaque("test_double_backward", once=True)
def double_backward(grad: Tensor, by: float) -> Tensor:
    return grad * by


@double_backward.register_fake
def _(grad, by):
    return torch.empty_like(grad)


def _save(ctx, inputs, _, output):
    ctx.by = inputs[1] if len(inputs) > 1 else 2.0
    ctx.mark_non_differentiable(output[1])


double.register_autograd(lambda ctx, grad, _: (double_backward(grad, ctx.by), None), setup_context=_save)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("arguments", [(leaf(3, 4),), (leaf(3, 4), 3.0), (torch.randn(2),), (leaf(0, 4),)])
def test_opcheck(arguments):
    torch.library.opcheck(double.overload, arguments)


@pytest.mark.parametrize("bias", [None, leaf(7)])
def test_opcheck_of_the_head(bias):
    labels = torch.tensor([0, 3, -100, 6, 2])
    needs = [True, True, bias is not None]
    torch.library.opcheck(chunked._chunked.overload, (leaf(5, 4), leaf(7, 4), bias, labels, -100, True, needs, 0.5, 30.0))


def test_modes_see_the_operation():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        double(torch.ones(2))
    assert double.overload in seen
    CALLS.clear()
    with FakeTensorMode() as mode:
        out, _ = double(mode.from_tensor(torch.ones(2, 3)))
    assert out.shape == (2, 3) and not CALLS


def test_vmap_takes_row_after_row():
    x = torch.randn(2, 3)
    CALLS.clear()
    assert torch.equal(torch.vmap(lambda x: double(x)[0])(x), 2 * x)
    assert CALLS == [(3,), (3,)]


@pytest.mark.parametrize("by_compiler", [False, True])
def test_gradients_checkpointing_and_autocast(by_compiler):
    def fn(x):
        return double(x, 3.0)[0]

    fn = torch.compile(fn, fullgraph=True, backend="aot_eager") if by_compiler else fn
    x = leaf(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(fn, x, use_reentrant=False)
    assert out.dtype == torch.float32
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, torch.full((4,), 3.0))


def test_a_second_backward_is_refused():
    x = leaf(4)
    with pytest.raises(MoefxError, match=r"moefx::test_double is to be differentiated \(create_graph=True\)"):
        torch.autograd.grad(double(x)[0].sum(), x, create_graph=True)
    with pytest.raises(MoefxError, match="cannot be differentiated again"):
        double_backward(x, 2.0)
