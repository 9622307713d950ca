"""A fake process group of 64 ranks: what every rank of a large job would hold and run, on the meta device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import moefx
from moefx import ops
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped
from tests.support.families import FAMILIES, build

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.fixture(scope="module", autouse=True)
def ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=64)
    yield
    dist.destroy_process_group()


#: How each family's configuration calls the number of experts.
COUNT = dict.fromkeys(("qwen3_moe", "olmoe", "gemma4_text"), "num_experts") | dict.fromkeys(
    ("mixtral", "gpt_oss", "llama4_text"), "num_local_experts"
)


def on_meta(name: str, experts: int):
    with torch.device("meta"):
        return build(name, **{COUNT.get(name, "n_routed_experts"): experts})


@pytest.mark.parametrize("name", list(FAMILIES))
def test_64_ranks(name):
    model = on_meta(name, 128)
    whole = {n: p.shape for n, p in model.named_parameters()}
    moefx.optimize(model, ep_size=64, compile=False, strict=True)
    assert {n: p.shape for n, p in model.named_parameters()} == whole
    spread = [p for n, p in model.named_parameters() if isinstance(p, DTensor)]
    assert len(spread) == sum(".experts." in n for n in whole)
    for p in spread:
        assert p.placements == (Shard(0),) and p.to_local().shape == (2, *p.shape[1:])
        assert p.device_mesh.get_local_rank() == 37
    for function in moefx.report(model).program:
        found = [n.meta.get("semantic", n.target) for n in function.graph.nodes if n.op == "call_function"]
        many = function.expects.get("experts", 0) + function.expects.get("dense_experts", 0)
        assert ops.experts not in found
        for op in (dispatch_combine.dispatch, grouped.grouped_mlp, dispatch_combine.combine):
            assert found.count(op) == many, (function.name, op)
        for node in function.graph.nodes:
            if node.meta.get("semantic", node.target) is grouped.grouped_mlp:  # it keeps what arrived, and no row
                tokens, place, host = node.kwargs["arrived"]
                start, wait = tokens.args[0], place.args[0]
                assert start.target is dispatch_combine.dispatch_start and wait.target is dispatch_combine.dispatch_wait
                assert wait.args[1] is tokens and host.args == (start, 4) and node.args[0].args == (wait, 0)
    moefx.restore(model)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("ep_size", [4, 8])
def test_replicas(ep_size):
    """Fewer experts than ranks: groups of neighbours, replicated."""
    model = moefx.optimize(on_meta("qwen3_moe", 8), ep_size=ep_size, compile=False, strict=True)
    experts = model.model.layers[0].mlp.experts.down_proj
    assert experts.to_local().shape[0] == 8 // ep_size
    assert experts.device_mesh.mesh.tolist() == list(range(37 // ep_size * ep_size, 37 // ep_size * ep_size + ep_size))


def test_own_mesh():
    mesh = init_device_mesh("cpu", (16, 4), mesh_dim_names=("dp_replicate", "ep"))
    model = moefx.optimize(on_meta("mixtral", 8), mesh=mesh, compile=False, strict=True)
    assert model.model.layers[1].mlp.experts.gate_up_proj.to_local().shape[0] == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ep_size": 128}, "ep_size=128 does not divide the 64 ranks: start a multiple of 128"),
        ({"ep_size": 3}, "ep_size=3 does not divide the 128 experts"),
    ],
)
def test_refused(options, text):
    model = on_meta("qwen3_moe", 128)
    with pytest.raises(moefx.MoefxError, match=text):
        moefx.optimize(model, compile=False, **options)
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_mesh_without_ep():
    mesh = init_device_mesh("cpu", (64,), mesh_dim_names=("dp",))
    with pytest.raises(moefx.MoefxError, match=r"mesh has the dimensions \('dp',\), none is \"ep\""):
        moefx.optimize(on_meta("qwen3_moe", 128), mesh=mesh)
