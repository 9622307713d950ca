"""What a rank of ``multi_gpu.py`` holds: counted, not run. One CPU process, no GPU, no weights.

    python benchmarks/footprint.py --model qwen3_30b --gpus 8            # at full depth
    python benchmarks/footprint.py --model nemotron_nano --gpus 4 --gib 141

Exact: weights and gradients, from the shapes of this rank's shards in a process group that is only pretended. Exact: what FSDP2
gathers besides (two units of blocks and the gradients of one; embedding and head, which stay). Estimated: activations, from the tensors
that autograd keeps in a real forward of few layers and few tokens on the CPU, which grow with both; of few experts, whose number
changes a router's logits only. On a GPU other kernels keep other tensors (moefx's keep fewer); allocator and communicators come on
top. Mamba's scan on the CPU keeps what its kernels do not: for such models there are no activations here. For Transformers' own
expert parallelism they are those without it: what its exchange keeps besides is not counted.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import common
import models
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import set_verbosity_error

import moefx
from moefx.distributed import fsdp_sharding
from moefx.distributed.layout import make_layout, make_meshes
from moefx.integrations import fsdp as sharded
from moefx.integrations import transformers as hf

WHO = ("hf_fsdp", "hf_ep", "moefx")


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Within: this process is rank 0 of ``ranks`` that do not exist; nothing may be computed over them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(who: str, name: str, layers: int, ranks: int, dtype: torch.dtype) -> Any:
    """The contender's model on meta, sharded across ``ranks`` ranks as it shards it."""
    model: Any = models.build(name, layers, dtype, "meta").train()
    if who == "moefx":
        layout = make_layout(ranks, 1)
        return fsdp_sharding.shard(model, layout, make_meshes(layout))
    config, _, meshes = model.prepare_distribute_model(
        DistributedConfig(fsdp_size=ranks, ep_size=ranks if who == "hf_ep" else 1)
    )
    return model.maybe_distribute_model(model, config, meshes)


def local_bytes(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def states(who: str, name: str, layers: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes of a rank: "weights" and "gradients" are its shards; "gathered" the most that FSDP2 holds besides."""
    with pretended(ranks):
        model = spread(who, name, layers, ranks, dtype)
        shards = local_bytes(model.parameters())
        blocks = hf.blocks(model)
        of_blocks = {id(p) for b in blocks.values() for p in b.parameters()}
        most = max(_of_units(model, list(blocks.values())))
        root = sum(_gathered(p) for p in model.parameters() if id(p) not in of_blocks)
    # two units, one of them prefetched, and the gradients of one; the root's, which stay, and their gradients
    return {"weights": shards, "gradients": shards, "gathered": 3 * most + 2 * root}


def _of_units(model: Any, blocks: list[Any]) -> list[int]:
    """Bytes of each unit of blocks, and of the units within, when FSDP2 has gathered it over the ranks of its mesh: what is cut
    over "ep" stays cut, and parameters that no unit has (experts that no other rank has) are where they were.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    managed = {id(p.sharded_param) for m in units for group in sharded.groups(m) for p in group.fsdp_params}
    sizes: Counter[int] = Counter()
    for block in blocks:
        sizes[id(block._get_fsdp_state())] += sum(_gathered(p) for p in block.parameters() if id(p) in managed)
    return list(sizes.values())


def _gathered(p: Any) -> int:
    """Bytes of a parameter when FSDP2 has gathered it."""
    if not isinstance(p, DTensor):
        return p.nbytes
    mesh = p.device_mesh
    fsdp = [
        n for n, name, place in zip(mesh.shape, mesh.mesh_dim_names or (), p.placements) if name != "ep" and place.is_shard()
    ]
    return p.to_local().nbytes * math.prod(fsdp)


def kept(model: Any, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps for the backward of a forward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in map(_plain, model.parameters())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = _plain(t).untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch, use_cache=False).loss
    del loss
    return sum(seen.values())


def _plain(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def activations(who: str, name: str, depth: int, ranks: int, probe: int) -> tuple[float, float]:
    """Bytes kept whatever the tokens (a loss that makes the head's gradient in the forward), and bytes for each token, by
    ``depth`` layers that are alike, embedding, head and loss. ``probe`` tokens and twice as many are tried.
    """
    once, twice, deeper = (_kept(who, name, *sizes, ranks) for sizes in ((1, probe), (1, 2 * probe), (2, probe)))
    a_token = (twice - once) / probe
    return once - a_token * probe, a_token + (depth - 1) * (deeper - once) / probe


def _kept(who: str, name: str, layers: int, seq: int, ranks: int) -> int:
    config = models.config(name, layers)
    config.num_experts = max(2 * ranks, config.num_experts_per_tok)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    batch = models.tokens(name, 1, seq, "cpu")
    if who != "moefx":
        model.set_experts_implementation("grouped_mm")
        return kept(model, batch)
    with common.simulated_ep(ranks, "cpu") as options:
        # as Inductor cuts forward from backward, without making code
        moefx.optimize(model, compile="aot_eager_decomp_partition", balanced_routing=True, **options)
        common.fill_experts(model)
        return kept(model, batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODELS, default="qwen3_30b")
    parser.add_argument("--layers", type=int, help="(default: the published model's)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--probe", type=int, default=128, help="tokens of the step on the CPU; 0: states only")
    parser.add_argument("--gib", type=float, default=78, help="of a GPU")
    args = parser.parse_args()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="balanced_routing")
    model = models.MODELS[args.model]
    layers = args.layers or model.layers
    if "layer" not in model.whole and args.probe:
        common.say(f"{args.model}'s layers are not alike: its states only")
        args.probe = 0
    vocabulary = models.config(args.model, layers).vocab_size
    rows, problems = [], []
    for who in WHO:
        held = states(who, args.model, layers, args.gpus)
        gib = {k: v / 2**30 for k, v in held.items()}
        if args.probe:
            constant, a_token = activations(who, args.model, layers, args.gpus, args.probe)
        for mbs in args.mbs if args.probe else [0]:
            tokens = mbs * args.seq
            acts = (constant + a_token * tokens) / 2**30 if args.probe else 0.0
            # Transformers' loss: the gradients of the logits in fp32 and in bf16, while the logits are kept
            head = tokens * vocabulary * 6 / 2**30 if who != "moefx" else 0.0
            # the backward starts with all activations and no gradients, and ends the other way round
            total = gib["weights"] + gib["gathered"] + max(acts + head, gib["gradients"])
            rows.append(
                (
                    who,
                    mbs or "",
                    *(f"{gib[k]:.1f}" for k in gib),
                    f"{acts:.1f}",
                    f"{head:.1f}",
                    f"{total:.1f}",
                    "yes" if total < args.gib else "no",
                )
            )
            if who == "moefx" and mbs == args.mbs[0] and total >= args.gib:
                problems.append(f"moefx, mbs {mbs}: {total:.1f} GiB, a GPU has {args.gib:.0f}")
            common.say(f"{who}, mbs {mbs}: {total:.1f} GiB")
    common.show(
        f"ESTIMATE, GiB a rank: {args.model}, {layers} layers, {args.gpus} ranks, sequence {args.seq}, bf16",
        ("who", "mbs", "weights", "gradients", "gathered", "activations", "head", "peak", f"below {args.gib:.0f}"),
        rows,
    )
    return common.verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
