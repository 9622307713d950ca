"""The te backend's kernels around a stand-in for Transformer Engine, on a CPU."""

import pytest
import torch

from moefx import ops
from moefx.backends import te
from moefx.errors import MoefxError
from moefx.kernels.te import attention
from tests.support import grouped_checks, te_standin
from tests.support import te_checks as checks

CPU = "cpu"


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    te_standin.install(monkeypatch)
    yield
    te_standin.forget()


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 4, 8), (0, 8)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(shape, offset, residual):
    checks.check_norm(shape, torch.float32, CPU, offset, residual)
    checks.check_norm(shape, torch.bfloat16, CPU, offset, residual)


@pytest.mark.parametrize("name", checks.ROUTERS)
def test_routers(name):
    for tokens in (0, 1, 37):
        checks.check_router(name, tokens, CPU)


def test_a_scale_of_each_experts_own():
    logits, scale = checks.normal(5, 8), checks.normal(8, seed=1)
    wanted, _ = ops.route(logits, None, 2, renormalize=True, expert_scale=scale)
    found, _ = te.route(logits, None, 2, renormalize=True, expert_scale=scale)
    torch.testing.assert_close(found, wanted)


def test_aux_loss():
    checks.check_aux_loss(3, 17, 8, 2, CPU)


@pytest.mark.parametrize("name", checks.ATTENTIONS)
def test_attention(name):
    checks.check_attention(name, CPU)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (37, 3)])
def test_permutation(tokens, top_k):
    checks.check_permutation(tokens, top_k, torch.float32, CPU)


@pytest.mark.parametrize("name", checks.EXPERTS)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0], [0, 7]])
def test_grouped_mlp(name, counts):
    checks.check_grouped_mlp(name, counts, torch.float32, CPU, grad_scale=0.5)


@pytest.mark.parametrize("case", [c for c in grouped_checks.CASES if not c[2]], ids=str)  # with spare rows it is refused
def test_grouped_mlp_makes_its_rows_again(case):
    grouped_checks.check_rows_are_made_again(te.grouped_mlp, *case, torch.float32, CPU)


def test_attention_that_would_not_run_fused_says_what_transformer_engine_says():
    said = attention.why_not_fused(torch.bfloat16, 1, 4, 4, 64, 512, 512, 1.0, True, None, False)
    assert (
        said
        == "with cuDNN 9.12.0 Transformer Engine has no fused attention for this: Disabling FusedAttention: head_dim_qk = 512"
    )
    q = torch.zeros(1, 4, 3, 512)
    with pytest.raises(MoefxError, match=r"for q \[1, 3, 4, 512\] it cannot run: with cuDNN .* Leave 'te' out of backends"):
        te.attention(q, q, q, None, None, scale=1.0, is_causal=True)


def test_torch_compile_keeps_the_kernels_in_one_graph():
    """Forward and backward of a block's worth of kernels, at two lengths, from one dynamic graph without a break."""

    def block(x, weight, gate, bias, sinks):
        h, total = te.add_rms_norm(x, x.flip(0), weight, 1e-6)
        q = h.view(1, -1, 4, 8).transpose(1, 2)
        h = te.attention(q, q, q, None, sinks, scale=0.3, is_causal=True).reshape(x.shape)
        h = te.rms_norm(h + total, weight, 1e-6, offset=1.0)
        w, index = te.route(h @ gate, bias, 2, score="sigmoid", gather=True, renormalize=True, sorted=False)
        rows, where = torch.ops.moefx.te_permute(h, index.int())
        return torch.ops.moefx.te_unpermute(rows, where, w)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 12):
        given = [
            checks.normal(tokens, 32),
            1 + checks.normal(32, seed=1),
            checks.normal(32, 6, seed=2),
            checks.normal(6, seed=3),
            checks.normal(4, seed=4),
        ]
        wanted = checks.run(block, checks.leaves(given, CPU, torch.float32))
        checks.compare(
            checks.run(compiled, checks.leaves(given, CPU, torch.float32)), {k: v for k, v in wanted.items()}, torch.float32
        )


@pytest.mark.parametrize("shape", [(16, 32), (2, 5, 32), (1, 32), (0, 32)])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_linear(shape, biased):
    checks.check_fp8_linear("current", shape, 48, biased, CPU)


def test_fp8_linear_leaves_out_gradients_that_nobody_asked_for():
    checks.check_fp8_linear_leaves_out_what_nobody_asked_for("current", CPU)


@pytest.mark.parametrize("op", te.BACKEND.kernels, ids=str)
def test_fakes_are_the_kernels_shapes_and_dtypes(op):
    """torch's own check of schema, fake, autograd registration and dynamic shapes, for every operation of the backend."""
    for name, arguments in checks.calls(op, CPU):
        torch.library.opcheck(getattr(torch.ops.moefx, name).default, arguments)
