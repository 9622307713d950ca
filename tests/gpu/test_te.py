"""The te backend's kernels on Transformer Engine itself, against the bodies of their operations: values and all gradients."""

import pytest
import torch

import moefx
from moefx import ops
from moefx.backends import builtin, te
from moefx.kernels.te import attention, available, grouped, linear
from tests.support import grouped_checks
from tests.support import te_checks as checks

CUDA = "cuda"
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def usable():
    problem = available()
    if problem:
        pytest.skip(problem)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2048), (0, 2048), (2, 37, 2048), (3, 5, 4, 128), (7, 2880), (2, 96), (5, 7168)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=("norm", "add"))
def test_norms(shape, dtype, residual):
    for offset in (0.0, 1.0):
        checks.check_norm(shape, dtype, CUDA, offset, residual)


@pytest.mark.parametrize("tokens", [0, 1, 37, 1000])
@pytest.mark.parametrize("name", checks.ROUTERS)
def test_routers(name, tokens):
    checks.check_router(name, tokens, CUDA)


@pytest.mark.parametrize(("layers", "tokens", "experts", "top_k"), [(1, 1, 8, 2), (3, 37, 128, 8), (2, 1000, 60, 4)])
def test_aux_loss(layers, tokens, experts, top_k):
    checks.check_aux_loss(layers, tokens, experts, top_k, CUDA)


@pytest.mark.parametrize("name", checks.ATTENTIONS)
def test_attention(name):
    given, options = checks.attention_arguments(name)
    q, k, v, _, sinks = given
    problem = attention.why_not_fused(
        q.dtype,
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        q.shape[3],
        v.shape[3],
        options["scale"],
        options["is_causal"],
        options.get("window"),
        sinks is not None,
    )
    if problem:
        with pytest.raises(moefx.MoefxError, match="Leave 'te' out of backends"):
            te.attention(*checks.leaves(given, CUDA, torch.bfloat16), **options)
        pytest.skip(problem)
    checks.check_attention(name, CUDA)


def test_attention_that_would_run_unfused_is_refused_with_transformer_engines_reason():
    said = attention.why_not_fused(torch.bfloat16, 1, 4, 4, 64, 60, 60, 1.0, True, None, False)
    assert said and "has no fused attention" in said and "FusedAttention" in said, said


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (1, 7), (37, 3), (1000, 4)])
def test_permutation(tokens, top_k, dtype):
    checks.check_permutation(tokens, top_k, dtype, CUDA)


@pytest.mark.parametrize(("tokens", "routing"), [(1, "random"), (37, "random"), (600, "random"), (64, "skewed")])
@pytest.mark.parametrize("name", checks.EXPERTS)
def test_experts(name, tokens, routing):
    checks.check_experts(name, tokens, routing, CUDA)


@pytest.mark.parametrize("name", checks.EXPERTS)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 700, 64, 1]], ids=str)
def test_grouped_mlp(name, counts):
    found = grouped.cublaslt()
    if found < grouped.CUBLASLT:
        pytest.skip(f"GroupedLinear's grouped GEMM needs cuBLASLt {grouped.CUBLASLT}, this is {found}")
    checks.check_grouped_mlp(name, counts, torch.bfloat16, CUDA, grad_scale=0.5)


@pytest.mark.parametrize("case", [c for c in grouped_checks.CASES if not c[2]], ids=str)  # with spare rows it is refused
def test_grouped_mlp_makes_its_rows_again(case):
    if grouped.cublaslt() < grouped.CUBLASLT:
        pytest.skip(f"GroupedLinear's grouped GEMM needs cuBLASLt {grouped.CUBLASLT}, this is {grouped.cublaslt()}")
    grouped_checks.check_rows_are_made_again(te.grouped_mlp, *case, torch.bfloat16, CUDA)


def test_grouped_mlp_is_refused_below_its_cublaslt():
    graph = torch.fx.Graph()
    places = [graph.placeholder(name) for name in ("rows", "counts", "up", "down")]
    for place, shape in zip(places, ((8, 64), (4,), (4, 96, 64), (4, 64, 48)), strict=True):
        place.meta["val"] = torch.empty(shape, device=CUDA, dtype=torch.bfloat16)
    rows, counts, up, down = places
    node = graph.call_function(
        torch.ops.moefx.grouped_mlp.default, (rows, counts, up, None, down, None), {"activation": "swiglu"}
    )
    said = te.BACKEND.kernels[torch.ops.moefx.grouped_mlp.default].refuses(node)
    assert (said is None) == (grouped.cublaslt() >= grouped.CUBLASLT) and (said is None or "one cuBLAS call an expert" in said)


