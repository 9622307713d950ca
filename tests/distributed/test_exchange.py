"""Experts sharded across 2 and 4 gloo ranks: the identity, and values and all gradients against one process with all experts.

Every input comes from a seed, so that this process can compute what the ranks should have found.
"""

import itertools
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import moefx
from moefx import ops, transports
from moefx.backends.experimental import te_ep
from moefx.ops import dispatch_combine, exchange
from moefx.ops import grouped_mlp as grouped
from moefx.transports import fp8_rows, hierarchical
from tests.support.spawn import run

E, K, H, INNER = 8, 2, 8, 6
#: Tokens on each rank; and which experts the routers may choose.
CASES = {
    "even": ([6, 6, 6, 6], range(E)),
    "uneven, a rank without tokens": ([5, 0, 1, 9], range(E)),
    "an expert without tokens": ([6, 3, 4, 6], [e for e in range(E) if e != 3]),
    "all tokens to the last rank": ([6, 3, 4, 6], [E - 2, E - 1]),
    "all tokens to one expert": ([6, 3, 4, 6], [E - 1]),
    "no tokens at all": ([0, 0, 0, 0], range(E)),
}
#: One after the other in one compiled graph: the number of tokens of a rank changes in between.
COMPILED = ("even", "uneven, a rank without tokens")


def _random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _tokens(case, rank, dtype=torch.float64):
    """x [T, H], index [T, k], weights [T, k] of one rank; k is K, or 1 where there is one expert to choose."""
    counts, allowed = CASES[case]
    tokens, allowed = counts[rank], torch.tensor(list(allowed))
    scores = torch.rand(tokens, len(allowed), generator=torch.Generator().manual_seed(100 + rank))
    index = allowed[scores.topk(min(K, len(allowed)), dim=1).indices]
    weights = torch.rand(index.shape, generator=torch.Generator().manual_seed(200 + rank), dtype=torch.float64)
    return _random(tokens, H, seed=rank, dtype=dtype), index, weights.float() if dtype != torch.float64 else weights


def _experts(dtype=torch.float64):
    """up, gate_up_bias, down, down_bias of all experts."""
    shapes = (E, 2 * INNER, H), (E, 2 * INNER), (E, H, INNER), (E, H)
    return [_random(*shape, seed=50 + i, dtype=dtype) / 2 for i, shape in enumerate(shapes)]


def _over_ranks(
    x, index, weights, up, gate_up_bias, down, down_bias, *, group, grad_scale=1.0, capacity=0, by="", dispatch_dtype=""
):
    send = dispatch_combine.dispatch_with(by)
    where = {"num_experts": E, "group": group}
    rows, permuted_probs, counts, *route, tokens = send(
        x, index, weights, **where, capacity=capacity, dispatch_dtype=dispatch_dtype
    )
    options = {"activation": "swiglu", "grad_scale": grad_scale, "permuted_probs": permuted_probs}
    options["arrived"] = [tokens, route[0], route[2]]
    rows = grouped.grouped_mlp(rows, counts, up, gate_up_bias, down, down_bias, **options)
    return dispatch_combine.combine(rows, index, *route, **where)


