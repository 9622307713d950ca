"""The pure parts of the benchmarks: what is extrapolated, what a kernel is for, what load is asked for and reached."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import breakdown  # noqa: E402
import chart  # noqa: E402
import extrapolate  # noqa: E402
import models  # noqa: E402
import routing  # noqa: E402


@pytest.mark.parametrize("name", ["qwen3_30b", "gpt_oss_20b", "nemotron_nano"])
def test_default_depths_determine_the_whole_model(name: str) -> None:
    model = models.MODELS[name]
    units = {d: model.units(d) for d in model.depths}
    cost = {u: 3.0 + i for i, u in enumerate(model.whole)}

    def step(of: Counter) -> float:
        return 20.0 + sum(n * cost[u] for u, n in of.items())

    found = extrapolate.whole({d: step(units[d]) for d in model.depths}, units, model.whole, model.layers)
    assert found is not None
    assert found["ms"] == pytest.approx(step(model.whole))
    assert found["ms_head"] == pytest.approx(20.0)
    assert found["ms_per_unit"] == pytest.approx(cost)
    assert found["ms_per_layer"] * model.layers == pytest.approx(step(model.whole) - 20.0)
    assert config_layers(name, model.layers) == model.layers


def config_layers(name: str, layers: int) -> int:
    return models.config(name, layers).num_hidden_layers


def test_too_few_depths_determine_nothing() -> None:
    units = {2: Counter({"layer": 2}), 3: Counter({"layer": 2, "other": 1})}
    assert extrapolate.solve({2: 10.0}, units) is None
    assert extrapolate.solve({2: 10.0, 3: 11.0}, units) is None  # three unknowns
    assert extrapolate.whole({2: 10.0, 3: 11.0}, units, {"layer": 40}, 40) is None
    units = {2: Counter({"layer": 2}), 4: Counter({"layer": 4})}
    assert extrapolate.whole({2: 10.0, 4: 9.0}, units, {"layer": 40}, 40) is None  # more layers took less: noise


def test_nemotron_runs_are_layers_of_its_pattern() -> None:
    assert Counter(models.NEMOTRON_PATTERN) == {"M": 23, "E": 23, "*": 6}
    for layers, run in models.NEMOTRON_RUNS.items():
        assert len(run) == layers and run in models.NEMOTRON_PATTERN
    with pytest.raises(SystemExit, match="no run of 5 layers"):
        models.config("nemotron_nano", 5)
    with pytest.raises(SystemExit, match="3 layers are no whole number of pairs"):
        models.MODELS["gpt_oss_20b"].units(3)


@pytest.mark.parametrize(
    ("name", "around", "shapes", "wanted"),
    [
        ("void cutlass::device_kernel<...GemmUniversal<cutlass::gemm::GroupProblemShape<...", ["aten::_grouped_mm"], [], "grouped GEMM"),
        ("kernel_cutlass_kernel_quackgemm_sm90GemmSm90", ["moefx::fused_experts_backward"], [], "grouped GEMM"),
        ("prepare_grouped_gemm_data", ["aten::_grouped_mm"], [], "grouped GEMM"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", ["aten::mm"], [[4096, 2048], [2048, 512]], "dense GEMM"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", ["aten::mm"], [[4096, 2048], [2048, 151936]], "head"),
        ("triton_red_fused__log_softmax_0", ["moefx::chunked_linear_cross_entropy"], [], "head"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...", [], [], "attention"),
        ("triton_tem_fused_flex_attention_backward_0", [], [], "attention"),
        ("_chunk_scan_fwd_kernel", [], [], "mamba"),
        ("causal_conv1d_fwd_kernel", [], [], "mamba"),
        ("_reduce", ["moefx::fused_experts", "aten::_grouped_mm"], [], "glue"),
        ("void at::native::vectorized_elementwise_kernel<4, ...", ["aten::add"], [[4096, 2048]], "glue"),
    ],
)  # fmt: skip
def test_kind_of_kernel(name: str, around: list[str], shapes: list[list[int]], wanted: str) -> None:
    assert breakdown.kind(name, around, shapes, 151936) == wanted


def test_kinds_add_up() -> None:
    kernels = [{"ms": 1.0, "kind": "glue"}, {"ms": 2.0, "kind": "attention"}, {"ms": 0.5, "kind": "glue"}]
    assert breakdown.by_kind(kernels) == {"attention": 2.0, "glue": 1.5}


def test_profile_accounts_for_a_step() -> None:
    model = models.build("tiny", 2, torch.float32, "cpu").train()
    ids = torch.randint(0, 500, (1, 16))
    found = breakdown.profile(model, model, {"input_ids": ids, "labels": ids}, torch.device("cpu"))
    assert found["ms"] == pytest.approx(sum(found["kinds_ms"].values()))
    assert {"dense GEMM", "attention", "head", "glue"} <= set(found["kinds_ms"])
    assert len(found["top"]) == 20 and found["top"][0]["ms"] >= found["top"][-1]["ms"]
    assert all(p.grad is None for p in model.parameters())


def test_work_counts_what_the_layers_multiply() -> None:
    tokens, hidden, inner = 2 * 32, 64, 32
    needed = breakdown.work(models.build("tiny", 1, torch.float32, "meta"), 2, 32)
    assert needed["flops"]["grouped GEMM"] == 6 * tokens * 2 * 3 * hidden * inner  # two experts of three matrices
    assert needed["flops"]["head"] == 6 * tokens * hidden * 500
    attention = 2 * hidden * hidden + 2 * hidden * 32
    assert needed["flops"]["dense GEMM"] == 6 * tokens * (attention + 8 * hidden)  # and the router
    keys = sum(range(1, 33)) / 32
    assert needed["flops"]["attention"] == pytest.approx(12 * 4 * 16 * keys * tokens)
    assert needed["bytes"]["grouped GEMM"] == 3 * 4 * 8 * 3 * hidden * inner
    # what bounds the step is the larger of the two
    floor = breakdown.roofline({"flops": {"a": 4e9, "b": 2e9}, "bytes": {"a": 1e9}}, {"tflops": 3.0, "tb_per_s": 0.5}, 8.0)
    assert floor == pytest.approx({"arithmetic_ms": 2.0, "bytes_ms": 2.0, "share": 0.25})
    needed = {"flops": {"head": 3e9}, "bytes": {"head": 1e9, "glue": 1e9}}
    assert breakdown.floors(needed, {"tflops": 3.0, "tb_per_s": 0.5}) == pytest.approx({"head": 2.0, "glue": 2.0})


def test_work_knows_windows() -> None:
    model = models.build("tiny_gpt_oss", 2, torch.float32, "meta")
    seq, window = 32, model.config.sliding_window
    seen = sum(min(i + 1, window) for i in range(seq)) / seq + sum(range(1, seq + 1)) / seq
    assert breakdown.work(model, 1, seq)["flops"]["attention"] == pytest.approx(12 * 4 * 16 * seen * seq)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4096, 8, 128), (1000, 4, 32), (64, 2, 8), (5, 3, 3), (7, 1, 4)])
def test_zipf_load(tokens: int, top_k: int, experts: int) -> None:
    load = routing.zipf_load(tokens, top_k, experts)
    assert float(load.sum()) == pytest.approx(tokens * top_k)
    assert float(load.max()) <= tokens + 1e-9  # a token visits an expert once
    free = load[load < tokens * (1 - 1e-9)]
    rank = torch.arange(experts - len(free) + 1, experts + 1)
    assert torch.allclose(free * rank, (free * rank).mean().expand(len(free)))  # Zipf(1): rank times load is a constant


def test_bias_reaches_the_load() -> None:
    scores = torch.randn(4096, 64)
    wanted = routing.zipf_load(4096, 4, 64)
    bias = routing.bias_for(scores, 4, wanted)
    found = routing.load((scores + bias).topk(4, dim=-1).indices, 64)
    assert float((found - wanted).abs().sum() / 2 / wanted.sum()) < 0.01
    without = routing.load(scores.topk(4, dim=-1).indices, 64)
    assert float((without - wanted).abs().sum() / 2 / wanted.sum()) > 0.3


@pytest.mark.parametrize(("name", "layers"), [("tiny", 2), ("tiny_nemotron", 3), ("tiny_gpt_oss", 2)])
def test_routings_of_a_model(name: str, layers: int) -> None:
    model = models.build(name, layers, torch.float32, "cpu").train()
    ids = torch.randint(0, 500, (2, 64))
    said = routing.skew(model, {"input_ids": ids})
    with routing.observed(model) as seen:
        model(input_ids=ids, use_cache=False)
    assert list(said) == list(seen) and seen
    wanted = routing.zipf_load(ids.numel(), 2, 8)
    for index in seen.values():
        found = routing.load(index, 8)
        assert float((found - wanted).abs().sum() / 2 / wanted.sum()) < 0.06  # every layer, although the earlier ones changed
    routing.balance(model)
    with routing.observed(model) as seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for index in seen.values():
        assert routing.load(index, 8).tolist() == [ids.numel() * 2 // 8] * 8
    for router in routing.routers(model).values():
        assert router.weight.grad.abs().sum() > 0  # the weights of the given experts still come from it


@pytest.mark.parametrize(("name", "layers"), [("tiny", 1), ("tiny_nemotron", 2), ("tiny_gpt_oss", 2)])
def test_balanced_router_gives_the_weights_of_its_experts(name: str, layers: int) -> None:
    """Told the experts that it would have chosen, it is the router itself."""
    model = models.build(name, layers, torch.float32, "cpu")
    router = next(iter(routing.routers(model).values()))
    x = torch.randn(16, model.config.hidden_size)
    logits, weights, index = router(x)
    chosen = index.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "balanced_index", lambda *_: chosen)
        found = routing._BALANCED[type(router).__name__](router, x)
    assert torch.equal(found[0], logits) and torch.equal(found[2], index)
    torch.testing.assert_close(found[1], weights)


def test_bars_are_the_whole_models_rows() -> None:
    rows = [
        {"who": "moefx", "mbs": 4, "tokens_per_s": 4.0, "speedup": 2.0}, {"who": "hf", "mbs": 4, "tokens_per_s": 2.0, "speedup": 1.0},
        {"who": "moefx", "mbs": 1, "tokens_per_s": 3.0, "speedup": None},
    ]  # fmt: skip
    found = chart.bars({"whole_model": rows})
    assert list(found.items()) == [("hf", [(4, 2.0, 1.0)]), ("moefx", [(1, 3.0, None), (4, 4.0, 2.0)])]
