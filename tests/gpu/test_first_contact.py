"""Trainings as new users write them, on a GPU: generated ones, and replicas of nn.DataParallel."""

from __future__ import annotations

import copy

import pytest
import torch

import moefx
from tests.flows.first_contact import Case, differences
from tests.support.families import batch, build


@pytest.mark.parametrize("seed", range(20))
def test_cases(seed):
    """Half of the models are moved to the GPU after optimize; optimizers take foreach by default there."""
    assert differences(Case.drawn(seed), device="cuda", moved=seed % 2 == 1) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_of_data_parallel():
    plain = build("qwen3_moe").cuda()
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    given = {k: v.cuda() for k, v in batch(4, 9).items()}
    with pytest.warns(UserWarning, match="one process per GPU"):
        torch.nn.DataParallel(model)(**given, return_dict=False)[0].mean().backward()
    torch.nn.DataParallel(plain)(**given, return_dict=False)[0].mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
