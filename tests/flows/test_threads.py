"""Models captured and trained by several threads at once."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import masking_utils

import moefx
from tests.support.families import batch, build


def test_threads_that_capture_and_one_that_trains():
    """Calls of other kinds are captured while another thread trains a model that asks for lengths and has Functions of its own."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    done = False

    models = [(build("qwen3_moe", seed), build("qwen3_moe", seed)) for seed in (0, 1)]  # the random numbers are of all threads
    model = build("qwen3_moe", 7)

    def captures(pair):
        plain, model = pair
        moefx.optimize(model, compile=False)
        for kind in ({}, {"num_items_in_batch": 5}, {"attention_mask": torch.tensor([[0, 0, *[1] * 7]] * 2)}):
            wanted, loss = (m(**batch(2, 9), **kind).loss for m in (plain, model))
            wanted.backward()
            loss.backward()
            torch.testing.assert_close(loss, wanted)
        for p, w in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, w.grad, rtol=1e-3, atol=1e-5)
        assert not moefx.report(model).fallbacks
        return True

    def trains():
        steps = 0
        wanted = model(**batch(2, 9)).loss.detach()
        while not done or not steps:
            assert torch.equal(model(**batch(2, 9)).loss, wanted)
            x = torch.ones(3, requires_grad=True)
            Twice.apply(x).sum().backward()
            assert x.grad.tolist() == [2.0] * 3
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                warnings.warn("heard", stacklevel=1)
            assert len(seen) == 1
            steps += 1
        return steps

    before = list(warnings.filters)
    with ThreadPoolExecutor(3) as pool:
        third = pool.submit(trains)
        try:
            assert list(pool.map(captures, models)) == [True, True]
        finally:
            done = True
        assert third.result() > 2
    assert [f for f in warnings.filters if f[1].__class__.__name__ != "_WhileSilent"] == before
    assert logging.getLogger("torch._subclasses.fake_tensor").disabled is False
    assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0, 1]])).tolist() == [[0, 0, 1, 1]]
