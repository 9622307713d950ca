"""Dispatch and combine within one process: their contract for a group of one rank, and shapes for a group of 64."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

import moefx
from moefx import ops
from moefx.errors import MoefxError
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped

E, K, H, INNER = 4, 2, 8, 6


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _index(tokens, experts=E, seed=0):
    """K different experts per token."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(K, dim=1).indices


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {"num_experts": E, "group": dist.group.WORLD.group_name}
    dist.destroy_process_group()


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_rows_arrive_by_expert_in_the_order_of_the_tokens(group, tokens):
    x, index, weights = _random(tokens, H), _index(tokens), _random(tokens, K, seed=1)
    rows, permuted_probs, counts, *route, _ = dispatch_combine.dispatch(x, index, weights, **group)
    order = [(t, e) for e in range(E) for t in range(tokens) if e in index[t]]
    assert torch.equal(rows, x[[t for t, _ in order]])
    assert counts.tolist() == [sum(e == expert for _, expert in order) for e in range(E)]
    assert torch.equal(
        permuted_probs, torch.stack([weights[t, index[t] == e] for t, e in order]).flatten() if order else weights[:0, 0]
    )
    row_id_map, handle, cpu_metadata, _ = route
    assert counts.dtype == cpu_metadata.dtype == torch.int64 and handle.dtype == torch.uint8
    assert row_id_map.tolist() == [[order.index((t, int(e))) for e in index[t]] for t in range(tokens)]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_combine_adds_up_the_rows_of_each_token(group, tokens):
    x, index, weights = _random(tokens, H), _index(tokens), _random(tokens, K, seed=1)
    rows, permuted_probs, _, *route, _ = dispatch_combine.dispatch(x, index, weights, **group)
    y = dispatch_combine.combine(rows * permuted_probs.unsqueeze(1), index, *route, **group)
    torch.testing.assert_close(y, x * weights.sum(dim=1, keepdim=True))


def test_combine_adds_in_float32_and_returns_the_dtype_of_the_rows(group):
    x, index = _random(7, H).bfloat16(), _index(7)
    rows, permuted_probs, counts, *route, _ = dispatch_combine.dispatch(x, index, torch.ones(7, K), **group)
    rows = rows * (torch.arange(E).repeat_interleave(counts) + 1).to(rows.dtype).unsqueeze(1)
    y = dispatch_combine.combine(rows, index, *route, **group)
    assert permuted_probs.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert torch.equal(y, (x[:, None] * (index + 1).bfloat16().unsqueeze(2)).float().sum(dim=1).bfloat16())


