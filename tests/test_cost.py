"""Costs: formulas against counts."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

import moefx
from moefx.cost import EP, B, S, Sizes, node_cost, program_cost
from moefx.graph import aten, is_call

from .families import build


@pytest.fixture(scope="module")
def captured():
    model = build("qwen3_moe", num_attention_heads=4, hidden_size=80, moe_intermediate_size=48)
    program = moefx.capture(model)
    plan = moefx.Plan(moefx.resolve(["reference"]))
    moefx.rewrite(program, plan, moefx.passes.default(), model)
    return model, program, plan


def test_experts_and_linear_formulas(captured):
    _, program, _ = captured
    f = program["Qwen3MoeDecoderLayer"]
    sizes = Sizes(f, program.symbols)
    values = {**program.symbols, "B": 3, "S": 5}

    def number(expr):
        return expr.subs({s: values[str(s)] for s in expr.free_symbols})

    experts = next(n for n in f.graph.nodes if n.meta.get("semantic") is moefx.ops.experts)
    assert number(node_cost(experts, sizes).flops) == 6 * 15 * 2 * 80 * 48
    linear = next(n for n in f.graph.nodes if is_call(n, aten.linear.default))
    assert number(node_cost(linear, sizes).flops) == 2 * 15 * 80 * 64


def test_dense_part_against_a_counter(captured):
    model, program, plan = captured
    f = program["Qwen3MoeDecoderLayer"]
    sizes, values = Sizes(f, program.symbols), {**program.symbols, "B": 2, "S": 16}
    linears = sum((node_cost(n, sizes).flops for n in f.graph.nodes if is_call(n, aten.linear.default)), sympy.Integer(0))
    x = torch.randn(2, 16, 80)
    layer = model.model.layers[0]
    with FlopCounterMode(display=False) as counter:
        a = layer.self_attn
        a.o_proj(torch.cat([a.q_proj(x)], -1)), a.k_proj(x), a.v_proj(x), layer.mlp.gate(x)
    assert float(linears.subs({s: values[str(s)] for s in linears.free_symbols})) == counter.get_total_flops()


def test_totals(captured):
    _, program, plan = captured
    cost = program_cost(program, plan, B=2, S=16)
    one, many = cost.functions["Qwen3MoeDecoderLayer"]
    assert many == 2 and cost.evaluate(B=4)[0] > 1.9 * cost.evaluate(B=2)[0] and "total" in str(cost)
    assert B in one.flops.free_symbols and S in one.flops.free_symbols and one.sent == 0


def test_bytes_sent():
    from moefx.cli import inspect
    from moefx.tiny import tiny_config

    report = inspect(tiny_config("qwen3_moe"), 4)
    sent = report.cost().functions["Qwen3MoeDecoderLayer"][0].sent
    wanted = 2 * B * S * 2 * 64 * 4 * (EP - 1) / EP  # there and back, two experts a token, fp32
    values = {k: v for k, v in report.program.symbols.items()}
    assert sympy.simplify(sent.subs({s: values[str(s)] for s in sent.free_symbols if str(s) in values}) - wanted) == 0
