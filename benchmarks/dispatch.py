"""Dispatch and combine alone: time, bytes and effective bandwidth of each transport, on 1 to 8 GPUs (one rank each).

    torchrun --nproc-per-node 2 benchmarks/dispatch.py            # as many ranks as GPUs
    torchrun --nproc-per-node 2 benchmarks/dispatch.py --cpu      # gloo, small: tries the script
    python benchmarks/dispatch.py --host                          # one process: what the host does for an exchange

Bandwidth is the bytes of token rows that a rank sends to *other* ranks (counted from the routing, not measured), over the
time of the operation on the device: packing, sorting and summing included. The device is kept busy until the host has launched
what it can launch ahead, as it does in a training step; where an exchange waits for counts, that wait is in its time. The line "NCCL alone" is one
all-to-all of as many bytes, with nothing around it. Ranks that share a GPU can be checked, not timed: this says so.

``--host`` plays one rank of eight whose rows come back to it, and counts what is launched for one exchange: operations of torch
that do work, and kernels of moefx. On a CUDA device these run and the microseconds are the host's, up to its return. On a CPU
the kernels are replaced by stand-ins that launch nothing, so that the count is that of a GPU; the microseconds are then those
of the Python around them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from common import machine, save, say, show, slug, synchronize, time_once, verdict
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moefx import transports
from moefx.backends import deepep
from moefx.backends.experimental import deepep_elastic, te_ep
from moefx.ops import dispatch_combine
from moefx.transports import permute

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
#: Clock cycles for which the device is kept busy before a measurement: about 3 ms.
AHEAD = 5_000_000


def device_ms(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds between the first and the last of ``step``'s work on the device's own timeline."""
    if device.type != "cuda":
        return time_once(step, device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def timed(step: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """Median milliseconds over STEPS of the slowest rank."""
    found = []
    for i in range(STEPS + 3):
        before()
        dist.barrier()
        synchronize(device)
        taken = device_ms(step, device)
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


def measure(
    shape: str, transport: str, capacity: bool, device: torch.device, sizes: tuple[int, int, int, int]
) -> dict[str, Any]:
    tokens, h, experts, k = sizes
    rank, ep = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD.group_name
    g = torch.Generator(device).manual_seed(rank)
    x = torch.randn(tokens, h, device=device, generator=g).bfloat16().requires_grad_()
    weights, index = torch.rand(tokens, experts, device=device, generator=g).topk(k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    where = {"num_experts": experts, "group": group, "capacity": tokens if capacity else 0}
    send = dispatch_combine.dispatch_with("" if transport.startswith("all") else transport)
    made: dict[str, Any] = {}

    def forward_dispatch() -> None:
        made["d"] = send(x, index, weights, **where)

    def forward_combine() -> None:
        each, _, _, *route, _ = made["d"]
        made["y"] = dispatch_combine.combine(each, index, *route, num_experts=experts, group=group)

    def both() -> None:
        forward_dispatch()
        forward_combine()
        made["grads"] = grad, torch.ones_like(made["d"][1])  # what experts give to the weights is one number a row

    def backward() -> None:
        torch.autograd.grad((made["y"], made["d"][1]), (x, weights), made["grads"])

    grad = torch.randn(tokens, h, device=device, generator=g).bfloat16()
    # the experts only weight their rows: the sums are known
    each, permuted_probs, _, *route, _ = send(x, index, weights, **where)
    made["y"] = dispatch_combine.combine(
        (each * permuted_probs.unsqueeze(1)).to(each.dtype), index, *route, num_experts=experts, group=group
    )
    to_x, to_weights = torch.autograd.grad(made["y"], (x, weights), grad)
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
        "backward": timed(backward, device, both),
    }
    sent = torch.tensor(float(pairs(index, experts, ep, rank) * h * 2), device=device)
    dist.all_reduce(sent)
    mean = float(sent) / ep
    return {
        "shape": shape,
        "transport": transport + (", no host sync" if capacity else ""),
        "ms": times,
        "bytes": mean,
        "gb_per_s": {n: mean * (2 if n == "backward" else 1) / t / 1e6 for n, t in times.items()},
        "problems": problems,
    }


def floor(bytes_sent: float, device: torch.device) -> float:
    """Milliseconds of one plain all-to-all of as many bytes to the other ranks."""
    ep = dist.get_world_size()
    each = int(bytes_sent / max(ep - 1, 1)) // 16 * 16
    given = torch.zeros(ep, max(each, 16), dtype=torch.uint8, device=device)
    out = torch.empty_like(given)
    return timed(lambda: dist.all_to_all_single(out, given), device)


# --- the host's part -------------------------------------------------------------------------------------------------

_KERNELS = {"build_row_id_map": 3, "permute": 1, "pack": 1, "unpermute": 1}  #: function -> launches
_FREE = {
    "view", "slice", "select", "as_strided", "reshape", "expand", "t", "transpose", "unsqueeze", "detach", "alias", "unbind",
    "empty", "empty_strided", "empty_like", "new_empty", "item", "_local_scalar_dense", "narrow", "resolve_conj", "resolve_neg",
    "is_pinned", "split", "to", "_to_copy",
}  # fmt: skip


@contextlib.contextmanager
def counting(device: torch.device) -> Iterator[list[int]]:
    """Within: moefx's kernels add their launches to the list. On a CPU they do nothing, but for the sizes that they tell."""
    from moefx.kernels import rows as kernels  # needs Triton

    launched, plain = [0], {name: getattr(kernels, name) for name in _KERNELS}
    fused = permute._fused

    def stand_in(name: str) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            launched[0] += _KERNELS[name]
            if device.type == "cuda":
                return plain[name](*args, **options)
            if name == "build_row_id_map":
                index, _, _, buckets, totals, *_ = args
                totals.fill_(index.numel() // buckets)
            return None

        return call

    try:
        permute._fused = lambda x: kernels
        for name in _KERNELS:
            setattr(kernels, name, stand_in(name))
        yield launched
    finally:
        permute._fused = fused
        for name, function in plain.items():
            setattr(kernels, name, function)


def operations(step: Callable[[], Any]) -> int:
    """How many operations of torch do work in ``step``: those that call no other such operation, and are no views."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = 0

    def walk(event: Any) -> None:
        nonlocal found
        name = event.name.removeprefix("aten::")
        inner = [e for e in event.cpu_children if e.name.startswith("aten::") and e.name.removeprefix("aten::") not in _FREE]
        if event.name.startswith("aten::") and not inner:
            found += name not in _FREE
        else:
            for child in event.cpu_children:
                walk(child)

    for event in profile.events():
        if event.cpu_parent is None:
            walk(event)
    return found


def host(device: torch.device, sizes: tuple[int, int, int, int], ep: int = 8, steps: int = 60) -> dict[str, dict[str, float]]:
    """stage -> launches of torch's operations and of moefx's kernels, and microseconds until the host may go on."""
    tokens, h, experts, k = sizes
    torch.set_num_threads(1)  # others would be woken for a copy of a few rows
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep)
    where = {"num_experts": experts, "group": dist.group.WORLD.group_name}
    x = torch.randn(tokens, h, device=device).bfloat16().requires_grad_()
    weights, index = torch.rand(tokens, experts, device=device).topk(k, dim=1)
    weights, grad, send = weights.requires_grad_(), torch.randn_like(x), dispatch_combine.dispatch_with("loop_back")

    def combine(sent: tuple) -> Tensor:
        return dispatch_combine.combine(sent[0], index, *sent[3:7], **where)

    def both() -> tuple[tuple, tuple]:
        sent = send(x, index, weights, **where)
        return (combine(sent), sent[1]), (grad, torch.ones_like(sent[1]))

    stages: dict[str, tuple[Callable, Callable]] = {
        "dispatch": (lambda: None, lambda _: send(x, index, weights, **where)),
        "combine": (lambda: send(x, index, weights, **where), combine),
        "backward": (both, lambda made: torch.autograd.grad(made[0], (x, weights), made[1])),
    }
    found = {}
    with counting(device) as launched:
        for stage, (before, step) in stages.items():
            taken = []
            for i in range(steps):
                given = before()
                synchronize(device)
                started = time.perf_counter()
                step(given)
                if i >= steps // 6:
                    taken.append(time.perf_counter() - started)
            given = before()
            launched[0] = 0
            many = operations(lambda step=step, given=given: step(given))
            found[stage] = {
                "operations": many,
                "kernels": launched[0],
                "us": statistics.median(taken) * 1e6,
                "least_us": min(taken) * 1e6,
            }
    dist.destroy_process_group()
    return found


def show_host(device: torch.device, sizes: tuple[int, int, int, int]) -> None:
    found = host(device, sizes)
    rows_ = [[n, f["operations"], f["kernels"], f"{f['us']:.0f}", f"{f['least_us']:.0f}"] for n, f in found.items()]
    note = "" if device.type == "cuda" else ", kernels replaced by stand-ins"
    show(
        f"host, one exchange of one rank of 8 on {device.type}{note}",
        ["stage", "torch operations", "kernels", "us, median", "least"],
        rows_,
    )
    save(f"dispatch-host-{device.type}", {"machine": machine(device), "sizes": sizes, "stages": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="of a rank")
    parser.add_argument("--host", action="store_true", help="count launches and the host's time, in one process")
    a = parser.parse_args()
    if a.host:
        show_host(torch.device("cuda" if torch.cuda.is_available() and not a.cpu else "cpu"), (a.tokens or 64, 64, 64, 8))
        sys.exit(0)
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
        transports.release(dist.group.WORLD.group_name)
        taken = floor(results[-1]["bytes"], device)
        results.append(
            {
                "shape": shape,
                "transport": "NCCL alone",
                "ms": {"dispatch": taken},
                "bytes": results[-1]["bytes"],
                "gb_per_s": {"dispatch": results[-1]["bytes"] / taken / 1e6},
            }
        )
    code = 0
    bad = torch.tensor(len(problems), device=device)
    dist.all_reduce(bad)
    if dist.get_rank() == 0:
        name = "cpu" if a.cpu else torch.cuda.get_device_name()
        link = next((v for n, v in NVLINK.items() if n in name), None)
        lines = []
        for r in results:
            share = f"{r['gb_per_s']['dispatch'] / link:.0%}" if link and not shared and ranks > 1 else "-"
            cells = [
                f"{r['ms'][n]:.3f} ({r['gb_per_s'][n]:.0f})" if n in r["ms"] else ""
                for n in ("dispatch", "combine", "backward")
            ]
            lines.append([r["shape"], r["transport"], f"{r['bytes'] / 1e6:.1f}", *cells, share])
        note = "; ranks share a GPU: these times say nothing" if shared else f"; NVLink sends {link or '?'} GB/s"
        show(
            f"{ranks} ranks, {name}{note}",
            ["shape", "transport", "MB sent", "dispatch ms (GB/s)", "combine", "backward", "of NVLink"],
            lines,
        )
        record = {
            "machine": machine(device),
            "ranks": ranks,
            "ranks_share_a_gpu": shared,
            "nvlink_gb_per_s": link,
            "results": results,
        }
        save(f"dispatch-{slug(name)}-x{ranks}" + ("-shared" if shared and not a.cpu else ""), record)
        code = verdict(problems if problems else (["another rank found a wrong result"] if int(bad) else []))
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(code or int(bool(problems)))
