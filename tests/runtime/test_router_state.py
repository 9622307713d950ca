"""Routers' choices: kept for recomputation, recorded and replayed, counted, balanced."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

import moefx
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against
from tests.support.families import FAMILIES, batch, build, experts_of

pytestmark = pytest.mark.usefixtures("cached_captures")


def optimized(model, **options):
    return moefx.optimize(copy.deepcopy(model), strict=True, **{"compile": False, **options})


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def far(a, b):
    """The largest difference of two sets of gradients, relative to the largest gradient."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(g.abs().max()) for g in a.values())


def gates(model):
    return [m for m in model.modules() if type(m).__name__.endswith(("Router", "Gate")) and hasattr(m, "weight")]


def nearly_tied(model):
    """Four experts of Qwen3-MoE get the same logits, and the other four: the smallest rounding chooses two of them."""
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.copy_(gate.weight[:2].repeat_interleave(4, dim=0))
    return model


def nudge(model):
    """What a recomputation on a GPU may do to logits: other roundings."""
    generator = torch.Generator().manual_seed(3)
    for gate in gates(model):
        gate.weight.data.add_(torch.randn(gate.weight.shape, generator=generator), alpha=1e-6)


@contextmanager
def checkpointing_hf(model, reentrant):
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    yield
    model.gradient_checkpointing_disable()


@contextmanager
def checkpointing_some(model, reentrant):
    """Selective: the last block only, by PyTorch's own function around it."""
    block = model.model.layers[-1]
    forward = block.forward
    block.forward = lambda x, **named: checkpoint(partial(forward, **named), x, use_reentrant=reentrant)
    yield
    del block.forward


@contextmanager
def checkpointing_ops(model, reentrant):
    """Selective by operation: what matrix products give is kept, the rest computed again, the routers' logits (of 8) too."""

    def policy(context, op, *args, **kwargs):
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[-1].shape[-1] != 8
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": reentrant, "context_fn": contexts})
    yield
    model.gradient_checkpointing_disable()


CHECKPOINTING = [(how, reentrant) for how in (checkpointing_hf, checkpointing_some) for reentrant in (False, True)]
CHECKPOINTING.append((checkpointing_ops, False))


@pytest.mark.parametrize(("how", "reentrant"), CHECKPOINTING)
def test_plain_transformers_trains_other_experts_than_it_ran(how, reentrant):
    """What the next test is about."""
    b, plain, flipped = batch(2, 40, seed=1), nearly_tied(build("qwen3_moe")), nearly_tied(build("qwen3_moe"))
    plain(**b).loss.backward()
    with how(flipped, reentrant):
        loss = flipped(**b).loss
        nudge(flipped)
        loss.backward()
    assert far(gradients(plain), gradients(flipped)) > 1e-2


@pytest.mark.parametrize("compile", [False, "aot_eager"])
@torch._dynamo.config.patch(assume_static_by_default=False)  # compiled for any length at once
def test_routes_are_not_computed_again(compile):
    model = optimized(build("qwen3_moe"), compile=compile)
    for how, reentrant in CHECKPOINTING:
        nearly_tied(model)
        with how(model, reentrant):
            for seed in (1, 2):  # the second backward must not take the first one's routes
                b = batch(2, 40 + seed, seed=seed)
                plain = build("qwen3_moe")
                plain.load_state_dict(model.state_dict())
                plain(**b).loss.backward()
                loss = model(**b).loss
                nudge(model)
                loss.backward()
                assert far(gradients(plain), gradients(model)) < 1e-4, (how, reentrant, seed)
    assert not moefx.report(model).notes


def test_accumulated_forwards_keep_their_own_routes():
    """Two forwards, then their backwards in the wrong order."""
    plain, model = nearly_tied(build("qwen3_moe")), optimized(nearly_tied(build("qwen3_moe")))
    model.activation_checkpointing_enable({"use_reentrant": False})
    batches = [batch(2, 20, seed=s) for s in (1, 2)]
    for b in batches:
        plain(**b).loss.backward()
    losses = [model(**b).loss for b in batches]
    nudge(model)
    for loss in losses:
        loss.backward()
    assert far(gradients(plain), gradients(model)) < 1e-4


