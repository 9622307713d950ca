"""What one rank really does while rows are under way: a profiler trace of one training step, its lanes as SVG, and a number.

    torchrun --nproc-per-node 2 benchmarks/overlap_trace.py --chunks 2           # NCCL; --backends deepep triton torch for DeepEP
    torchrun --nproc-per-node 2 benchmarks/overlap_trace.py --chunks 2 --cpu     # gloo: tries the script

Writes build/benchmarks/overlap-<device>-<transport>-<n>-chunks.svg and ....trace.json.gz (chrome://tracing opens it). The
number is the share of the time of communication during which this rank computes. On CUDA: kernels of NCCL or DeepEP, against all
others, on any stream; a kernel that waits for another rank counts as communication. On a CPU: gloo's transfers from start to end,
against operations that run meanwhile; the operation that waits for the rows does not count, nor does Python between operations.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import DETAILED, machine, save, say, slug, synchronize

import moefx

Interval = tuple[float, float]

#: In the names of what moves rows.
_MOVES = ("nccl", "gloo:", "deep_ep", "intranode::", "internode::")
#: Operations of moefx in which the host waits for rows, and those that start a move.
_WAITS = ("dispatch_wait", "combine_wait", "return_wait", "redispatch_wait", "dispatch_start")
_COLORS = {"communication": "#4477aa", "waiting": "#ee6677", "experts": "#228833", "rows": "#ccbb44", "other": "#bbbbbb"}


@dataclass(frozen=True)
class Span:
    name: str
    kind: str  #: of _COLORS
    start: float  #: microseconds
    end: float


def kind_of(name: str) -> str:
    low = name.lower()
    if any(m in low for m in _MOVES):
        return "communication"
    if any(w in low for w in _WAITS):
        return "waiting"
    if any(w in low for w in ("grouped_mlp", "grouped_gemm", "cutlass", "gemm")):
        return "experts"
    return "rows" if any(w in low for w in ("_pack", "_spread", "_sum", "_place", "combine", "dispatch")) else "other"


def lanes(trace: dict[str, Any]) -> dict[str, list[Span]]:
    """Lane -> its spans in order, of a chrome trace: streams where a device ran kernels, else threads and what travels."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur", 0) > 0]
    found: dict[str, list[Span]] = {}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for e in kernels or [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]:
        kind = kind_of(e["name"])
        if kernels:
            lane, kind = f"stream {e['args']['stream']}", "other" if kind == "waiting" else kind
        else:
            lane = "under way" if kind == "communication" else f"thread {e['tid']}"
        found.setdefault(lane, []).append(Span(e["name"], kind, e["ts"], e["ts"] + e["dur"]))
    nested = [lane for lane in found if lane.startswith("thread")]
    return {lane: _outermost(spans) if lane in nested else spans for lane, spans in sorted(found.items())}


def _outermost(spans: list[Span]) -> list[Span]:
    """Without what other spans of the lane contain."""
    kept: list[Span] = []
    for s in sorted(spans, key=lambda s: (s.start, -s.end)):
        if not kept or s.start >= kept[-1].end:
            kept.append(s)
    return kept


