"""Where a step's time goes, kernel by kernel and kind by kind, and how near that is to what the device can do."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

KINDS = ("grouped GEMM", "dense GEMM", "attention", "mamba", "head", "glue")
#: By name, in this order: the first that is found. Names of CUDA kernels (cuBLAS calls its Hopper kernels nvjet) and of
#: the operations that launch them, which is all that a CPU has.
_NAMES = (
    (
        "mamba",
        r"chunk_(scan|state|cumsum)|bmm_chunk|state_passing|causal_conv1d|mamba|selective_sc|layer_norm_(fwd|bwd)_kernel",
    ),
    ("grouped GEMM", r"group(ed)?_?(problem|gemm|mm|linear)|moe_gemm|\bgmm\b|gmm_kernel"),
    ("attention", r"flash|fmha|sdpa|attention|attn|mha_"),
    ("dense GEMM", r"nvjet|gemm|cutlass|cublas|xmma|gemv|splitk|^aten::(mm|bmm|addmm|matmul|linear|baddbmm)_?$"),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _NAMES)


def kind(name: str, launched_by: Sequence[str] = (), shapes: Sequence[Sequence[int]] = (), vocabulary: int = 0) -> str:
    """What a kernel is for, one of :data:`KINDS`.

    Args:
        name: of the kernel (on a CPU: of the operation).
        launched_by: the operations around its launch, innermost first.
        shapes: of all their inputs. One that has the vocabulary's size makes it "head": embedding, head and loss.
        vocabulary: that size; 0 for none.
    """
    if vocabulary and any(vocabulary in shape for shape in shapes):
        return "head"
    if "cross_entropy" in name or any("cross_entropy" in n or "nll_loss" in n for n in launched_by):
        return "head"
    for found, pattern in _PATTERNS:
        # around it only the nearest: an operation that holds a whole block launches products and glue
        if pattern.search(name) or any(pattern.search(n) for n in launched_by[:1]):
            return "grouped GEMM" if found == "dense GEMM" and any("experts" in n for n in launched_by) else found
    return "glue"


def by_kind(kernels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each kind that occurs, in the order of :data:`KINDS`."""
    sums: Counter[str] = Counter()
    for k in kernels:
        sums[k["kind"]] += k["ms"]
    return {k: sums[k] for k in KINDS if k in sums}


def profile(model: nn.Module, run: Callable, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """One step, which must have run before (nothing is compiled within): its kernels, the 60 longest and the sums of kinds.

    Times are those of the kernels; where they leave the device idle, the step takes longer than their sum.
    """
    cuda = device.type == "cuda"
    common.drop_gradients(model)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as found:
        common.train_step(run, batch)
        common.synchronize(device)
    common.drop_gradients(model)
    kernels = _kernels(found.events(), cuda, model.config.get_text_config().vocab_size)
    total = sum(k["ms"] for k in kernels)
    merged: dict[tuple[str, str], list[float]] = defaultdict(list)
    for k in kernels:
        merged[k["kernel"], k["kind"]].append(k["ms"])
    rows = [
        {"kernel": name, "kind": which, "ms": sum(ms), "calls": len(ms), "share": sum(ms) / total}
        for (name, which), ms in merged.items()
    ]
    top = sorted(rows, key=lambda r: r["ms"], reverse=True)[:60]
    return {"ms": total, "launches": len(kernels), "kinds_ms": by_kind(kernels), "top": top}


def _kernels(events: Any, cuda: bool, vocabulary: int) -> list[dict[str, Any]]:
    """Every launch: name, milliseconds, kind."""
    found, left = [], Counter()  # type: ignore[var-annotated]
    if cuda:
        # all that ran on the device, less, below, what is known to be launched by an operation
        for e in events:
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False):
                left[e.name] += e.time_range.elapsed_us() / 1e3
    for e in events:
        if e.device_type != DeviceType.CPU or not (e.kernels if cuda else e.self_cpu_time_total):
            continue
        around, shapes = _around(e)
        launched = [(k.name, k.duration / 1e3) for k in e.kernels] if cuda else [(e.name, e.self_cpu_time_total / 1e3)]
        for name, ms in launched:
            found.append({"kernel": name, "ms": ms, "kind": kind(name, around, shapes, vocabulary)})
            left[name] -= ms
    found += [{"kernel": n, "ms": ms, "kind": kind(n)} for n, ms in left.items() if ms > 1e-3]
    return found


def _around(event: Any) -> tuple[list[str], list[Sequence[int]]]:
    """The names of an operation and of those around it, innermost first, and the shapes of their inputs."""
    names, shapes = [], []
    while event is not None:
        names.append(event.name)
        shapes += [s for s in event.input_shapes or () if s]
        event = event.cpu_parent
    return names, shapes


# --- what is possible ------------------------------------------------------------------------------------------------


