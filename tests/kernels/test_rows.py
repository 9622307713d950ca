"""The kernels that permute token rows against the plain operations of the same name, and whole exchanges."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton", reason="Triton is not installed")

from moefx import transports
from moefx.kernels import rows as kernels
from moefx.ops import dispatch_combine
from moefx.transports import permute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: tokens, experts, K, ranks
SIZES = [(1, 8, 2, 2), (37, 16, 4, 4), (140, 12, 3, 3), (5, 8, 8, 8), (0, 8, 2, 2)]


@pytest.fixture
def both(monkeypatch):
    """Calls a function of moefx.transports.permute by its plain operations and by its kernels."""

    def call(name, *args, **options):
        found = []
        for module in (None, kernels):
            monkeypatch.setattr(permute, "_fused", lambda x, module=module: module)
            found.append(getattr(permute, name)(*args, **options))
        return found

    return call


def choose(tokens, experts, k, seed=0, missing=True):
    """index [T, K] int64; some (token, k) are -1."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    if missing:
        index[torch.rand(tokens, k, generator=g) < 0.2] = -1
    return index.to(DEVICE)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize(("tokens", "experts", "k", "ep"), SIZES)
def test_maps(both, tokens, experts, k, ep):
    index = choose(tokens, experts, k)
    (sizes, maps), (found_sizes, found_maps) = both("build_send_map", index, ep, experts // ep)
    assert torch.equal(sizes[0], found_sizes[0]) and torch.equal(maps, found_maps)
    strided = torch.empty(tokens, k + 3, dtype=torch.int32, device=DEVICE)[:, :k].copy_(index)
    for first, local in ((0, experts), (experts // ep, experts // ep)):
        for a, b in zip(*both("sort_by_expert", strided, first, local)):
            assert torch.equal(a, b)


def test_the_same_expert_twice_has_two_rows_and_is_sent_once(both):
    index = torch.tensor([[3, 3], [0, 3]], device=DEVICE)
    for _, maps in both("build_send_map", index, 2, 2):
        assert maps.tolist() == [[[1, 1], [0, 2]], [[1, -1], [0, 2]]]
    for counts, row_id_map in both("sort_by_expert", index.int(), 2, 2):
        assert counts.tolist() == [0, 3] and row_id_map.tolist() == [[0, 1], [-1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "k", "ep"), SIZES)
def test_moves(both, tokens, experts, k, ep, dtype):
    index, weights = choose(tokens, experts, k), random(tokens, k).abs()
    x = random(tokens, 24, seed=1, dtype=dtype)
    counts, row_id_map = permute.sort_by_expert(index.int(), 0, experts)
    many = int(counts.sum())
    (a, b), (c, d) = both("permute", random(tokens, 40, dtype=dtype)[:, 8:32], row_id_map, many, weights)
    assert torch.equal(a, c) and torch.equal(b, d)
    each, scores = random(many, 24, seed=2, dtype=dtype), random(many, seed=3)
    # Triton's interpreter cuts where a GPU rounds: a bfloat16 ulp
    close = {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*both("unpermute", each, row_id_map), **close)
    for permuted, values in both("permute", x, row_id_map, many + 1, weights):  # one row that the map does not name
        assert permuted.shape[0] == values.shape[0] == many + 1
        assert torch.equal(permuted[:many], both("permute", x, row_id_map, many)[0][0])
    # what is returned: sums and gathered values in one row
    for values in (scores, random(many, k, seed=5)):
        made = []
        for module in (None, kernels):
            permute._fused = lambda x, module=module: module  # `both` puts it back
            whole = transports.empty_rows(x, tokens, (24, dtype), (k, torch.float32))
            out, gathered = transports.unpack(whole, (24, dtype), (k, torch.float32))
            permute.unpermute(each, row_id_map, out=out, gather=permute.Gather(values, row_id_map, gathered))
            made.append((out, gathered))
        torch.testing.assert_close(*(m[0] for m in made), **close)
        assert torch.equal(made[0][1], made[1][1])
    # what is sent
    _, maps = permute.build_send_map(index, ep, experts // ep)
    sent, made = int((maps[1] >= 0).sum()), []
    for module in (None, kernels):
        permute._fused = lambda x, module=module: module
        parts = (24, dtype), (k, torch.float32), (k, torch.int32)
        made.append(permute.PackedRows(*transports.unpack(transports.empty_rows(x, sent, *parts), *parts)))
        permute.pack(x, index, weights.to(dtype), maps[1], experts // ep, made[-1])
    for a, b in zip(*made):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capacity", [0, 40])
def test_whole_exchanges_and_how_many_kernels_they_launch(monkeypatch, capacity):
    """One rank of 4, what it sends comes back: values and gradients of both forms; every launch on the way is counted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    launched, results = [], []
    for name in ("build_row_id_map", "permute", "pack", "unpermute"):
        plain, many = getattr(kernels, name), 3 if name == "build_row_id_map" else 1

        def counted(*args, plain=plain, many=many, **options):
            launched.append(many)
            return plain(*args, **options)

        monkeypatch.setattr(kernels, name, counted)
    try:
        for module in (None, kernels):
            monkeypatch.setattr(permute, "_fused", lambda x, module=module: module)
            x, weights = random(33, 24).requires_grad_(), random(33, 3, seed=1).abs().requires_grad_()
            index, group = choose(33, 8, 3, missing=False), dist.group.WORLD.group_name
            send = dispatch_combine.dispatch_with("loop_back")
            each, scores, counts, *route, _ = send(x, index, weights, num_experts=8, group=group, capacity=capacity)
            y = dispatch_combine.combine(each * scores.unsqueeze(1), index, *route, num_experts=8, group=group)
            forward = sum(launched)
            y.backward(random(33, 24, seed=2))
            results.append((counts, y.detach(), x.grad, weights.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (forward, sum(launched) - forward) == (10, 4)
    finally:
        dist.destroy_process_group()
