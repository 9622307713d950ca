"""The benchmarks' own logic: extrapolation, classification of kernels, expert load, checks and the files of results."""

import argparse
import json
import os
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import itertools

import adapters
import breakdown
import chart
import checks
import clocks
import common
import contenders
import dispatch
import extrapolate
import footprint
import lora
import models
import multi_gpu
import overlap_trace
import routing
import simulate_ep
import sketch
import tunings

import moefx


@pytest.mark.parametrize("name", ["qwen3_30b", "gpt_oss_20b", "nemotron_nano", "deepseek_v3"])
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
    assert len(found["top"]) <= 60 and found["top"][0]["ms"] >= found["top"][-1]["ms"]
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
    reach = {"tflops": 3.0, "sustained_tflops": 2.0, "tb_per_s": 0.5}
    floor = breakdown.roofline({"flops": {"a": 4e9, "b": 2e9}, "bytes": {"a": 1e9}}, reach, 8.0)
    assert floor == pytest.approx({"arithmetic_ms": 2.0, "sustained_ms": 3.0, "bytes_ms": 2.0, "share": 0.25})
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


@pytest.mark.parametrize(("name", "layers"), [("tiny", 1), ("tiny_nemotron", 2), ("tiny_gpt_oss", 2), ("tiny_deepseek_v3", 1)])
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
        {"who": "moefx", "mbs": 4, "tokens_per_s": 4.0, "speedup": 2.0},
        {"who": "hf", "mbs": 4, "tokens_per_s": 2.0, "speedup": 1.0},
        {"who": "moefx", "mbs": 1, "tokens_per_s": 3.0, "speedup": None},
    ]
    found = chart.bars({"whole_model": rows})
    assert list(found.items()) == [("hf", [(4, 2.0, "")]), ("moefx", [(1, 3.0, ""), (4, 4.0, "2.00×")])]


def test_panels_of_several_devices_are_their_routings() -> None:
    def row(who: str, routing: str, speed: float, times: dict, recompute: bool = False) -> dict:
        return {
            "who": who,
            "mbs": 1,
            "routing": routing,
            "recompute": recompute,
            "tokens_per_s_per_gpu": {"mean": speed},
            "speedup": times,
        }

    record = {
        "settings": {"model": "qwen3_30b", "gpus": 8},
        "machine": {"gpu": {"name": "H"}},
        "rows": [
            row("moefx", "real", 3.0, {"hf_fsdp": 3.0}),
            row("hf_fsdp", "real", 1.0, {"hf_ep": 2.0}, True),
            row("hf_ep", "balanced", 2.0, {}),
        ],
    }
    assert chart.panels(record) == [
        ("Qwen3-30B-A3B, real routing", {"hf_fsdp": [(1, 1.0, " r")], "moefx": [(1, 3.0, "3.00×")]}),
        ("Qwen3-30B-A3B, balanced routing", {"hf_ep": [(1, 2.0, "")]}),
    ]
    assert chart.device_of(record) == "8x H"