def _forward_backward(function, case, rank, ep_rank, ep, group, dtype=torch.float64, **options):
    x, index, weights = _tokens(case, rank, dtype)
    here = slice(ep_rank * E // ep, (ep_rank + 1) * E // ep)
    local = [w[here].clone().requires_grad_() for w in _experts(dtype)]
    x.requires_grad_(), weights.requires_grad_()
    y = function(x, index, weights, *local, group=group, **options)
    y.backward(_random(*y.shape, seed=300 + rank, dtype=dtype))
    return y.detach(), x.grad, weights.grad, *(w.grad for w in local)


class _Counting:
    """torch.distributed, with a scale at the gate."""

    sent = 0

    def __getattr__(self, name):
        return getattr(dist, name)

    def all_to_all_single(self, out, rows, receive=None, send=None, *, group, **options):
        me, each = group.rank(), rows.nbytes // max(rows.shape[0], 1)
        sizes = send or [rows.shape[0] // group.size()] * group.size()
        self.sent += each * (sum(sizes) - sizes[me])
        return dist.all_to_all_single(out, rows, receive, send, group=group, **options)


def _bytes_of_a_forward(world_size, **options):
    """Bytes that this rank sent to others in a forward, and what the cost model's formula says. Every set of two experts is
    chosen by one token: the formula's average is then what happens."""
    import moefx
    from moefx.transports import all_to_all
    from tests.support.families import batch, build

    model = moefx.optimize(build("qwen3_moe"), ep_size=world_size, compile=False, **options)
    sets = torch.tensor(list(itertools.combinations(range(8), 2)))
    all_to_all.dist = scale = _Counting()
    try:
        with moefx.replay_routes(model, {f"model.layers.{i}.mlp.experts": sets for i in range(2)}):
            model(**batch(1, len(sets), labels=False))
    finally:
        all_to_all.dist = dist
    found = scale.sent, moefx.report(model).cost(B=1, S=len(sets)).evaluate()[3]
    moefx.restore(model)
    return found


def _count_rows(stage):
    """Into this list: how many rows each exchange of ``stage`` sends to other ranks."""
    counted, plain = [], stage.exchange

    def exchange(rows, send, receive, call):
        counted.append(sum(send) - send[call.group.rank()])
        return plain(rows, send, receive, call)

    stage.exchange = exchange
    return counted


def _hangs(rank):
    """What rank 0 is told when rank 1 does not come: to a dispatch, and to the combine after it."""
    told = []
    for late in ("dispatch", "combine"):
        group = dist.new_group([0, 1], timeout=timedelta(seconds=2)).group_name
        x, index, weights = _tokens("even", rank)
        try:
            with exchange.layer("model.layers.7"):
                if rank == 0 or late == "combine":
                    rows, _, _, *route, _ = dispatch_combine.dispatch(x, index, weights, num_experts=E, group=group)
                if rank == 0:
                    dispatch_combine.combine(rows, index, *route, num_experts=E, group=group)
        except moefx.ExchangeError as error:
            told.append(str(error))
        dist.barrier()
    return told


def on_rank(rank, world_size):
    """Everything that needs ranks, by name."""
    group = dist.group.WORLD.group_name
    found = {}
    for case in CASES:
        x, index, _ = _tokens(case, rank)
        share = torch.full(index.shape, 1 / index.shape[1], dtype=x.dtype)
        rows, permuted_probs, counts, *route, _ = dispatch_combine.dispatch(x, index, share, num_experts=E, group=group)
        back = dispatch_combine.combine(rows * permuted_probs.unsqueeze(1), index, *route, num_experts=E, group=group)
        found[case, "sent"] = rows, counts, back
        found[case, "capacity"] = _forward_backward(_over_ranks, case, rank, rank, world_size, group, capacity=9)
        found[case, "trained"] = _forward_backward(_over_ranks, case, rank, rank, world_size, group)
    if world_size == 2:
        from tests.support.nccl_ep_standin import StandIn

        library = StandIn(dist.group.WORLD, E, 9)
        te_ep._library = te_ep._configure = lambda *_: library
        for case in CASES:
            how = {"capacity": 9, "by": "te_ep"}
            found[case, "te_ep"] = _forward_backward(_over_ranks, case, rank, rank, 2, group, torch.float32, **how)
    if world_size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two nodes
        rails = _count_rows(hierarchical.Hierarchical.stage)
        for case in CASES:
            found[case, "nodes"] = _forward_backward(_over_ranks, case, rank, rank, 4, group, by="hierarchical")
            found[case, "rows that cross"] = rails[0]
            rails.clear()
        how = {"by": "hierarchical", "dispatch_dtype": "fp8"}
        found["nodes, FP8"] = _forward_backward(_over_ranks, "even", rank, rank, 4, group, torch.float32, **how)
        found["default"] = transports.default_transport(transports.Call(dist.group.WORLD, E))
        del os.environ["LOCAL_WORLD_SIZE"]
        found["default"] = found["default"], transports.default_transport(transports.Call(dist.group.WORLD, E))
    uneven = "uneven, a rank without tokens"
    found["bf16"] = _forward_backward(_over_ranks, uneven, rank, rank, world_size, group, torch.bfloat16)
    found["grad_scale"] = _forward_backward(_over_ranks, uneven, rank, rank, world_size, group, grad_scale=1 / world_size)

    if world_size == 2:  # compiling costs each rank seconds
        compiled = torch.compile(_over_ranks, fullgraph=True, dynamic=True, backend="aot_eager")
        for case in COMPILED:
            found[case, "compiled"] = _forward_backward(compiled, case, rank, rank, world_size, group)

    for name, how in {"FP8": {"dispatch_dtype": "fp8"}, "FP8, capacity": {"dispatch_dtype": "fp8", "capacity": 9}}.items():
        found[name] = _forward_backward(_over_ranks, "even", rank, rank, world_size, group, torch.float32, **how)
    found["bytes"] = _bytes_of_a_forward(world_size)
    found["bytes in FP8"] = _bytes_of_a_forward(world_size, dispatch_dtype="fp8")
    if world_size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        found["bytes over nodes"] = _bytes_of_a_forward(4)
        found["bytes over nodes in FP8"] = _bytes_of_a_forward(4, dispatch_dtype="fp8")
        del os.environ["LOCAL_WORLD_SIZE"]
    if world_size == 2:
        found["hangs"] = _hangs(rank)

    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    pair = pairs[rank // 2].group_name
    found["pairs"] = _forward_backward(_over_ranks, uneven, rank, rank % 2, 2, pair)
    return found


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request):
    return run(on_rank, request.param, timeout=150)  # four ranks import for long on two cores


def _one_process(case, ranks, dtype=torch.float64, sent=lambda x: x, computed=None):
    """What one process computes: y, gradients of x and weights for each of ``ranks``, then gradients of all experts.

    ``sent``: what the dispatch does to tokens; ``computed``: the dtype to compute in, if it is not theirs.
    """
    parameters = [w.to(computed or dtype).requires_grad_() for w in _experts(dtype)]
    up, gate_up_bias, down, down_bias = parameters
    per_rank = []
    for rank in ranks:
        x, index, weights = _tokens(case, rank, dtype)
        x, weights = (t.to(computed or t.dtype).requires_grad_() for t in (sent(x), weights))
        y = ops.experts(x, index, weights, up, gate_up_bias, down, down_bias, activation="swiglu")
        y.backward(_random(*y.shape, seed=300 + rank, dtype=dtype).to(y.dtype))
        per_rank.append((y.detach(), x.grad, weights.grad))
    return per_rank, [w.grad for w in parameters]


def _check(found, case, members, *, scale=1.0, dtype=torch.float64, rtol=1e-6, atol=1e-6, **options):
    """``found``: of each member rank, in order. The experts' gradients lie one rank after the other."""
    per_rank, parameters = _one_process(case, members, dtype, **options)
    for ours, right in zip(found, per_rank):
        for a, b in zip(ours[:3], right):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for i, right in enumerate(parameters):
        joined = torch.cat([ours[3 + i] for ours in found])
        torch.testing.assert_close(joined, right * scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_combine_brings_back_what_dispatch_sent(ranks, case):
    for rank, found in enumerate(ranks):
        assert torch.equal(found[case, "sent"][2], _tokens(case, rank)[0])


@pytest.mark.parametrize("case", CASES)
def test_rows_arrive_by_expert_then_rank_then_token(ranks, case):
    local = E // len(ranks)
    everything = [_tokens(case, rank) for rank in range(len(ranks))]
    for rank, found in enumerate(ranks):
        rows, counts, _ = found[case, "sent"]
        mine = range(rank * local, (rank + 1) * local)
        expected = [[x[t] for x, index, _ in everything for t in range(len(x)) if e in index[t]] for e in mine]
        assert counts.tolist() == [len(part) for part in expected]
        flat = [row for part in expected for row in part]
        assert torch.equal(rows, torch.stack(flat) if flat else torch.empty(0, H, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_process(ranks, case):
    _check([r[case, "trained"] for r in ranks], case, range(len(ranks)))
    _check([r[case, "capacity"] for r in ranks], case, range(len(ranks)))


@pytest.mark.parametrize("case", CASES)
def test_over_nodes_a_token_crosses_once(ranks, case):
    """Values and gradients are the same; a token goes to another node once, also if it has experts on both ranks there."""
    if len(ranks) == 4:
        _check([r[case, "nodes"] for r in ranks], case, range(4))
        for rank, found in enumerate(ranks):
            _, index, _ = _tokens(case, rank)
            other = (index // (E // 2) != rank // 2).any(dim=1)
            assert found[case, "rows that cross"] == int(other.sum())
            assert found["default"] == ("hierarchical", "all_to_all")


@pytest.mark.parametrize("case", CASES)
def test_over_nccl_ep_as_it_is_described(ranks, case):
    """The library itself needs GPUs: tests/gpu. Here a stand-in that does what its functions say."""
    if len(ranks) == 2:
        _check([r[case, "te_ep"] for r in ranks], case, range(2), dtype=torch.float32, rtol=1e-5, atol=1e-5)


def test_in_fp8_experts_read_rounded_tokens_and_nothing_else_is_rounded(ranks):
    def sent(x):
        return fp8_rows.decode(fp8_rows.encode(x), H)

    for name in ("FP8", "FP8, capacity", "nodes, FP8"):
        if name in ranks[0]:
            found = [r[name] for r in ranks]
            _check(found, "even", range(len(ranks)), dtype=torch.float32, rtol=1e-5, atol=1e-5, sent=sent)


def test_bytes_on_the_wire_are_those_of_the_cost_model(ranks):
    for found in ranks:
        for what in [name for name in found if str(name).startswith("bytes")]:
            sent, formula = found[what]
            assert sent == formula > 0, what
        assert found["bytes in FP8"][0] < found["bytes"][0]


def test_a_rank_that_does_not_come_is_an_error_that_names_layer_rank_and_counts(ranks):
    if len(ranks) == 2:
        first, second = ranks[0]["hangs"]
        assert first.startswith(
            "dispatch of model.layers.7 did not end on rank 0 of 2, which has 6 tokens and has not received"
        )
        assert second.startswith(
            "combine of model.layers.7 did not end on rank 0 of 2, which has 6 tokens and sends/receives: rank 0 "
        )
        assert ranks[1]["hangs"] == []


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_is_eager(ranks, case):
    if len(ranks) == 2:
        for found in ranks:
            for a, b in zip(found[case, "compiled"], found[case, "trained"]):
                assert torch.equal(a, b)


def test_in_bf16_with_fp32_weights(ranks):
    """Each result and each gradient is about as near to float64's as those of one process in bfloat16 are."""

    def joined(per_rank, parameters):
        return [torch.cat(kind).double() for kind in zip(*per_rank)] + [p.double() for p in parameters]

    given = "uneven, a rank without tokens", range(len(ranks)), torch.bfloat16
    assert [t.dtype for t in ranks[0]["bf16"][:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    ours = joined([r["bf16"][:3] for r in ranks], [torch.cat(part) for part in zip(*(r["bf16"][3:] for r in ranks))])
    exact = joined(*_one_process(*given, computed=torch.float64))
    for found, theirs, right in zip(ours, joined(*_one_process(*given)), exact):
        assert (found - right).norm() <= 1.5 * (theirs - right).norm() <= 2**-4 * right.norm()


def test_grad_scale_makes_experts_gradients_the_average_over_the_ranks(ranks):
    _check([r["grad_scale"] for r in ranks], "uneven, a rank without tokens", range(len(ranks)), scale=1 / len(ranks))


def test_groups_of_two_among_all_ranks(ranks):
    """Each pair of neighbours holds all the experts, and sees its own tokens only."""
    for first in range(0, len(ranks), 2):
        members = range(first, first + 2)
        _check([ranks[r]["pairs"] for r in members], "uneven, a rank without tokens", members)
