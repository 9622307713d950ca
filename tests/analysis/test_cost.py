"""Cost formulas against counts made from the configurations."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

import moefx
from moefx.analysis.cost import EP, B, S, Sizes, node_cost
from moefx.cli.inspect import inspect
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.ir.graph import aten, is_call, op_name
from tests.support.families import FAMILIES, build

pytestmark = pytest.mark.usefixtures("cached_captures")


def report_of(name, **changes):
    model = build(name, **changes)
    program = moefx.capture(model)
    return model, moefx.rewrite(program, moefx.Plan(moefx.resolve(["reference"])), moefx.passes.default(), model)


def flops_by_operation(function, b, s):
    """Operation -> FLOPs at batch b and sequence s."""
    sizes, found = Sizes(function), {}
    for node in function.graph.nodes:
        expression = node_cost(node, sizes).flops
        if expression != 0:
            values = {**sizes.roles, "B": b, "S": s, "ep": 1}
            name = op_name(node.meta.get("semantic", node.target))
            found[name] = found.get(name, 0) + int(expression.subs({x: values[str(x)] for x in expression.free_symbols}))
    return found


def test_every_operation_of_a_block():
    """Sizes that are equal on purpose (8 heads, experts and intermediate features): no role is taken for another."""
    model, report = report_of("qwen3_moe", hidden_size=80, moe_intermediate_size=8, num_attention_heads=8, head_dim=16)
    found = flops_by_operation(report.program["Qwen3MoeDecoderLayer"], 3, 5)
    assert found["moefx.experts"] == 2 * (3 * 5 * 2) * 3 * 80 * 8
    assert found["moefx.attention"] == 4 * 3 * 8 * (5 * 6 / 2) * 16
    layer, x = model.model.layers[0], torch.randn(3, 5, 80)
    with FlopCounterMode(display=False) as counter:
        a = layer.self_attn
        a.o_proj(a.q_proj(x)), a.k_proj(x), a.v_proj(x), layer.mlp.gate(x)
    assert found["aten.linear"] == counter.get_total_flops()
    assert flops_by_operation(report.program["head"], 3, 5)["moefx.linear_cross_entropy"] == 2 * 15 * 80 * 256


@pytest.mark.parametrize(("length", "pairs"), [(5, 15), (8, 36), (20, 36 + 12 * 8)])
def test_a_sliding_window_costs_its_band(length, pairs):
    _, report = report_of("gpt_oss")
    windows = {
        n.kwargs.get("window"): f
        for f in report.program
        for n in f.graph.nodes
        if n.meta.get("semantic") is moefx.ops.attention
    }
    assert set(windows) == {8, None}
    assert flops_by_operation(windows[8], 2, length)["moefx.attention"] == 4 * 2 * 4 * pairs * 16
    assert flops_by_operation(windows[None], 2, length)["moefx.attention"] == 4 * 2 * 4 * length * (length + 1) / 2 * 16


def test_values_of_another_width_than_queries():
    _, report = report_of("deepseek_v3", v_head_dim=12)
    f = next(f for f in report.program if f.expects.get("experts"))
    assert flops_by_operation(f, 2, 7)["moefx.attention"] == 2 * 2 * 4 * (7 * 8 / 2) * (16 + 8 + 12)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_expert_parallelism_moves_no_work(name):
    """Balanced: each rank computes as many rows as it would alone, and reads its own experts only. It sends a token to each
    other rank that has one of its experts: counted here over all choices of K experts."""
    alone, spread = (inspect(tiny_config(name), ep).cost() for ep in (1, 4))
    for f in alone.functions:
        one, four = alone.functions[f][0], spread.functions[f][0]
        assert alone.numbers(f)[0] == pytest.approx(spread.numbers(f)[0])
        if one.flops.has(sympy.Symbol("K", positive=True, integer=True)):
            k, h, e = (spread.roles[f][x] for x in "KHE")
            sets = list(itertools.combinations(range(e), k))
            others = sum(len({i // (e // 4) for i in chosen} - {0}) for chosen in sets) / len(sets)
            there, back = 4 * h + 2 * ((4 * k + 15) // 16 * 16), 4 * h  # fp32; weights and experts, in whole 16 bytes
            assert spread.numbers(f)[3] == pytest.approx(4096 * others * (there + back) + 16 * 3)
            assert EP in four.read.free_symbols and one.sent == 0


def test_total_and_text():
    _, report = report_of("qwen3_moe")
    cost = report.cost(B=2, S=16)
    one, many = cost.functions["Qwen3MoeDecoderLayer"]
    assert many == 2 and {B, S} <= one.flops.free_symbols
    parts = [cost.numbers(f)[0] * n for f, (_, n) in cost.functions.items()]
    assert cost.evaluate()[0] == sum(parts) and cost.evaluate(B=4)[0] == 2 * cost.evaluate(B=2)[0]
    assert "total" in str(cost) and max(map(len, str(cost).splitlines())) <= 100


def test_a_symbol_without_a_value():
    _, report = report_of("qwen3_moe")
    cost, _ = report.cost().functions["Qwen3MoeDecoderLayer"]
    with pytest.raises(moefx.MoefxError, match="the cost depends on A, which has no value: pass A=..."):
        cost.evaluate({"B": 1, "S": 2})


def test_matrix_products_of_the_graph_only():
    """Views and getitems are free, elementwise work is bytes."""
    _, report = report_of("qwen3_moe")
    f = report.program["Qwen3MoeDecoderLayer"]
    sizes = Sizes(f)
    for node in f.graph.nodes:
        if is_call(node, aten.view.default, aten.reshape.default):
            assert node_cost(node, sizes).parts == (0, 0, 0, 0)
        if is_call(node, aten.add.Tensor):
            assert node_cost(node, sizes).flops == 0 and node_cost(node, sizes).read != 0