# --- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 96, 1040), (2100, 64), (4096, 1, 4), (7,)])
def test_sketch_of_parts_is_the_sketch_of_the_whole(shape: tuple[int, ...]) -> None:
    """Whoever holds which rows; and the distance of two sketches is that of what was sketched."""
    g = torch.randn(shape)
    other = g + 0.01 * torch.randn(shape)

    def whole(t: torch.Tensor, cuts: list[int]) -> torch.Tensor:
        ends = [0, *cuts, len(t)]
        rest = tuple(slice(0, n) for n in shape[1:])
        return sum(sketch.part("name", t[a:b], (slice(a, b), *rest), shape) for a, b in itertools.pairwise(ends))

    a, b = whole(g, []), whole(other, [])
    torch.testing.assert_close(whole(g, [len(g) // 3, len(g) // 2, len(g) // 2]), a, rtol=1e-4, atol=1e-3)
    assert a.numel() in (g.numel(), sketch.DRAWS * sketch.WIDTH)
    assert float((a - b).norm() / a.norm()) == pytest.approx(float((g - other).norm() / g.norm()), rel=0.1)
    if a.numel() == g.numel():
        assert torch.equal(a.view(shape), g)
    else:
        assert not torch.allclose(sketch.part("another", g, tuple(slice(0, n) for n in shape), shape), a)


def test_sketch_knows_how_far_differences_of_rank_one_are() -> None:
    """All columns of one are multiples of one random number a draw: a single draw would be off by as much as it measures."""
    shape = (300, 2048)
    whole = tuple(slice(0, n) for n in shape)
    ratios = []
    for i in range(20):
        far = torch.randn(shape[0], 1) * torch.randn(1, shape[1])
        ratios.append(float(sketch.part(f"p{i}", far, whole, shape).norm() / sketch.DRAWS**0.5 / far.norm()))
    assert all(0.5 < r < 1.5 for r in ratios) and abs(sum(ratios) / len(ratios) - 1) < 0.1, ratios


def test_judge_knows_wrong_gradients_from_rounded_ones() -> None:
    hf = {"a": 0.01, "b": 0.02}
    given = {"sizes": {"a": 1000, "b": 1000}, "tokens": 4096, "share": 0.0, "dtype": torch.bfloat16}
    assert checks.judge(hf, {"a": 0.012, "b": 0.02}, {"a": 0.015, "b": 0.03}, 1e-5, 2e-5, **given)["problems"] == []
    for wrong in (0.016, float("inf"), float("nan")):
        (problem,) = checks.judge(hf, {"a": wrong, "b": 0.02}, hf, 1e-5, 1e-5, **given)["problems"]
        assert problem.startswith("grad a: ")
    (problem,) = checks.judge(hf, hf, {"a": 0.01, "b": 0.06}, 1e-5, 1e-5, **given)["problems"]
    assert problem == "grad b: 6.00e-02 from Transformers', 5.00e-02 allowed"
    (problem,) = checks.judge(hf, hf, hf, 1e-5, 0.01, **given)["problems"]
    assert problem.startswith("loss: ")


def test_a_wrong_model_is_found_where_transformers_against_itself_is_right() -> None:
    model = models.build("tiny", 1, torch.bfloat16, torch.device("cpu")).train()
    other = moefx.optimize(common.twin(model), balanced_routing=True, compile=False)
    routing.balance(model)
    batch = models.tokens("tiny", 1, 64, "cpu")
    right = checks.check("tiny", True, model, other, batch)
    assert right["problems"] == [] and "control_problems" not in right
    other.model.norm.variance_epsilon = 1.0
    moefx.restore(other)  # what was optimized has the old number
    moefx.optimize(other, balanced_routing=True, compile=False)
    wrong = checks.check("tiny", True, model, other, batch)
    assert any(p.startswith("grad lm_head.weight: ") for p in wrong["problems"]) and wrong["control_problems"] == []
    assert 0 < wrong["control against hf"]["max"] < 0.1


def test_steps_fit_into_the_time() -> None:
    assert contenders.plan(6, 30, seconds=100, step_s=1) == (6, 30)
    assert contenders.plan(6, 30, seconds=20, step_s=1) == (5, 15)
    assert contenders.plan(6, 30, seconds=4, step_s=1) == (1, 5)  # too few steps are no figure: late, but a figure
    assert contenders.plan(-1, 3, seconds=100, step_s=1) == (0, 3)


def test_contenders_agree_and_one_that_runs_out_of_memory_is_a_result(tmp_path: Path) -> None:
    """All of ``multi_gpu.py`` on two gloo ranks; one rank of Transformers fails while the other waits in a collective."""
    args = "--model tiny --layers 1 --device cpu --gpus 2 --seq 32 --mbs 1 --warmup 1 --steps 2 --routing balanced --no-compile"
    run = [*args.split(), "--contenders", "hf_fsdp,hf_ep,moefx", "--out", str(tmp_path), "--name", "run"]
    assert multi_gpu.main([*run, "--fail", "memory:hf_fsdp:1:balanced, mbs 1"]) == 0
    record = json.loads((tmp_path / "details/run.json").read_text())
    summary = json.loads((tmp_path / "run.json").read_text())
    assert [r["who"] for r in summary["rows"]] == ["hf_fsdp", "hf_ep", "moefx"] and "steps_ms" not in summary["rows"][0]
    assert [(r["who"], r["recompute"], len(r["steps_ms"])) for r in record["rows"]] == [
        ("hf_fsdp", True, 2),
        ("hf_ep", False, 2),
        ("moefx", False, 2),
    ]
    (failed,) = record["failed"]
    assert (failed["who"], failed["kind"], failed["rank"], failed["row"]) == ("hf_fsdp", "memory", 1, "balanced, mbs 1")
    found = record["checks"]["balanced"]
    assert list(found) == ["hf_fsdp", "hf_ep", "moefx"] and not any(c["problems"] for c in found.values())
    losses = [c["loss"] for c in found.values()]
    assert max(losses) - min(losses) < 2**-8 * losses[0] and min(losses) > 5.0
    assert 0 < found["moefx"]["against hf_fsdp"]["max"] < 0.1 and found["moefx"]["against fp32"]["tensors"] == 14
    moefx = record["rows"][2]
    assert moefx["speedup"]["hf_ep"] == pytest.approx(
        moefx["tokens_per_s_per_gpu"]["mean"] / record["rows"][1]["tokens_per_s_per_gpu"]["mean"]
    )
    assert record["contenders"]["moefx"]["transport"] == "all_to_all"
    # half of everything is with each rank
    whole = sum(p.nbytes for p in models.build("tiny", 1, torch.bfloat16, "meta").parameters())
    for name in found:
        assert record["contenders"][name]["weights_gib"] * 2**30 == pytest.approx(whole / 2, rel=0.01)
    # again: everything is there
    assert multi_gpu.main([*run, "--resume"]) == 0
    assert json.loads((tmp_path / "details/run.json").read_text())["rows"] == record["rows"]
    assert json.loads((tmp_path / "run.json").read_text())["rows"] == summary["rows"]


def test_a_contender_whose_row_fails_is_checked_all_the_same(tmp_path: Path) -> None:
    args = "--model tiny --layers 1 --device cpu --gpus 2 --seq 32 --mbs 1 --warmup 1 --steps 2 --routing balanced --no-compile"
    run = [
        *args.split(),
        "--contenders",
        "hf_fsdp",
        "--out",
        str(tmp_path),
        "--name",
        "run",
        "--fail",
        "error:hf_fsdp:1:balanced, mbs 1",
    ]
    multi_gpu.main(run)
    record = json.loads((tmp_path / "run.json").read_text())
    (failed,) = record["failed"]
    assert (failed["kind"], failed["row"]) == ("error", "balanced, mbs 1") and not record["rows"]
    assert record["checks"]["balanced"]["hf_fsdp"]["problems"] == []


def test_a_run_without_time_for_moefx_says_so(tmp_path: Path) -> None:
    run = "--model tiny --layers 1 --device cpu --gpus 2 --contenders moefx --no-check --budget 0 --name run --out"
    assert multi_gpu.main([*run.split(), str(tmp_path)]) == 1
    problems = json.loads((tmp_path / "run.json").read_text())["problems"]
    assert problems == ["moefx: nothing of it was measured, the budget of 0 s was used up"]


def test_a_failure_has_nccls_last_line_too() -> None:
    here = contenders.Rank.__new__(contenders.Rank)
    here.rank, here.row = 1, None
    error = RuntimeError(
        "NCCL error in: a.cpp:93, invalid usage\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on 60\n"
    )
    why = contenders._failure(error, here)["why"]
    assert why.startswith("RuntimeError: NCCL error in: a.cpp:93") and why.endswith("takes NCCL 2.30 or later")
    assert contenders._failure(ValueError("one line"), here)["why"] == "ValueError: one line"


@pytest.mark.parametrize("name", ["qwen3_30b", "nemotron_nano"])
def test_a_rank_of_eight_holds_an_eighth_of_the_whole_model(name: str) -> None:
    """Shards of the published depth, counted from the shapes of a process group that is only pretended."""
    layers = models.MODELS[name].layers
    whole = sum(p.nbytes for p in models.build(name, layers, torch.bfloat16, "meta").parameters())
    fsdp, ours = (footprint.states(who, name, layers, 8) for who in ("hf_fsdp", "moefx"))
    for held in (fsdp, ours):
        assert held["weights"] == held["gradients"] == pytest.approx(whole / 8, rel=0.01)
        assert sum(held.values()) < 30 * 2**30  # of an H100's 80e9 bytes: the rest is for activations
    # FSDP2 gathers all experts of a block, with expert parallelism an eighth
    assert ours["gathered"] < fsdp["gathered"] - 3 * 0.8 * 2**30


def test_kept_counts_what_autograd_keeps() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10, 20))

        def forward(self, x: torch.Tensor, use_cache: bool) -> argparse.Namespace:
            hidden = x @ self.weight  # keeps x [4, 10]
            return argparse.Namespace(loss=(hidden.sin() * hidden.view(2, 40).view(4, 20)).sum())  # hidden once, its sine

    assert footprint.kept(Twice(), {"x": torch.randn(4, 10)}) == 4 * (4 * 10 + 2 * 4 * 20)


def test_simulated_rank_has_its_share_and_says_that_it_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = argparse.Namespace(
        model="tiny",
        layers=[1],
        seq=32,
        mbs=[1],
        dtype="float32",
        device="cpu",
        routing="balanced",
        warmup=1,
        steps=2,
        simulate_ep=4,
        exchange_gb_per_s=1e-3,
        compile=False,
        backends=None,
        name="simulated",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate_ep.common, "RESULTS", tmp_path)
        patch.setattr(simulate_ep.common, "say", print)
        patch.setattr(simulate_ep.common, "save", lambda name, record: (tmp_path / name).write_text(json.dumps(record)))
        with pytest.warns(UserWarning, match="balanced_routing=True"):
            assert simulate_ep.run(args) == 0
    record = json.loads((tmp_path / "simulated").read_text())
    assert record["what"].startswith("a model") and "MODEL" in capsys.readouterr().out
    (row,) = record["depths"][0]["rows"]
    # at least: a row of 64 float32 numbers of 3 of 4 tokens, there and back, forward and backward, at 1 MB/s
    assert row["exchange_model_ms"] > 32 * 3 / 4 * 64 * 4 * 4 / 1e3 and row["loss"] > 5


def test_an_exchange_launches_few_operations() -> None:
    """Torch's and moefx's kernels of one rank of eight: an exchange of 130 launches was bound by the host, not by the wire."""
    pytest.importorskip("triton", reason="Triton is not installed")
    found = dispatch.host(torch.device("cpu"), (16, 32, 8, 2), steps=6)
    assert {stage: f["kernels"] for stage, f in found.items()} == {"dispatch": 8, "combine": 2, "backward": 4}
    assert all(f["operations"] <= most for f, most in zip(found.values(), (6, 2, 4), strict=True)), found


def _event(name: str, start: float, end: float, cat: str, **more: object) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, **more}