def test_gradients_of_rows_and_weights(group):
    """gradcheck in fp64, through both operations: the backward of dispatch is a combine, that of combine a dispatch."""
    index = _index(5)

    def there_and_back(x, weights):
        rows, permuted_probs, _, *route, _ = dispatch_combine.dispatch(x, index, weights, **group)
        return dispatch_combine.combine(rows.square() * permuted_probs.unsqueeze(1), index, *route, **group)

    inputs = _random(5, 3).requires_grad_(), _random(5, K, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(there_and_back, inputs)


def test_an_exchange_is_differentiated_once(group):
    index, x, weights = _index(5), _random(5, 3).requires_grad_(), _random(5, K, seed=1).requires_grad_()
    rows, permuted_probs, _, *route, _ = dispatch_combine.dispatch(x, index, weights, **group)
    y = dispatch_combine.combine(rows.square() * permuted_probs.unsqueeze(1), index, *route, **group)
    with pytest.raises(moefx.MoefxError, match=r"moefx::combine_wait is to be differentiated \(create_graph=True\)"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("capacity", [0, 20])
def test_no_gradient_is_added_to_one_that_is_still_arriving(group, capacity):
    """What dispatch starts to bring back, in the backward, is the gradient of a link: nobody but dispatch's wait may read that link.

    Combine may be in another graph; a link that it read would get zeros from there, added in row_id_map while rows arrive.
    """
    x, index, weights = _random(7, H).requires_grad_(), _index(7), _random(7, K, seed=1).requires_grad_()
    rows, permuted_probs, *route, _ = dispatch_combine.dispatch(x, index, weights, **group, capacity=capacity)
    assert rows.requires_grad and permuted_probs.requires_grad and not any(t.requires_grad for t in route)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        fake = dispatch_combine.dispatch(x, index, weights, **group, capacity=capacity)
    assert fake[0].requires_grad and not any(t.requires_grad for t in fake[2:])


@pytest.mark.parametrize("capacity", [0, 20])
def test_combine_keeps_no_rows_for_the_backward(group, capacity):
    """Where rows went is kept, 4 bytes for each (token, k); no row of H numbers, and so not the experts' results."""
    x, index, weights = _random(7, 64).requires_grad_(), _index(7), _random(7, K, seed=1)
    rows, _, _, *route, _ = dispatch_combine.dispatch(x, index, weights, **group, capacity=capacity)
    each = rows * 2.0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dispatch_combine.combine(each, index, *route, **group)
    row_id_map, handle, cpu_metadata, _ = route
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert row_id_map.untyped_storage().data_ptr() in storages and each.untyped_storage().data_ptr() not in storages
    assert max(storages.values()) <= max(row_id_map.nbytes, handle.nbytes, cpu_metadata.nbytes) < each.nbytes
    grad = _random(7, 64, seed=5)
    (to_each,) = torch.autograd.grad(y, each, grad)
    assert (row_id_map[7:] == -1).all() and torch.equal(to_each[row_id_map[:7].long()], grad.unsqueeze(1).expand(-1, K, -1))


@pytest.mark.parametrize(("backend", "capacity"), [("aot_eager", 0), ("inductor", 0), ("inductor", 20)])
def test_compiled_experts_over_the_group_are_the_experts_operation(group, backend, capacity):
    """fullgraph, forward and backward, two numbers of tokens in one graph."""
    torch._dynamo.reset()
    weights = [_random(E, 2 * INNER, H, seed=2), _random(E, H, INNER, seed=3)]
    up, down = (w.float().requires_grad_() for w in weights)

    def over_ranks(x, index, scores):
        rows, permuted_probs, counts, *route, tokens = dispatch_combine.dispatch(x, index, scores, **group, capacity=capacity)
        options = {"activation": "swiglu", "permuted_probs": permuted_probs, "arrived": [tokens, route[0], route[2]]}
        rows = grouped.grouped_mlp(rows * 1.0, counts, up, None, down, None, **options)
        return dispatch_combine.combine(rows, index, *route, **group)

    compiled = torch.compile(over_ranks, fullgraph=True, dynamic=True, backend=backend)
    for step, tokens in enumerate((9, 14)):
        x, index, scores = _random(tokens, H).float().requires_grad_(), _index(tokens), _random(tokens, K).float()
        inputs = (x, scores.requires_grad_(), up, down)
        with torch._dynamo.config.patch(error_on_recompile=step == 1):
            y = compiled(x, index, scores)
        right = ops.experts(x, index, scores, up, None, down, None, activation="swiglu")
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
        grad = _random(tokens, H, seed=5).float()
        found, expected = (torch.autograd.grad(out, inputs, grad) for out in (y, right))
        for g, e in zip(found, expected):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_more_tokens_than_the_capacity_are_refused(group):
    x, index, weights = _random(21, H), _index(21), _random(21, K)
    with pytest.raises(MoefxError, match="21 tokens .* dispatch_capacity=20: .* as dispatch_capacity"):
        dispatch_combine.dispatch(x, index, weights, **group, capacity=20)


def test_shapes_for_64_ranks():
    """Under fake tensors and the fake process group: how many rows arrive is a new unknown, all else is known."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        group = {"num_experts": 128, "group": dist.group.WORLD.group_name}
        with FakeTensorMode(shape_env=ShapeEnv()):
            x, index = torch.randn(5, H, dtype=torch.bfloat16, requires_grad=True), torch.zeros(5, K, dtype=torch.int64)
            weights = torch.rand(5, K, requires_grad=True)
            rows, permuted_probs, counts, *route, _ = dispatch_combine.dispatch(x, index, weights, **group)
            y = dispatch_combine.combine((rows * permuted_probs.unsqueeze(1)).to(rows.dtype), index, *route, **group)
            to_x, to_weights = torch.autograd.grad(y.sum(), (x, weights))
        assert isinstance(rows.shape[0], torch.SymInt) and rows.shape[1] == H and counts.shape == (2,)
        assert y.shape == to_x.shape == x.shape and y.dtype == torch.bfloat16 and to_weights.shape == weights.shape
    finally:
        dist.destroy_process_group()