def union(spans: Sequence[Span]) -> list[Interval]:
    joined: list[list[float]] = []
    for s in sorted(spans, key=lambda s: s.start):
        if joined and s.start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], s.end)
        else:
            joined.append([s.start, s.end])
    return [(a, b) for a, b in joined]


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """How long both are on."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def hidden(found: dict[str, list[Span]]) -> tuple[float, float]:
    """Microseconds of communication, and of those the ones that something computes in."""
    every = [s for spans in found.values() for s in spans]
    moving = union([s for s in every if s.kind == "communication"])
    computing = union([s for s in every if s.kind not in ("communication", "waiting")])
    return sum(b - a for a, b in moving), overlap(moving, computing)


def svg(found: dict[str, list[Span]], title: str) -> str:
    """A row for each lane, time from left to right; hover for names."""
    begin = min(s.start for spans in found.values() for s in spans)
    length = max(s.end for spans in found.values() for s in spans) - begin
    width, left, row = 1400, 130, 34
    height = 60 + row * len(found) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    out.append(f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="15">{escape(title)}</text>')
    for i, (kind, color) in enumerate(_COLORS.items()):
        out.append(
            f'<rect x="{left + 130 * i}" y="32" width="12" height="12" fill="{color}"/><text x="{left + 17 + 130 * i}" y="42">{kind}</text>'
        )
    for i, (lane, spans) in enumerate(found.items()):
        y = 56 + row * i
        out.append(f'<text x="10" y="{y + 17}">{escape(lane)}</text>')
        for s in spans:
            x, w = left + (s.start - begin) / length * width, max((s.end - s.start) / length * width, 0.4)
            out.append(
                f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row - 10}" fill="{_COLORS[s.kind]}"><title>{escape(s.name)}: '
                f"{s.end - s.start:.0f} us</title></rect>"
            )
    for i in range(11):
        x = left + i * width / 10
        out.append(f'<text x="{x:.0f}" y="{height - 10}" text-anchor="middle">{length * i / 10 / 1e3:.2f} ms</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def build(family: str, cpu: bool) -> torch.nn.Module:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.gpu.dispatch_ranks import MODELS
    from tests.support import families

    return families.build(family, **({} if cpu else MODELS[family])).bfloat16()


def record(step: Any, device: torch.device) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder, "trace.json")))
        trace = json.loads(Path(folder, "trace.json").read_text())
    return {k: v for k, v in trace.items() if k != "traceName"}  # a folder of this machine


def exchange_of(model: Any) -> str:
    """What moved the rows: "deepep", or "nccl" (on a CPU "gloo") where torch's collectives did."""
    by = {backend for op, backend in moefx.report(model).kernels() if op == "dispatch"}
    return "deepep" if "deepep" in by else dist.get_backend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--family", default="deepseek_v3", help="one with a shared expert shows both kinds of overlap")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="of a rank (4096; on a CPU 256)")
    parser.add_argument("--backends", nargs="*")
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    device = torch.device("cpu")
    if not a.cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if a.cpu else "nccl", timeout=timedelta(seconds=100))
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.device(device):
        model = build(a.family, a.cpu)
    pipeline = moefx.passes.default().replace("overlap", moefx.passes.Overlap(chunks=a.chunks))
    moefx.optimize(model, ep_size=world, pipeline=pipeline, backends=a.backends, compile=a.compile)
    ids = torch.randint(0, 256, (1, a.tokens or (256 if a.cpu else 4096)), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for p in model.parameters():
            p.grad = None

    for _ in range(3):
        step()
    dist.barrier()
    if rank == 0:
        trace = record(step, device)
        found = lanes(trace)
        moving, under = hidden(found)
        by = exchange_of(model)
        name = f"overlap-{slug('cpu' if a.cpu else torch.cuda.get_device_name())}-{by}-{a.chunks}-chunks"
        title = (
            f"{a.family}, rank 0 of {world}, {by}, {a.chunks} chunks of {ids.shape[1]} tokens, forward and backward: {moving / 1e3:.2f} ms of "
            f"communication, {under / moving if moving else 0:.0%} of it hidden under compute"
        )
        save(
            name,
            {
                "machine": machine(device),
                "family": a.family,
                "ranks": world,
                "transport": by,
                "chunks": a.chunks,
                "tokens": ids.shape[1],
                "ranks_share_a_gpu": not a.cpu and world > torch.cuda.device_count(),
                "communication_us": moving,
                "hidden_us": under,
            },
        )
        (DETAILED / f"{name}.svg").write_text(svg(found, title))
        with gzip.open(DETAILED / f"{name}.trace.json.gz", "wt") as file:
            json.dump(trace, file)
        say(title)
        if not moving:
            say("FAILED: nothing of communication is in the trace")
    else:
        step()
        moving = 1.0
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if moving else 1)