def test_communication_is_hidden_where_a_kernel_of_another_stream_runs() -> None:
    def kernel(name: str, start: float, end: float, stream: int) -> dict:
        return _event(name, start, end, "kernel", args={"stream": stream})

    events = [
        kernel("ncclDevKernel_SendRecv", 10, 30, 2), kernel("void deep_ep::intranode::combine<2>", 50, 60, 3),
        kernel("cutlass_grouped_gemm", 0, 15, 1), kernel("_sum", 20, 25, 1), kernel("_pack", 24, 28, 1), kernel("add", 70, 80, 1),
        _event("aten::add", 0, 100, "cpu_op", tid=7),
    ]  # fmt: skip
    found = overlap_trace.lanes({"traceEvents": events})
    assert [(lane, len(spans)) for lane, spans in found.items()] == [("stream 1", 4), ("stream 2", 1), ("stream 3", 1)]
    assert overlap_trace.hidden(found) == (30.0, 13.0)  # 10 to 15 and 20 to 28


def test_on_a_cpu_an_operation_that_waits_hides_nothing() -> None:
    events = [
        _event("gloo:all_to_all", 0, 40, "user_annotation", tid=1), _event("moefx::dispatch_wait", 10, 45, "cpu_op", tid=1),
        _event("aten::mm", 2, 8, "cpu_op", tid=1), _event("aten::addmm", 3, 5, "cpu_op", tid=1),
        _event("aten::mul", 30, 35, "cpu_op", tid=9),
    ]  # fmt: skip
    found = overlap_trace.lanes({"traceEvents": events})
    assert overlap_trace.hidden(found) == (40.0, 11.0)
    picture = overlap_trace.svg(found, "a <title>")
    ElementTree.fromstring(picture)
    assert picture.count("<rect") == 1 + 5 + 4 and "a &lt;title&gt;" in picture and "thread 9" in picture