#: Seconds of products after which a device at its power limit has found its clock.
SUSTAIN = 3.0


def peaks(device: torch.device) -> dict[str, float]:
    """What this device reaches, measured now: TFLOP/s of a large bf16 matrix product, rested and after :data:`SUSTAIN` seconds of
    it without a pause, TB/s of a copy (read and write).
    """
    size, repeat = (8192, 20) if device.type == "cuda" else (512, 3)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    to = torch.empty(16 * size * size // 2, device=device, dtype=torch.bfloat16)
    source = torch.ones_like(to)

    def once(what: Callable[[], Any]) -> float:
        return common.time_once(lambda: [what() for _ in range(repeat)], device) / repeat

    def best(what: Callable[[], Any], many: int = 5) -> float:
        what()
        return min(once(what) for _ in range(many))

    product, copy = best(lambda: a @ b), best(lambda: to.copy_(source))
    times = [product]
    while device.type == "cuda" and sum(times) * repeat < SUSTAIN * 1e3:
        times.append(once(lambda: a @ b))
    last = statistics.median(times[-len(times) // 3 :])
    flops = 2 * size**3 / 1e9
    return {"tflops": flops / product, "sustained_tflops": flops / last, "tb_per_s": 2 * to.nbytes / copy / 1e9}


def work(model: nn.Module, batch: int, seq: int) -> dict[str, dict[str, float]]:
    """FLOPs and bytes, by kind, that forward and backward of a micro-batch cannot do without.

    FLOPs: a matrix of n numbers costs 6 n a token that it multiplies (2 forward, 4 backward); attention 12 x heads x size x
    the keys that a token sees on average, values alike. Mamba's scan is left out. Bytes: each weight is read twice and its
    gradient written once; activations are left out, so both are lower bounds. Real routing may leave experts without a
    token; they are counted.
    """
    config = model.config.get_text_config()
    tokens, flops, traffic = batch * seq, Counter(), Counter()  # type: ignore[var-annotated]
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for name, p in model.named_parameters():
        which = "head" if p is head else "grouped GEMM" if p.dim() == 3 and "experts" in name else "dense GEMM"
        if p is embedding and p is not head:
            # a row a token is read, but the gradient of the whole table is written
            traffic["head"] += p.nbytes
            continue
        traffic[which] += 3 * p.nbytes
        if p.dim() < 2 or name.endswith("bias"):
            continue
        share = config.num_experts_per_tok / p.shape[0] if which == "grouped GEMM" else 1
        flops[which] += 6 * p.numel() * share * tokens
    for layer in _attention_windows(config):
        keys = (seq + 1) / 2 if layer is None or layer >= seq else layer - layer * (layer - 1) / 2 / seq
        flops["attention"] += 12 * config.num_attention_heads * config.head_dim * keys * tokens
    return {"flops": dict(flops), "bytes": dict(traffic)}


def _attention_windows(config: Any) -> list[int | None]:
    """For each layer with attention, its window; None: all that came before."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [
        config.sliding_window if k == "sliding_attention" else None
        for k in kinds
        if k.endswith("attention") and k != "linear_attention"
    ]


def roofline(needed: Mapping[str, Mapping[str, float]], reach: Mapping[str, float], ms: float) -> dict[str, float]:
    """The least milliseconds of the arithmetic and of the bytes at the measured peaks, and the larger's share of ``ms``;
    ``sustained_ms``: of the arithmetic at the rate of a device that had no pause.
    """
    flops = sum(needed["flops"].values())
    arithmetic, sustained = flops / reach["tflops"] / 1e9, flops / reach["sustained_tflops"] / 1e9
    moved = sum(needed["bytes"].values()) / reach["tb_per_s"] / 1e9
    return {"arithmetic_ms": arithmetic, "sustained_ms": sustained, "bytes_ms": moved, "share": max(arithmetic, moved) / ms}


def floors(needed: Mapping[str, Mapping[str, float]], reach: Mapping[str, float]) -> dict[str, float]:
    """The least milliseconds of each kind's work, the larger of its arithmetic and its bytes: what its kernels can reach."""
    return {
        k: max(needed["flops"].get(k, 0) / reach["tflops"], needed["bytes"].get(k, 0) / reach["tb_per_s"]) / 1e9
        for k in KINDS
        if k in needed["flops"] or k in needed["bytes"]
    }


def show(who: str, batch: int, found: Mapping[str, Any]) -> None:
    rows = [(f"{e['ms']:.2f}", f"{e['share']:.1%}", e["calls"], e["kind"], e["kernel"][:70]) for e in found["top"][:20]]
    title = f"one step of {who}, mbs {batch}: {found['ms']:.2f} ms in {found['launches']} launches"
    common.show(title, ("ms", "share", "calls", "kind", "kernel"), rows)
