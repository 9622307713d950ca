"""The pass 'overlap' and the timeline in one process: the order of nodes, the number of chunks, and refusals."""

from __future__ import annotations

import functools
import itertools
import xml.etree.ElementTree as ET

import pytest

import moefx
from moefx.analysis.timeline import timeline
from moefx.ir.graph import aten, is_call, op_name
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from moefx.passes import Overlap, default
from tests.support.code_checks import defined
from tests.support.families import build
from tests.support.passes import rewritten_over_ranks

pytestmark = pytest.mark.usefixtures("cached_captures")


@functools.cache
def report_of(name: str, overlap: Overlap | None, ep: int = 4, **changes):
    pipeline = default().without("overlap") if overlap is None else default().replace("overlap", overlap)
    with rewritten_over_ranks(name, ep, pipeline, **changes) as report:
        schedules = {way: report.timelines(backward=way == "backward", S=4096) for way in ("forward", "backward")}
    return report, schedules


def test_the_code_names_what_is_exchanged():
    report, _ = report_of("qwen3_moe", Overlap(chunks=2))
    for stage in report.passes:
        for listing in stage.after.values():
            defined(listing)
    assert "permuted_tokens, permuted_probs, tokens_per_expert, row_id_map, " in report["expert_parallel"].code
    assert "permuted_tokens_1, permuted_probs_1, tokens_per_expert_1, row_id_map_1, " in report["overlap"].code


def calls(report, function: str) -> list[str]:
    """The operations of a function in order, without views."""
    skip = ("getitem", "aten.reshape", "aten.view", "aten.slice", "aten.sym_size", "mul", "floordiv")
    names = [op_name(n.target) for n in report.program[function].graph.nodes if n.op == "call_function"]
    return [n.removeprefix("moefx.") for n in names if not n.startswith(skip)]


SHARED = ["aten.linear", "aten.linear", "swiglu", "aten.linear"]
BLOCK = "DeepseekV3DecoderLayer_2"
WIDE = {"hidden_size": 4096, "moe_intermediate_size": 2048}


def test_a_shared_expert_runs_while_rows_are_under_way():
    report, _ = report_of("deepseek_v3", Overlap(chunks=1))
    found = calls(report, BLOCK)
    start, wait = found.index("dispatch_start"), found.index("dispatch_wait")
    assert found[start + 1 : wait] == SHARED
    assert found[wait + 1 :][:3] == ["grouped_mlp", "combine_start", "combine_wait"]
    assert "chunks=1: 4 nodes run during dispatch, 0 during combine" in str(report["overlap"])
    assert report["overlap"].made_count == 2 and not report["overlap"].missed


def test_what_the_dispatch_does_not_hide_runs_while_rows_come_back():
    """A wide shared expert: its second half is left for the way back."""
    report, _ = report_of("deepseek_v3", Overlap(chunks=1, tokens=65536), moe_intermediate_size=4096, n_shared_experts=8)
    found = calls(report, BLOCK)
    start, wait, back, end = (found.index(n) for n in ("dispatch_start", "dispatch_wait", "combine_start", "combine_wait"))
    first, second = found[start + 1 : wait], found[back + 1 : end]
    assert first + second == SHARED and first and second


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_take_turns(chunks):
    report, _ = report_of("qwen3_moe", Overlap(chunks=chunks), **(WIDE if chunks == 2 else {}))
    found = [n for n in calls(report, "Qwen3MoeDecoderLayer") if n.startswith(("dispatch", "combine", "grouped", "aten.cat"))]
    each = ["dispatch_wait", "grouped_mlp", "combine_start"]
    assert found == ["dispatch_start"] * chunks + each * chunks + ["combine_wait"] * chunks + ["aten.cat"]
    nodes = report.program["Qwen3MoeDecoderLayer"].graph.nodes
    symbols = {}
    for n in nodes:  # the parts add up to all tokens, whatever their number
        if is_call(n, dispatch_combine.combine_wait, aten.cat.default):
            symbols.setdefault(op_name(n.target), []).append(n.meta["val"].shape[0].node.expr)
    whole = symbols["aten.cat"][0]
    for b, s in ((1, 1), (2, 7), (3, 8), (5, 5)):
        at = dict(zip(sorted(whole.free_symbols, key=str), (b, s)))
        parts = [int(e.subs(at)) for e in symbols["moefx.combine_wait"]]
        assert sum(parts) == b * s == int(whole.subs(at)) and max(parts) - min(parts) <= 1
    kernels = {op: many for (op, _), (many, _) in report.kernels().items()}
    assert kernels["dispatch"] == kernels["combine"] == kernels["grouped_mlp"] == 2 * chunks