def test_the_clock_is_read_while_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "$@" > "$0.asked"\necho "[N/A], [N/A]"\nwhile :; do echo "1755, 690.5"; sleep 0.01; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(uuid="12-34"))
    with clocks.reading(torch.device("cuda")) as readings:
        while len(readings.found) < 3:
            time.sleep(0.01)
        readings.found.insert(0, (345.0, 80.0))
        readings.since_now()
        while not readings.found:
            time.sleep(0.01)
    summary = readings.summary()
    assert summary is not None and summary == {"sm_mhz": 1755.0, "watts": 690.5, "readings": len(readings.found)}
    assert "-i GPU-12-34" in Path(f"{program}.asked").read_text()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    for device in ("cuda", "cpu"):
        with clocks.reading(torch.device(device)) as readings:
            pass
        assert readings.summary() is None


def test_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark as it stands, small: two runs under PyTorch's switch give the same bits, and their cost is written down."""
    import common
    import determinism

    saved = {}
    monkeypatch.setattr(common, "save", saved.__setitem__)
    options = "--model tiny --device cpu --layers 1 --seq 16 --steps 1 --dtype float32 --no-compile"
    monkeypatch.setattr(sys, "argv", ["determinism.py", *options.split()])
    try:
        assert determinism.main() == 0
    finally:
        torch.use_deterministic_algorithms(False)
    (record,) = saved.values()
    assert record["deterministic"]["equal"] == record["deterministic"]["tensors"] > 10 and record["cost"] > 0


