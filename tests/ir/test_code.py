"""The code of a graph is Python that runs; names are those of the model."""

import operator

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from moefx import emit, ops, unpack
from moefx.ir.code import Listing, code_of
from moefx.ir.naming import input_names, name_nodes
from tests.support.code_checks import check_listing

aten = torch.ops.aten


def traced(f, *given) -> fx.Graph:
    return make_fx(f, tracing_mode="symbolic")(*given).graph


def of(graph: fx.Graph) -> Listing:
    return Listing.of(graph, "block")


def test_constants_are_quoted():
    def f(x):
        y = torch.full((3,), float("-inf"), dtype=torch.bfloat16, device="cpu")
        return x.to(torch.bfloat16) + y.max()

    graph = traced(f, torch.rand(5, 8))
    emit(graph, ops.route, graph.find_nodes(op="placeholder")[0], None, 2, score="sigmoid")
    name_nodes(graph, (), ["hidden_states"])
    check_listing(of(graph))
    code = code_of([of(graph)])
    assert "torch.device('cpu')" in code
    assert "score='sigmoid'" in code
    assert 'float("-inf")' in code


def test_outputs_are_unpacked_by_name():
    graph = traced(lambda x: x * 1, torch.rand(3, 8))
    logits = next(n for n in graph.nodes if n.op == "call_function")
    weights, index = unpack(emit(graph, ops.route, logits, None, 2))
    assert (weights.name, index.name) == ("topk_weights", "topk_ids")
    graph.output_node().args = (index,)
    graph.erase_node(weights)
    assert "_, topk_ids = ops.route(mul, None, 2)" in str(of(graph))
    check_listing(of(graph))


def test_a_tuple_that_is_read_as_one_is_not_unpacked():
    def f(x):
        a, b = x.chunk(2)
        return torch.cat([b, a])

    graph = traced(f, torch.rand(6))
    parts = next(n for n in graph.nodes if n.target is aten.split.Tensor)
    cat = next(n for n in graph.nodes if n.target is aten.cat.default)
    cat.args = (parts,)
    assert "split = " in str(of(graph))
    names: dict = {}
    exec(code_of([of(graph)]), names)
    given = torch.arange(6.0)
    assert torch.equal(names["block"](given), given)


def test_a_function_is_called_where_it_can_be_imported():
    graph = traced(lambda x: x * 1, torch.rand(3))
    emit(graph, operator.mul, emit(graph, aten.sym_size.int, next(iter(graph.nodes)), 0), 2)
    assert "operator.mul(" in str(of(graph))

    def local(x):
        return x.sin()

    new = emit(graph, local, next(iter(graph.nodes)))
    new.meta["semantic"] = aten.sin.default
    assert "local = aten.sin.default(" in str(of(graph)) or "local = aten.sin(" in str(of(graph))
    check_listing(of(graph))


def test_names_come_from_parameters_and_from_the_signature():
    def f(q_weight, gate_weight, x, cos, sin):
        return torch.nn.functional.linear(x * cos, q_weight), torch.nn.functional.linear(x.double() * sin, gate_weight.double())

    graph = make_fx(f, tracing_mode="symbolic", pre_dispatch=True)(*(torch.rand(3, 3) for _ in range(5))).graph
    called = {0: "input", 1: "position_embeddings 0", 2: "position_embeddings 1"}
    inputs = input_names(called, ["hidden_states", "attention_mask"], 3)
    assert inputs == ["hidden_states", "position_embeddings_0", "position_embeddings_1"]
    assert name_nodes(graph, ["attn.q_proj.weight", "mlp.gate.weight"], inputs) == inputs
    results = [n.name for n in graph.output_node().args[0]]
    assert results == ["q_proj", "router_logits"]