def test_without_expert_parallelism_there_is_nothing_to_do():
    model = build("qwen3_moe")
    report = moefx.rewrite(moefx.capture(model), moefx.Plan(moefx.resolve(["reference"])), default(), model)
    assert report["overlap"].made_count == report["overlap"].missed_count == 0 and report.timelines() == []


def test_rows_that_something_else_reads_are_left_alone():
    report, _ = report_of("qwen3_moe", None)
    function = report.program["Qwen3MoeDecoderLayer"]
    mlp = next(n for n in function.graph.nodes if n.meta.get("semantic") is grouped.grouped_mlp)
    mlp.meta["semantic"] = None
    before = function.graph_module.code
    changes = Overlap(chunks=2).run(function, report.plan)
    assert not changes.made and "is used by another operation than grouped_mlp" in changes.missed[0].what
    assert function.graph_module.code == before


def test_rows_that_other_weights_multiply_are_left_alone():
    """Only the weights that the dispatch brings are cut into chunks with their rows."""
    report, _ = report_of.__wrapped__("qwen3_moe", None)  # its own, to change
    function = report.program["Qwen3MoeDecoderLayer"]
    mlp = next(n for n in function.graph.nodes if n.meta.get("semantic") is grouped.grouped_mlp)
    brought = mlp.kwargs["permuted_probs"]
    with function.graph.inserting_before(mlp):
        other = function.graph.call_function(aten.neg.default, (brought,))
    mlp.kwargs = {**mlp.kwargs, "permuted_probs": other}
    before = str(function.graph)
    changes = Overlap(chunks=2).run(function, report.plan)
    assert (
        not changes.made
        and "weighted by neg_default = aten.neg, not by the weights that it dispatches" in changes.missed[0].what
    )
    assert str(function.graph) == before


def test_each_chunks_rows_are_multiplied_by_its_own_weights():
    report, _ = report_of("qwen3_moe", Overlap(chunks=2))
    nodes = report.program["Qwen3MoeDecoderLayer"].graph.nodes
    experts = [n for n in nodes if n.meta.get("semantic") is grouped.grouped_mlp]
    for n in experts:
        assert (n.args[0].args[1], n.kwargs["permuted_probs"].args[1]) == (0, 1) and n.args[0].args[0] is n.kwargs[
            "permuted_probs"
        ].args[0]
    assert len(experts) == 2 == len({n.args[0].args[0] for n in experts})


def test_the_timeline_hides_the_exchange_under_the_other_chunk():
    _, one = report_of("qwen3_moe", Overlap(chunks=1), **WIDE)
    _, two = report_of("qwen3_moe", Overlap(chunks=2), **WIDE)
    for way in ("forward", "backward"):
        (a,), (b,) = one[way], two[way]
        assert a.hidden < 0.1 < 0.4 < b.hidden and b.seconds < a.seconds
        for t, chunks in ((a, 1), (b, 2)):
            lanes = {lane: [s for s in t.spans if s.lane == lane] for lane in ("compute", "exchange")}
            for spans in lanes.values():
                assert all(x.end <= y.start + 1e-12 for x, y in itertools.pairwise(spans))
            kinds = [(s.kind, s.chunk) for s in lanes["exchange"]]
            assert sorted(kinds) == [(k, c) for k in ("combine", "dispatch") for c in range(1, chunks + 1)]
            experts = [s.chunk for s in lanes["compute"] if s.kind == "experts"]
            assert experts == (list(range(1, chunks + 1)) if way == "forward" else list(range(chunks, 0, -1)))
            root = ET.fromstring(t.svg())
            assert len(root.findall("{*}rect")) == len(t.spans) + 5
            lines = str(t).splitlines()
            assert len(lines) == 4 and max(map(len, lines)) <= 120 and "E" in lines[1] and "D" in lines[2] and "C" in lines[2]


def test_an_exchange_without_anything_beside_it_is_a_gap():
    """Two exchanges and one product: the timeline is their sum."""
    report, schedules = report_of("qwen3_moe", Overlap(chunks=1), **WIDE)
    (found,) = schedules["forward"]
    assert found.seconds == pytest.approx(sum(s.end - s.start for s in found.spans))
    assert str(timeline(report.program["head"], report.plan)).count("D1") == 0