def test_what_triton_chose_is_handed_to_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    def kernel(x, n):
        pass

    def tuned() -> Any:
        configs = [triton.Config({}, num_warps=n, pre_hook=lambda args: None) for n in (1, 2, 4)]
        return triton.heuristics({})(triton.autotune(configs, key=["n"])(triton.JITFunction(kernel)))

    module = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", module)
    assert tunings.load(tmp_path / "kept.json") == 0
    module.first = tuned()
    module.again = module.first  # imported twice
    module.first.fn.cache[(16, "torch.bfloat16")] = module.first.fn.configs[2]
    assert tunings.save(tmp_path / "kept.json") == 1
    module.first, module.again = tuned(), None
    assert tunings.load(tmp_path / "kept.json") == 1
    assert module.first.fn.cache == {(16, "torch.bfloat16"): module.first.fn.configs[2]}
    assert tunings.load(tmp_path / "kept.json") == 0  # has them


# --- LoRA ------------------------------------------------------------------------------------------------------------


def run_lora(monkeypatch: pytest.MonkeyPatch, options: str) -> tuple[int, dict[str, Any]]:
    saved: dict[str, Any] = {}
    monkeypatch.setattr(common, "save", lambda name, record: saved.update(record))
    monkeypatch.setattr(common, "elapsed", lambda: 0.0)  # since the import of the module, which is that of other tests too
    common_options = "--model tiny --device cpu --layers 1 --seq 32 --mbs 1 --warmup 1 --steps 2 --no-compile"
    return lora.main([*common_options.split(), *options.split()]), saved


def test_lora_rows_are_checked_and_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(case: lora.Case, adapted: Any, batch: int) -> None:
        if case.targets == "both":
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(case, adapted, batch)

    plain = lora.Case.time_hf
    monkeypatch.setattr(lora.Case, "time_hf", full)
    code, record = run_lora(monkeypatch, "--targets attention both --peers unsloth --max-ratio 1000")
    (depth,) = record["depths"]
    assert code == 0 and record["problems"] == []
    assert [(r["who"], r["targets"]) for r in depth["rows"]] == [("hf", "attention"), ("moefx", "attention"), ("moefx", "both")]
    assert [(s["who"], s["targets"], s["kind"]) for s in depth["skipped"]] == [("hf", "both", "memory")]
    attention, both = depth["rows"][1:]
    assert both["ratio"] == pytest.approx(both["median_ms"] / attention["median_ms"]) and both["speedup"] is None
    # q, k, v and o; and an adapter of rank 16 of each of 8 experts on both of its matrices
    assert attention["adapters_millions"] * 1e6 == 16 * (4 * 64 + 2 * 64 + 2 * 32)
    assert both["adapters_millions"] * 1e6 == attention["adapters_millions"] * 1e6 + 16 * 8 * ((64 + 64) + (32 + 64))
    checked = depth["checks"]
    assert [(name, c["moefx"]["tensors"]) for name, c in checked.items()] == [("attention, mbs 1", 8), ("both, mbs 1", 12)]
    assert all(0 < c["hf"]["mean"] < 0.1 for c in checked.values())