def test_compiled_in_one_graph():
    """Forward and backward of norms, router and permutation, inductor, two lengths, one dynamic graph without a break."""

    def block(x, weight, gate):
        h, total = te.add_rms_norm(x, x.flip(0), weight, 1e-6)
        h = te.rms_norm(h + total, weight, 1e-6, offset=1.0)
        w, index = te.route((h @ gate).float(), None, 2, renormalize=True)
        rows, where = torch.ops.moefx.te_permute(h, index.int())
        return torch.ops.moefx.te_unpermute(rows * 2, where, w)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (5, 130):
        given = [checks.normal(tokens, 64), 1 + checks.normal(64, seed=1), checks.normal(64, 6, seed=2)]
        wanted = checks.run(block, checks.leaves(given, CUDA, torch.float32))
        checks.compare(checks.run(compiled, checks.leaves(given, CUDA, torch.float32)), wanted, torch.float32)


def test_a_model_lowers_to_the_backend_and_keeps_its_loss_and_gradients():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.randint(512, (2, 65), device=CUDA)
    batch = {"input_ids": ids, "labels": ids}

    def step():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return float(loss), {n: p.grad.float() for n, p in model.named_parameters()}

    loss, gradients = step()
    moefx.optimize(model, backends=["te", "triton", "torch"])
    ours, found = step()
    text = str(moefx.report(model))
    for op in ("rms_norm", "route", "experts"):
        assert f"moefx.{op} -> te" in str(moefx.report(model)["lower"].made), text
    assert abs(ours - loss) < 0.02 * loss
    # a token or two may choose other experts in bf16: the gradients are compared together, each kernel's are above
    far = sum((found[n] - w).square().sum() for n, w in gradients.items()).sqrt()
    assert far <= 0.2 * sum(w.square().sum() for w in gradients.values()).sqrt()


@pytest.mark.parametrize("recipe", linear.RECIPES)
@pytest.mark.parametrize(
    ("shape", "out"), [((1, 256), 128), ((2, 37, 256), 384), ((128, 512), 128), ((1000, 128), 256), ((0, 128), 128)], ids=str
)
def test_fp8_linear(recipe, shape, out):
    problem = linear.why_not(recipe)
    if problem:
        pytest.skip(problem)
    for biased in (False, True):
        checks.check_fp8_linear(recipe, shape, out, biased, CUDA)


@pytest.mark.parametrize("recipe", linear.RECIPES)
def test_fp8_linear_leaves_out_gradients_that_nobody_asked_for(recipe):
    problem = linear.why_not(recipe)
    if problem:
        pytest.skip(problem)
    checks.check_fp8_linear_leaves_out_what_nobody_asked_for(recipe, CUDA)


@pytest.mark.parametrize("recipe", linear.RECIPES)
def test_fp8_linear_compiled_in_one_graph(recipe):
    problem = linear.why_not(recipe)
    if problem:
        pytest.skip(problem)
    compiled = torch.compile(
        lambda x, w: torch.ops.moefx.te_fp8_linear(x * 2, w, None, recipe).relu(), fullgraph=True, dynamic=True
    )
    for tokens in (5, 130):
        given = [t.bfloat16() for t in (checks.normal(tokens, 256), checks.normal(128, 256, seed=1))]
        wanted = checks.run(
            lambda x, w: torch.ops.moefx.te_fp8_linear(x * 2, w, None, recipe).relu(),
            checks.leaves(given, CUDA, torch.bfloat16),
        )
        checks.compare(checks.run(compiled, checks.leaves(given, CUDA, torch.bfloat16)), wanted, torch.bfloat16)


@pytest.mark.parametrize("op", te.BACKEND.kernels, ids=str)
def test_fakes_are_the_kernels_shapes_and_dtypes(op):
    """Without opcheck's comparison with the compiled operation: cuDNN's random state differs from call to call."""
    if op == torch.ops.moefx.grouped_mlp.default and grouped.cublaslt() < grouped.CUBLASLT:
        pytest.skip(f"GroupedLinear's grouped GEMM needs cuBLASLt {grouped.CUBLASLT}, this is {grouped.cublaslt()}")
    for name, arguments in checks.calls(op, CUDA):
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.moefx, name).default, arguments, test_utils=kinds)


def test_doctor_and_default_order():
    assert te.BACKEND.opt_in and "te" not in [b.name for b in moefx.backends.resolve(None)]
    assert "te" in builtin() and ops.route in te.BACKEND.kernels
