"""Llama 4 runs every expert on every token; matched, an expert runs on its own tokens: the same numbers, and reported misses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import moefx
from moefx import ops
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import flatten
from moefx.ir.graph import aten
from moefx.passes import default
from moefx.rewriting import certify
from tests.support.families import batch, build


def nodes(model):
    return [n.meta.get("semantic", n.target) for f in moefx.report(model).program for n in f.graph.nodes]


def of_one_expert(model):
    """All logits of a token are equal, and the first of equals gets it."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.feed_forward.router.weight.copy_(layer.feed_forward.router.weight[:1].clone().expand(8, -1))


@pytest.mark.parametrize(
    ("rows", "length", "seed", "routing", "dtype"),
    [
        (2, 17, 0, "real", torch.float32),
        (1, 1, 1, "real", torch.float32),
        (3, 5, 2, "real", torch.bfloat16),
        (2, 9, 3, "one expert", torch.float32),
        (2, 9, 3, "one expert", torch.bfloat16),
    ],
)
def test_loss_and_all_gradients(rows, length, seed, routing, dtype):
    model = build("llama4_text", seed).to(dtype)
    if routing == "one expert":
        of_one_expert(model)
    exact, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    moefx.optimize(model, compile=False, strict=True)
    assert (
        nodes(model).count(ops.experts) == 1
        and aten.bmm.default not in nodes(model)
        and aten.repeat.default not in nodes(model)
    )
    given, far = batch(rows, length, seed), {}
    if length == 1:
        given["labels"] = torch.full_like(given["input_ids"], 7)
        given["shift_labels"] = given["labels"]  # one token predicts something too
    for name, m in (("exact", exact), ("plain", plain), ("moefx", model)):
        loss = m(**given, use_cache=False).loss
        loss.backward()
        far[name] = float(loss.detach()), {n: p.grad.double() for n, p in m.named_parameters() if p.grad is not None}
    wanted = far["exact"][1]
    assert far["moefx"][1].keys() == wanted.keys() == far["plain"][1].keys()
    assert far["moefx"][0] == pytest.approx(far["exact"][0], rel=1e-5 if dtype == torch.float32 else 2e-2)
    for n, w in wanted.items():
        found, allowed = (float((far[who][1][n] - w).norm()) for who in ("moefx", "plain"))
        assert found <= 1.5 * allowed + (1e-5 if dtype == torch.float32 else 2e-2) * float(w.norm()) + 3e-6, (
            n
        )  # of one token, queries have none


def test_several_experts_a_token_stay_as_they_are():
    """Each scales its own input, where moefx.experts has one input per token."""
    model = build("llama4_text", num_experts_per_tok=2)
    with pytest.warns(UserWarning, match="dense_experts: 0 of 1 in Llama4TextDecoderLayer"):
        moefx.optimize(model, compile=False)
    (missed,) = {c.what for c in moefx.report(model)["dense_experts"].missed if "2 experts per token" in c.what}
    assert "each scale their input" in missed and nodes(model).count(aten.bmm.default) == 2
    assert moefx.verify(model, batch(2, 9)).ok


def test_experts_that_were_not_raised_are_not_cut():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(
            moefx.MoefxError, match="ep_size=2, but the experts of Llama4TextDecoderLayer run on every token and were not"
        ):
            moefx.optimize(build("llama4_text"), ep_size=2, compile=False, pipeline=default().without("dense_experts"))
    finally:
        dist.destroy_process_group()


def test_something_alike_is_not_taken_for_it():
    """A router whose scores for the others are not zero."""
    model = build("llama4_text")

    def forward(self, hidden_states):
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        value, index = torch.topk(logits, self.top_k, dim=1)
        return torch.sigmoid(torch.full_like(logits, -1.0).scatter_(1, index, value).float()).to(logits.dtype), logits

    router = type(model.model.layers[0].feed_forward.router)
    own, router.forward = router.forward, forward
    try:
        with pytest.warns(UserWarning, match="dense_experts"):
            moefx.optimize(model, compile=False)
        assert nodes(model).count(aten.bmm.default) == 2 and moefx.verify(model, batch(2, 9)).ok
    finally:
        router.forward = own


def test_rotations_as_complex_numbers_have_features_whatever_the_length_is():
    tensors = [torch.zeros(2, 8, 64), torch.zeros(2, 8, 8, dtype=torch.complex64), torch.zeros(2, 8, 8)]
    assert Call.of(tensors, flatten((), {})[1], True).sizes == (("a", "b", 64), ("a", "b", 8), ("a", "b", 8))


def test_a_published_models_experts_are_compared_in_small(monkeypatch):
    """Llama 4 Scout's sizes: 16 experts of 5120 x 16384 would take minutes and 20 GB in float64."""
    largest = []
    gradients = certify._gradients

    def watched(outputs, inputs, seed):
        largest.append(max(t.numel() for t in inputs))
        return gradients(outputs, inputs, seed)

    monkeypatch.setattr(certify, "_gradients", watched)
    with torch.device("meta"):
        model = build("llama4_text", hidden_size=5120, intermediate_size=8192, num_local_experts=16, num_hidden_layers=1)
    moefx.optimize(model, compile=False)
    assert moefx.report(model)["dense_experts"].made_count == 1 and max(largest) < 1e6


def test_large_sizes_keep_their_proportions_and_stay_apart():
    sizes = certify.Sizes()
    hidden, both, inner, words, small = (sizes(n) for n in (5120, 16384, 8192, 151936, 1000))
    assert both == 2 * inner and small == 1000 and max(hidden, both, inner, words) < 100
    assert len({hidden, both, inner, words}) == 4
