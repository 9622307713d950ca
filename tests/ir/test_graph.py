"""``emit``, ``unpack``, ``replace``: what passes write graphs with."""

import operator

import pytest
import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from moefx import emit, is_call, ops, replace, unpack, value
from moefx.ir.graph import origin, running_pass

aten = torch.ops.aten


@pytest.fixture
def graph() -> fx.Graph:
    def f(x):
        return (x.sin() + 1).cos()

    made = make_fx(f, tracing_mode="symbolic")(torch.rand(3, 8, dtype=torch.bfloat16)).graph
    sine = next(n for n in made.nodes if is_call(n, aten.sin.default))
    sine.meta["stack_trace"] = 'File "modeling_x.py", line 7'
    return made


def named(graph: fx.Graph, target) -> fx.Node:
    return next(n for n in graph.nodes if is_call(n, target))


def test_a_new_node_has_value_source_and_pass(graph):
    sine = named(graph, aten.sin.default)
    with running_pass("mine"):
        new = emit(sine, aten._to_copy.default, sine.args[0], dtype=torch.float32)
    assert new.next is sine
    assert (value(new).dtype, value(new).shape) == (torch.float32, value(sine).shape)
    assert (origin(new).sources, origin(new).passes) == (("modeling_x.py:7",), ("mine",))


def test_a_graph_is_written_at_its_end(graph):
    new = emit(graph, aten.neg.default, named(graph, aten.cos.default))
    assert new.next.op == "output"


def test_an_operation_that_asks_for_a_size_fixes_none(graph):
    def asks(x):
        assert x.shape[0] != 0 and int(x.shape[0]) == 3
        return x.neg()

    cosine = named(graph, aten.cos.default)
    emit(graph, asks, cosine)
    (x,) = (n for n in graph.nodes if n.op == "placeholder")
    assert isinstance(value(x).shape[0].node.expr, sympy.Symbol) and not value(x).fake_mode.shape_env.replacements


def test_nodes_within_lists_are_arguments(graph):
    cosine = named(graph, aten.cos.default)
    assert value(emit(graph, aten.cat.default, [cosine, cosine])).shape[0] == 2 * value(cosine).shape[0]


def test_outputs_come_after_their_node_and_are_made_once(graph):
    logits = named(graph, aten.cos.default)
    route = emit(graph, ops.route, logits, None, 2)
    weights, index = unpack(route)
    assert (route.next, weights.next) == (weights, index)
    assert value(index).dtype == torch.int64
    assert unpack(route) == (weights, index)
    assert sum(is_call(n, operator.getitem) for n in graph.nodes) == 2


def test_a_late_output_moves_up(graph):
    route = emit(graph, ops.route, named(graph, aten.cos.default), None, 2)
    late = emit(graph, aten.neg.default, route.args[0])
    with graph.inserting_after(late):
        index = graph.call_function(operator.getitem, (route, 1))
    index.meta["val"] = value(route)[1]
    assert unpack(route)[1] is index
    graph.lint()
    assert list(graph.nodes).index(index) < list(graph.nodes).index(late)


def test_the_readers_of_a_replaced_node_read_the_new_one(graph):
    sine, total = named(graph, aten.sin.default), named(graph, aten.add.Tensor)
    with running_pass("mine"):
        new = emit(total, aten.cos.default, sine.args[0])
        replace(sine, new)
    assert total.args[0] is new
    assert sine not in graph.nodes
    assert origin(new).sources == ("modeling_x.py:7",)  # of what it stands for
    assert origin(new).passes == ("mine",)
    graph.lint()