def test_blocks_between_streams_of_hidden_states():
    """Hyper-connections: a block takes [B, S, streams, H], its router B * S tokens."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config("hy_v4")).train()
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    b = batch(2, 13)
    for reentrant in (False, True):
        for m in (plain, model):
            m.activation_checkpointing_enable({"use_reentrant": reentrant})
        against(plain, model, b).raise_if_wrong()
    moefx.enable_load_tracking(model)
    with moefx.record_routes(model) as routes:
        wanted = model(**b).loss
    assert {tuple(r.shape) for r in routes.values()} == {(26, 2)}
    assert all(torch.equal(n, torch.bincount(routes[p].flatten(), minlength=8)) for p, n in moefx.expert_load(model).items())
    with moefx.replay_routes(model, routes):
        assert torch.equal(model(**b).loss, wanted)
        with (
            moefx.replay_routes(model, routes),
            pytest.raises(moefx.MoefxError, match=r"are \[26, 2\], this call wants \[24, 2\]"),
        ):
            model(**batch(2, 12))


def test_a_lost_input_is_said():
    """Saved on the CPU by the user, the checkpoint's input comes back as another tensor: routes are computed again."""
    model = optimized(build("qwen3_moe"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = model(**batch(1, 8)).loss
    loss.backward()
    assert any("recomputed in the backward" in text for _, text in moefx.report(model).notes)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((name, torch.float32) for name in FAMILIES),
        *((name, torch.bfloat16) for name in ("qwen3_moe", "gpt_oss", "nemotron_h")),
    ],
)
def test_recorded_and_replayed(family, dtype):
    model = optimized(build(family).to(dtype))
    b = batch(2, 9, seed=1)
    with moefx.record_routes(model) as routes:
        loss = model(**b).loss
    loss.backward()
    wanted = gradients(model)
    calls, top_k = experts_of(family)
    assert len(routes) == calls and all(r.shape == (18, top_k) and r.dtype == torch.int64 for r in routes.values())
    with moefx.replay_routes(model, routes):
        again = model(**b).loss
    again.backward()
    assert torch.equal(loss, again) and far(wanted, gradients(model)) == 0


def test_others_routes_are_followed():
    """Against plain Transformers whose routers are told the same experts: loss and all gradients."""
    plain = build("qwen3_moe")
    model = optimized(plain)
    b = batch(2, 9, seed=1)
    generator = torch.Generator().manual_seed(0)
    told = {f"model.layers.{i}.mlp.experts": torch.rand(18, 8, generator=generator).topk(2).indices for i in range(2)}

    def hook(path, gate, args, out):
        logits, _, _ = out
        chosen = F.softmax(logits.float(), dim=-1).gather(1, told[path])
        return logits, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype), told[path]

    for i, layer in enumerate(plain.model.layers):
        layer.mlp.gate.register_forward_hook(partial(hook, f"model.layers.{i}.mlp.experts"))
    wanted = plain(**b).loss
    wanted.backward()
    with moefx.replay_routes(model, told), moefx.record_routes(model) as seen:
        loss = model(**b).loss
    loss.backward()
    assert torch.allclose(wanted, loss, rtol=1e-6) and all(torch.equal(seen[k], told[k]) for k in told)
    assert far(gradients(plain), gradients(model)) < 1e-5
    assert not torch.allclose(model(**b).loss, loss)


def test_bad_routes():
    model = optimized(build("qwen3_moe"))
    with moefx.record_routes(model) as routes:
        model(**batch(2, 9))
    with moefx.replay_routes(model, routes), pytest.raises(moefx.MoefxError, match=r"are \[18, 2\], this call wants \[16, 2\]"):
        model(**batch(2, 8))
    routes.pop("model.layers.1.mlp.experts")
    with (
        moefx.replay_routes(model, routes),
        pytest.raises(moefx.MoefxError, match="no routes to replay for model.layers.1.mlp.experts"),
    ):
        model(**batch(2, 9))
    without = optimized(build("qwen3_moe"), pipeline=moefx.passes.default().without("expose_routes"))
    with pytest.raises(moefx.MoefxError, match="is the pass 'expose_routes' in the pipeline"), moefx.record_routes(without):
        pass


def test_load_is_counted():
    model = optimized(build("qwen3_moe"))
    with pytest.raises(moefx.MoefxError, match="enable_load_tracking"):
        moefx.expert_load(model)
    moefx.enable_load_tracking(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    indices = []
    for seed in (1, 2):  # accumulation; the recomputation must not count twice
        with moefx.record_routes(model) as routes:
            loss = model(**batch(2, 9, seed=seed)).loss
        loss.backward()
        indices.append(routes)
    model.eval()
    model(**batch(2, 9))  # an evaluation is not training
    for reader in ("a", "b"):
        load = moefx.expert_load(model, reader)
        for path, counts in load.items():
            assert torch.equal(counts, sum(torch.bincount(r[path].flatten(), minlength=8) for r in indices))
    assert all(int(c.sum()) == 0 for c in moefx.expert_load(model, "a").values())
    metrics = moefx.expert_load_metrics(load)
    p = load["model.layers.0.mlp.experts"] / 72
    assert metrics["max_load/model.layers.0.mlp.experts"] == pytest.approx(8 * float(p.max()))
    assert metrics["entropy/model.layers.0.mlp.experts"] == pytest.approx(
        float(torch.special.entr(p).sum() / torch.tensor(8.0).log())
    )
    assert metrics["dropped"] == 0 and metrics["max_load"] >= 1
    collapsed = moefx.expert_load_metrics({"x": torch.tensor([64, 0, 0, 0])})
    assert collapsed["max_load"] == 4 and collapsed["entropy"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "nemotron_h"])