def test_lora_bounds_are_judged() -> None:
    def problems(bounds: str, rows: list[tuple[str, str, float]]) -> list[str]:
        args = lora.arguments(["--model", "tiny", "--device", "cpu", "--no-check", *bounds.split()])
        made = [{"who": who, "targets": which, "mbs": 1, "median_ms": ms} for who, which, ms in rows]
        return lora.summary(args, [{"layers": 64, "rows": made, "skipped": [], "checks": {}, "fallbacks": []}])["problems"]

    rows = [("hf", "attention", 30.0), ("moefx", "attention", 10.0), ("hf", "both", 40.0), ("moefx", "both", 12.0)]
    assert problems("--max-ratio 1.2 --min-speedup 3", rows) == []
    assert problems("--max-ratio 1.1 --min-speedup 3.2", rows) == [
        "64 layers, moefx, attention, mbs 1: 3.00 times Transformers + PEFT, 3.2 wanted",
        "64 layers, moefx, both, mbs 1: 1.20 times attention alone, 1.1 allowed",
    ]
    assert len(problems("--max-ratio 1.1 --min-speedup 3.2", rows[:1])) == 2  # nothing could be judged


def test_a_wrong_gradient_of_an_adapter_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: Any, adapted: Any) -> Any:
        other = common.twin(adapted)
        for path, module in other.named_modules():
            if path.endswith("v_proj"):
                module.scaling["default"] *= 2
        return plain(args, other)

    plain = lora.optimized
    monkeypatch.setattr(lora, "optimized", wrong)
    with pytest.warns(UserWarning, match="balanced_routing=True"):
        code, record = run_lora(monkeypatch, "--targets attention --routing balanced")
    assert code == 1 and any("v_proj.lora_A" in p for p in record["problems"])


def test_a_depth_without_attention_has_no_adapters_on_it() -> None:
    empty = models.build("tiny_nemotron", 2, torch.bfloat16, "meta")
    assert adapters.targets(empty, "attention") == {}
    assert adapters.targets(empty, "both") == {"target_parameters": ["experts.down_proj", "experts.up_proj"]}
    args = lora.arguments(["--model", "tiny_nemotron", "--device", "cpu"])
    assert args.check_layers == 3
    # the check of a model that does not fit in fp32 has a model of its own, and comes first
    args = lora.arguments(["--model", "deepseek_v3", "--device", "cpu", "--layers", "2"])
    assert list(lora.plan(args)) == [("deepseek_v3_32_experts", 1, False, True), ("deepseek_v3", 2, True, False)]


RESULTS = sorted(p for p in common.RESULTS.iterdir() if not p.name.startswith("first_contact-"))  # of tests/gpu/check.py


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_results_are_summaries(path):
    """What stands in the repository is what `common.write` would write of it: no details, a row a line."""
    record = json.loads(path.read_text())
    assert path.suffix == ".json" and path.read_text() == common.dump(common.summary(record)) + "\n"


def test_details_stay_out_of_results(tmp_path):
    rows = [{"who": "hf", "ms": 1.23456789, "steps_ms": [1.0] * 30, "note": "x" * 300} for _ in range(2)]
    record = {"rows": rows, "checks": {"hf": {"distances": {"w": 0.1}, "max": 0.1}}, "at": 1795818991.92, "none": []}
    common.write(tmp_path / "run.json", record)
    text = (tmp_path / "run.json").read_text()
    row = {"who": "hf", "ms": 1.234568, "note": "x" * 300}
    assert json.loads(text) == {"rows": [row, row], "checks": {"hf": {"max": 0.1}}, "at": 1795818991.9, "none": []}
    assert text.count("\n") == 9 and f"  {json.dumps(row)}\n" in text
    assert json.loads((tmp_path / "details/run.json").read_text()) == record
