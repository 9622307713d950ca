"""FlashAttention 4 against cuDNN, causal attention alone at the sizes of four models; bf16, forward and backward apart.

    python benchmarks/attention_kernels.py [--models qwen3_30b] [--mbs 1 4]

Contenders take turns for a quarter of a second each, three times, so that all run at the clock that the device holds; the figure
is the median of the three means. First each one's result and gradients are compared with float32, on one sequence of 777 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import finish, relative_l2, say, show, verdict
from torch import Tensor

from moefx import ops
from moefx.backends import fa4
from moefx.kernels.attention import flash_attention, flash_attention_backward, recorded

#: Query heads, key heads, numbers of a key and of a value.
MODELS = {
    "qwen3_30b": (32, 4, 128, 128), "gpt_oss_20b": (64, 8, 64, 64), "nemotron_nano": (32, 2, 128, 128),
    "deepseek_v2_lite": (16, 16, 192, 128),
}  # fmt: skip
WHO = {"cudnn": "torch", "fa4": "fa4", "fa4, fixed order": "fa4"}
SEQUENCE, SHORT, SECONDS, ROUNDS = 4096, 777, 0.25, 3
#: The worst relative L2 distance from float32 that bf16 explains.
BOUND = 1e-2


def heads(name: str, batch: int, length: int) -> list[Tensor]:
    """q, k, v and the gradient of out, [B, A, S, D], heads of a position side by side."""
    many, shared, size, of_values = MODELS[name]
    shapes = (many, size), (shared, size), (shared, of_values), (many, of_values)
    return [torch.randn(batch, length, *s, device="cuda").bfloat16().transpose(1, 2) for s in shapes]


def calls(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, by: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of one contender. cuDNN gets values of a size of their own through SDPA, as models do."""
    scale = q.shape[3] ** -0.5
    if by == "torch" and q.shape[3] != v.shape[3]:
        aten = torch.ops.aten
        forward = partial(aten._scaled_dot_product_cudnn_attention, q, k, v, None, True, 0.0, True, False, scale=scale)
        out, lse, *_ = forward()
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        backward = partial(
            aten._scaled_dot_product_cudnn_attention_backward,
            grad,
            q,
            k,
            v,
            out,
            lse,
            *state,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            True,
            scale=scale,
        )
        return forward, backward
    given = None, scale, None, None, by
    forward = partial(flash_attention, q, k, v, *given)
    out, lse = forward()
    return forward, partial(flash_attention_backward, grad.transpose(1, 2).contiguous(), q, k, v, out, lse, *given, False)


def error(name: str, by: str) -> float:
    """The worst distance of the gradients from float32."""
    q, k, v, grad = heads(name, 1, SHORT)
    found = calls(q, k, v, grad, by)[1]()[:3]
    exact = [t.float().requires_grad_() for t in (q, k, v)]
    out = ops.BODIES[ops.attention](*exact, None, None, scale=q.shape[3] ** -0.5, is_causal=True)
    wanted = torch.autograd.grad(out, exact, grad.float().transpose(1, 2))
    return max(relative_l2(w, f) for f, w in zip(found, wanted, strict=True))


def timed(fn: Callable[[], Any]) -> float:
    """Milliseconds of a call, over SECONDS of them."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    began = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    many = max(5, int(SECONDS / (time.perf_counter() - began)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(many):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / many


def measure(name: str, batch: int, problems: list[str]) -> list[dict[str, Any]]:
    q, k, v, grad = heads(name, batch, SEQUENCE)
    found: dict[str, dict[str, Any]] = {}
    for who, by in WHO.items():
        found[who] = {"model": name, "mbs": batch, "who": who, "error": error(name, by)}
        if not found[who]["error"] <= BOUND:
            problems.append(f"{name}, {who}: gradients are {found[who]['error']:.1e} from float32, {BOUND} allowed")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for who, by in WHO.items():
            # cuDNN has no fixed order of sums: only FlashAttention 4's backward is asked for one
            torch.use_deterministic_algorithms(who.endswith("fixed order"))
            for way, fn in zip(("forward_ms", "backward_ms"), calls(q, k, v, grad, by), strict=True):
                times.setdefault((who, way), []).append(timed(fn))
            torch.use_deterministic_algorithms(False)
    for (who, way), ms in times.items():
        found[who][way] = statistics.median(ms)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    problem = fa4.BACKEND.available()
    if problem:
        return verdict([f"FlashAttention 4 cannot run here: {problem}"])
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    with recorded():  # however few tokens
        for name in args.models:
            for batch in args.mbs:
                say(f"{name}, micro-batch {batch}")
                rows += measure(name, batch, problems)
    columns = ("model", "mbs", "who", "forward_ms", "backward_ms", "error")
    show("causal attention", columns, [[f"{r[c]:.3g}" if isinstance(r[c], float) else r[c] for c in columns] for r in rows])
    return finish("attention_kernels", rows, problems)


if __name__ == "__main__":
    sys.exit(main())
