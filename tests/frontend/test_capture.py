"""What capture refuses: calls whose graph would hold for one size, or lose a gradient, each with its reason."""

from __future__ import annotations

import pytest
import torch

import moefx
from tests.support.passes import captured


def test_capture_refuses_an_autograd_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 7

    with pytest.raises(moefx.CaptureError, match="autograd.Function .*Twice, whose backward a captured graph would lose"):
        captured(Twice.apply, [torch.randn(3, 17)])


def test_capture_refuses_a_baked_length_and_data_dependent_python():
    def loops(x):
        return sum(x[:, i] for i in range(x.shape[1]))

    with pytest.raises(moefx.CaptureError, match="its graph would hold for one value only of the sequence length"):
        captured(loops, [torch.randn(3, 17, 4)])
    with pytest.raises(moefx.CaptureError, match="data"):
        captured(lambda x: x * 2 if x.sum() > 0 else x, [torch.randn(3, 17, 4)])


@pytest.mark.parametrize(
    ("asks", "question"),
    [
        (lambda x: x * 2 if x.shape[1] > 8 else x, r"n > 8, for lengths, .*test_capture.py:\d+\): here it is so"),
        (lambda x: x * 2 if x.shape[1] == 1 else x, r"Eq\(n, 1\), .*: here it is not so"),
        (lambda x: x * 2 if x.shape[1] % 2 else x, r"Mod\(n, 2\)"),
        (lambda x: x * 2 if x.shape[0] * x.shape[1] < 4096 else x, r"m\*n < 4096|n\*m < 4096"),
    ],
)
def test_capture_refuses_python_that_asks_for_a_length(asks, question):
    with pytest.raises(moefx.CaptureError, match=question):
        captured(asks, [torch.randn(3, 17, 4)])


def test_capture_takes_python_whose_question_has_one_answer():
    def asks(x, y):
        return x + y if x.shape[1] == y.shape[1] and x.shape[1] > 0 else x

    captured(asks, [torch.randn(3, 17, 4), torch.randn(3, 17, 4)])


def test_capture_refuses_floats_from_no_grad():
    def hidden(x):
        with torch.no_grad():
            scale = x.sum(-1, keepdim=True)
        return x * scale

    with pytest.raises(moefx.CaptureError, match="no_grad"):
        captured(hidden, [torch.randn(3, 17, 4)])
