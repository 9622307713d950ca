"""Norms against Inductor's, forward and backward, at the widths of three models: bf16, one operation at a time.

    python benchmarks/norm_kernels.py [--tokens 4096 16384] [--widths 2048 2880]

Contenders are the operation's body compiled by Inductor and moefx's kernels, in one process: the norm of a sum, the norm of a
stream that a later addition reads too, and the norm and rotation of query and key heads. Times and the distance from float32 are
those of ``te_kernels.py``: ``device`` is the sum of the GPU's kernels, ``call`` the median of calls with their launches.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import finish, verdict
from te_kernels import SEQUENCE, Case, compiled, measure, normal, tell
from torch import Tensor

from moefx import ops
from moefx.backends import triton

#: Qwen3-30B-A3B, GPT-OSS-20B and DeepSeek-V3; query and key heads of the first.
WIDTHS, HEADS, SIZE = (2048, 2880, 7168), (32, 4), 128
EPS = 1e-6


def _body_of_stream(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return ops.BODIES[ops.rms_norm](x, weight, eps), x


def cases(tokens: int, widths: list[int]) -> Iterator[Case]:
    def of_sum(fn: Callable) -> Callable:
        return lambda x, residual, weight: fn(x, residual, weight, EPS)

    def of_stream(fn: Callable) -> Callable:
        def call(x: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            y, stream = fn(x, weight, EPS)
            return y, stream + other

        return call

    def both(given: Callable, body: Callable, kernel: Callable) -> dict[str, Callable]:
        return {"inductor": compiled(given(body)), "moefx": compiled(given(kernel))}

    add = ops.BODIES[ops.add_rms_norm]
    for width in widths:
        inputs = [normal(tokens, width), normal(tokens, width), normal(width)]
        yield Case(f"sum of {width}", inputs, both(of_sum, add, triton.add_rms_norm), of_sum(add))
        yield Case(
            f"stream of {width}", inputs, both(of_stream, _body_of_stream, triton.normed_stream), of_stream(_body_of_stream)
        )
    angle = torch.randn(1, SEQUENCE, SIZE, device="cuda")
    tables = angle.cos().bfloat16(), angle.sin().bfloat16()

    def rotated(fn: Callable) -> Callable:
        return lambda x, weight: fn(x, weight, *(t.to(x.dtype) for t in tables), EPS)

    for heads in HEADS:
        x = normal(tokens // SEQUENCE, SEQUENCE, heads, SIZE)
        body = ops.BODIES[ops.norm_rotary]
        yield Case(f"{heads} heads of {SIZE}", [x, normal(SIZE)], both(rotated, body, triton.norm_rotary), rotated(body))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help=f"multiples of {SEQUENCE}")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    args = parser.parse_args()
    problem = triton.available()
    if problem or any(t % SEQUENCE for t in args.tokens):
        return verdict([problem or f"--tokens {args.tokens}: sequences have {SEQUENCE} tokens, give multiples of that"])
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for tokens in args.tokens:
        for case in cases(tokens, args.widths):
            rows += measure(case, tokens, problems)
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    tell("norms, forward + backward", "norm", rows)
    return finish("norm_kernels", rows, problems)


if __name__ == "__main__":
    sys.exit(main())