def test_bias_balances(family):
    """From routers that prefer one expert, moving only the bias: the busiest expert's load falls."""
    model = optimized(build(family))
    for m in model.modules():
        if "e_score_correction_bias" in m._buffers:
            m.e_score_correction_bias[3] = 0.3
    moefx.enable_load_tracking(model)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    model(**batch(4, 32, seed=1))
    load = moefx.expert_load(model)
    moefx.update_router_bias(model, 1e-2, load)
    for name, before in biases.items():
        path = name.replace("gate.e_score_correction_bias", "experts")
        counts = load[path].float()
        assert torch.allclose(model.get_buffer(name) - before, 1e-2 * torch.sign(counts.mean() - counts))
    first = moefx.expert_load_metrics(load)["max_load"]
    for _ in range(40):
        moefx.expert_load(model, "last")
        model(**batch(4, 32, seed=1))
        moefx.update_router_bias(model, 1e-2)
    assert moefx.expert_load_metrics(moefx.expert_load(model, "last"))["max_load"] < 0.8 * first


def test_bias_refused():
    model = optimized(build("qwen3_moe"))
    moefx.enable_load_tracking(model)
    with pytest.raises(moefx.MoefxError, match="no router of Qwen3MoeForCausalLM has a bias"):
        moefx.update_router_bias(model)
    model = build("deepseek_v3")
    for m in model.modules():
        if "e_score_correction_bias" in m._buffers:
            m.e_score_correction_bias = m.e_score_correction_bias.bfloat16()
    model = optimized(model)
    moefx.enable_load_tracking(model)
    model(**batch(1, 4))
    with pytest.raises(moefx.MoefxError, match="would be lost: keep it in float32"):
        moefx.update_router_bias(model)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("return_dict", [True, False])
def test_router_z_loss(checkpointed, return_dict):
    plain = build("qwen3_moe")
    model = optimized(plain, router_z_loss=0.1)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    b = batch(2, 9, seed=1)
    out = plain(**b, output_router_logits=True)
    z = sum(torch.logsumexp(x.float(), -1).square().mean() for x in out.router_logits)
    wanted = out.loss - plain.router_aux_loss_coef * out.aux_loss + 0.1 * z
    wanted.backward()
    loss = model(**b, return_dict=return_dict)[0]
    loss.backward()
    assert torch.allclose(wanted, loss, rtol=1e-6)
    assert far(gradients(plain), gradients(model)) < 1e-5
    with pytest.raises(moefx.MoefxError, match="router_z_loss=-1 is not a coefficient"):
        optimized(plain, router_z_loss=-1)


def test_router_z_loss_that_would_be_lost():
    model = optimized(build("qwen3_moe"), router_z_loss=0.1)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(moefx.MoefxError, match="hides its routers' logits from the loss.*pass use_reentrant=False"):
        model(**batch(2, 9))
    with torch.no_grad():
        model(**batch(2, 9))  # nobody wants gradients of it
    own = AutoModelForCausalLM.from_config(tiny_config("doge"))
    with pytest.raises(moefx.MoefxError, match="no router of DogeForCausalLM was captured"):
        moefx.optimize(own, compile=False, router_z_loss=0.1)
    assert not hasattr(own, "_moefx")
    some = AutoModelForCausalLM.from_config(tiny_config("deepseek_v4"))
    with pytest.warns(
        moefx.ShortfallWarning, match="router_z_loss: without the logits of 1 of 3 routers, of model.layers.0.mlp"
    ):
        moefx.optimize(some, compile=False, router_z_loss=0.1)


def test_balanced_routing_is_balanced_and_loud():
    with pytest.warns(UserWarning, match="for benchmarks only"):
        model = optimized(build("deepseek_v3"), balanced_routing=True)
    assert "FOR BENCHMARKS ONLY" in str(moefx.report(model))
    moefx.enable_load_tracking(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with moefx.record_routes(model) as routes:
        model(**batch(2, 9)).loss.backward()
    assert all((c - c.double().mean()).abs().max() < 1 for c in moefx.expert_load(model).values())
    assert all((r[:, 0] != r[:, 1]).all() for r in routes.values())


def test_check_numerics():
    model = optimized(build("deepseek_v3"), check_numerics=True)
    model(**batch(2, 9))
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[3] = float("nan")
    with pytest.raises(moefx.MoefxError, match=r"^forward 2: 18 of the routing logits of model.layers.2.mlp are NaN"):
        model(**batch(2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(build("deepseek_v3"))(**batch(2, 9))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text", "nemotron_h"])
def test_deterministic(family):
    """Two runs of two steps, the same to the last bit, under PyTorch's own switch."""
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            model = optimized(build(family))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for seed in (1, 2):
                model(**batch(2, 33, seed=seed)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, found[1][n]) for n, a in found[0].items())
