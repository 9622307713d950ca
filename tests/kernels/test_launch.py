"""Kept launches: which arguments are reused, and which are bound anew."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler import CompiledKernel

from moefx.kernels import launch


class Compiled(CompiledKernel):
    def __init__(self, calls):
        self.calls, self.module = calls, None

    def __getitem__(self, grid):
        return lambda *args, stream: self.calls.append((grid, stream, *args))


class Kernel:
    """Two tensors, a number, two constants, as Triton would compile it; or as its interpreter would run it."""

    arg_names = ("x", "y", "n", "B", "A")

    def __init__(self, compiles=True):
        self.compiles, self.slow, self.quick = compiles, [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.slow.append((grid, args, constants))
            return Compiled(self.quick) if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda device: ("stream", device))
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))


def test_the_second_call_is_bound_in_the_kernels_order():
    kernel = Kernel()
    call, x, y = launch.Launch(kernel, 7, A="a", B="b", num_warps=4), torch.empty(8), torch.empty(8)
    call((3, 2, 1), x, y)
    assert kernel.slow == [((3, 2, 1), (x, y, 7), {"A": "a", "B": "b", "num_warps": 4})] and not kernel.quick
    call((5, 1, 1), y, x)
    assert len(kernel.slow) == 1 and kernel.quick == [((5, 1, 1), ("stream", -1), y, x, 7, "b", "a")]


@pytest.mark.parametrize("other", [torch.empty(8, dtype=torch.float64), torch.empty(16)[1:9]], ids=["dtype", "alignment"])
def test_what_triton_compiles_differently_is_told_apart(other):
    kernel = Kernel()
    call, x = launch.Launch(kernel, 7, A=1, B=2), torch.empty(8)
    for y in (x, other, x, other):
        call((1, 1, 1), x, y)
    assert [args[1] is other for _, args, _ in kernel.slow] == [False, True]
    assert [args[3] is other for args in kernel.quick] == [False, True]


def test_the_interpreter_is_asked_each_time():
    kernel = Kernel(compiles=False)
    call, x = launch.Launch(kernel, 7, A=1, B=2), torch.empty(8)
    call((1, 1, 1), x, x)
    call((2, 1, 1), x, x)
    assert len(kernel.slow) == 2


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "_MANY", 2)
    call, x = launch.Launch(Kernel(), 7, A=1, B=2), torch.empty(8)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        call((1, 1, 1), x, x.to(dtype))
        assert len(call.ready) <= 2
