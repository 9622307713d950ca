"""Dispatch and combine alone: time, bytes and effective bandwidth of each transport, on 1 to 8 GPUs (one rank each).

    torchrun --nproc-per-node 2 benchmarks/dispatch.py            # as many ranks as GPUs
    torchrun --nproc-per-node 2 benchmarks/dispatch.py --cpu      # gloo, small: tries the script

Bandwidth is the bytes of token rows that a rank sends to *other* ranks (counted from the routing, not measured), over the
time of the operation: packing, sorting and summing included. That is what a training step sees. The line "NCCL alone" is one
all-to-all of as many bytes, with nothing around it. Ranks that share a GPU can be checked, not timed: this says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from common import machine, save, say, show, slug, synchronize, time_once, verdict
from torch import Tensor

from moefx import exchange
from moefx.backends import deepep, deepep_elastic, te_ep

#: Tokens a rank, H, experts, K.
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "qwen3-30b": (4096, 2048, 128, 8),
    "deepseek-v3": (4096, 7168, 256, 8),
    "gpt-oss-20b": (4096, 2880, 32, 4),
    "nemotron-3-nano": (4096, 2688, 128, 6),
}
#: GB/s that a GPU sends over NVLink (one direction), by the name of the device.
NVLINK = {"H100": 450, "H200": 450, "H800": 200, "H20": 450, "B200": 900, "A100": 300}
STEPS = 20


def timed(step: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """Median milliseconds over STEPS of the slowest rank."""
    found = []
    for i in range(STEPS + 3):
        before()
        dist.barrier()
        synchronize(device)
        taken = time_once(step, device)
        if i >= 3:
            found.append(taken)
    worst = torch.tensor(found, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return statistics.median(worst.tolist())


def pairs(index: Tensor, experts: int, ep: int, rank: int) -> int:
    """How many (token, other rank) there are to send."""
    at = index // (experts // ep)
    wanted = torch.zeros(index.shape[0], ep, dtype=torch.bool, device=index.device).scatter_(1, at, True)
    wanted[:, rank] = False
    return int(wanted.sum())


def measure(shape: str, transport: str, capacity: bool, device: torch.device, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    tokens, h, experts, k = sizes
    rank, ep = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD.group_name
    g = torch.Generator(device).manual_seed(rank)
    x = torch.randn(tokens, h, device=device, generator=g).bfloat16().requires_grad_()
    weights, index = torch.rand(tokens, experts, device=device, generator=g).topk(k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    where = {"num_experts": experts, "group": group, "capacity": tokens if capacity else 0}
    send = exchange.dispatch_by("" if transport.startswith("all") else transport)
    made: dict[str, Any] = {}

    def forward_dispatch() -> None:
        made["d"] = send(x, index, weights, **where)

    def forward_combine() -> None:
        rows, row_weights, _, *way = made["d"]
        made["y"] = exchange.combine(rows, row_weights, index, *way, num_experts=experts, group=group)

    def both() -> None:
        forward_dispatch()
        forward_combine()

    grad = torch.randn(tokens, h, device=device, generator=g).bfloat16()
    both()
    to_x, to_weights = torch.autograd.grad(made["y"], (x, weights), grad)
    # the experts are the identity: the sums are known
    right = x.float() * weights.sum(1, keepdim=True)
    problems = []
    for what, found, wanted in (
        ("the result", made["y"], right),
        ("x's gradient", to_x, grad.float() * weights.sum(1, keepdim=True)),
        ("the weights' gradient", to_weights, (grad.float() * x.float()).sum(1, keepdim=True).expand(-1, k)),
    ):
        apart = float((found.float() - wanted).norm() / wanted.norm())
        if not apart <= 2 * 2**-8:
            problems.append(f"{shape}, {transport}, rank {rank}: {what} is {apart:.1e} from what it should be")
    times = {
        "dispatch": timed(forward_dispatch, device),
        "combine": timed(forward_combine, device, forward_dispatch),
        "backward": timed(lambda: torch.autograd.grad(made["y"], (x, weights), grad), device, both),
    }
    sent = torch.tensor(float(pairs(index, experts, ep, rank) * h * 2), device=device)
    dist.all_reduce(sent)
    mean = float(sent) / ep
    return {
        "shape": shape, "transport": transport + (", no host sync" if capacity else ""), "ms": times, "bytes": mean,
        "gb_per_s": {n: mean * (2 if n == "backward" else 1) / t / 1e6 for n, t in times.items()}, "problems": problems,
    }  # fmt: skip


def floor(bytes_sent: float, device: torch.device) -> float:
    """Milliseconds of one plain all-to-all of as many bytes to the other ranks."""
    ep = dist.get_world_size()
    each = int(bytes_sent / max(ep - 1, 1)) // 16 * 16
    rows = torch.zeros(ep, max(each, 16), dtype=torch.uint8, device=device)
    out = torch.empty_like(rows)
    return timed(lambda: dist.all_to_all_single(out, rows), device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="of a rank")
    a = parser.parse_args()
    ranks = int(os.environ["WORLD_SIZE"])
    if a.cpu:
        device, shared = torch.device("cpu"), True
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        device, shared = torch.device("cuda", torch.cuda.current_device()), ranks > torch.cuda.device_count()
    dist.init_process_group("gloo" if a.cpu else "nccl", timeout=timedelta(seconds=100))
    movers = [("all_to_all", False), ("all_gather", True)]
    why = deepep.available() or (None if ranks == 1 else deepep.refuses_group(dist.group.WORLD.group_name))
    if why is None and ranks > 1:
        movers += [("deepep", False), ("deepep", True)]
    elif dist.get_rank() == 0:
        say(f"without DeepEP: {why or 'it wants 2 ranks or more'}")
    if ranks > 1 and deepep_elastic.available() is None:
        movers.append(("deepep_elastic", True))
    if ranks > 1 and te_ep.available() is None:
        movers.append(("te_ep", True))
    results, problems = [], []
    for shape in a.shapes:
        sizes = SHAPES[shape]
        if a.cpu:
            sizes = (64, 64, 16, 4)
        sizes = (a.tokens or sizes[0], *sizes[1:])
        for transport, capacity in movers:
            results.append(measure(shape, transport, capacity, device, sizes))
            problems += results[-1].pop("problems")
            if dist.get_rank() == 0:
                say(f"{shape} {results[-1]['transport']}: {results[-1]['ms']}")
        exchange.release(dist.group.WORLD.group_name)
        taken = floor(results[-1]["bytes"], device)
        results.append({"shape": shape, "transport": "NCCL alone", "ms": {"dispatch": taken}, "bytes": results[-1]["bytes"],
                        "gb_per_s": {"dispatch": results[-1]["bytes"] / taken / 1e6}})  # fmt: skip
    code = 0
    bad = torch.tensor(len(problems), device=device)
    dist.all_reduce(bad)
    if dist.get_rank() == 0:
        name = "cpu" if a.cpu else torch.cuda.get_device_name()
        link = next((v for n, v in NVLINK.items() if n in name), None)
        rows = []
        for r in results:
            share = f"{r['gb_per_s']['dispatch'] / link:.0%}" if link and not shared and ranks > 1 else "-"
            cells = [f"{r['ms'][n]:.3f} ({r['gb_per_s'][n]:.0f})" if n in r["ms"] else "" for n in ("dispatch", "combine", "backward")]
            rows.append([r["shape"], r["transport"], f"{r['bytes'] / 1e6:.1f}", *cells, share])
        note = "; ranks share a GPU: these times say nothing" if shared else f"; NVLink sends {link or '?'} GB/s"
        show(f"{ranks} ranks, {name}{note}", ["shape", "transport", "MB sent", "dispatch ms (GB/s)", "combine", "backward", "of NVLink"], rows)
        record = {"machine": machine(device), "ranks": ranks, "ranks_share_a_gpu": shared, "nvlink_gb_per_s": link, "results": results}
        save(f"dispatch-{slug(name)}-x{ranks}" + ("-shared" if shared and not a.cpu else ""), record)
        code = verdict(problems if problems else (["another rank found a wrong result"] if int(bad) else []))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(code or int(bool(problems)))
