"""Experts in FP8 against those in bf16, forward and backward, at the widths of three models; nearly even routing.

    python benchmarks/fp8_experts.py [--models gpt_oss_20b] [--tokens 4096 16384]

Contenders are moefx's experts around torch's grouped GEMM, around QuACK's, and in FP8 (:mod:`moefx.kernels.fp8_grouped`), in one
process. Times and the distance from float32 are those of ``te_kernels.py``: ``device`` is the sum of the GPU's kernels, ``call``
the median of calls with their launches. The distance is taken with 4,096 tokens, where float32 has room.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import finish, verdict
from te_kernels import Case, measure, normal, tell
from torch import Tensor

from moefx import ops
from moefx.backends import quack, triton

#: The worst relative L2 distance from float32 of an output or gradient that E4M3 explains: 2**-4 at most in each number of two
#: products in a row, a third of it on average.
BOUND = 0.1


class Experts(NamedTuple):
    experts: int
    hidden: int
    size: int
    top_k: int
    options: dict[str, Any]

    @property
    def gated(self) -> bool:
        return self.options["activation"] != "relu2"


MODELS = {
    "qwen3_30b": Experts(128, 2048, 768, 8, {"activation": "swiglu"}),
    "nemotron_nano": Experts(128, 2688, 1856, 6, {"activation": "relu2"}),
    "gpt_oss_20b": Experts(
        32, 2880, 2880, 4, {"activation": "oai_swiglu", "alpha": 1.702, "limit": 7.0, "transposed": True, "interleaved": True}
    ),
}


def cases(name: str, tokens: int) -> Iterator[Case]:
    e, hidden, size, top_k, options = MODELS[name]
    wide, transposed = size * (2 if MODELS[name].gated else 1), options.get("transposed", False)
    index = torch.rand(tokens, e, device="cuda").topk(top_k).indices
    weights = torch.rand(tokens, top_k, device="cuda", dtype=torch.float32)

    def matrices(out: int, into: int) -> Tensor:
        return normal(e, *((into, out) if transposed else (out, into)), scale=into**-0.5)

    biases = [normal(e, wide), normal(e, hidden)] if transposed else []

    def experts(fn: Callable) -> Callable:
        def call(x: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
            of_up, of_down = biases or (None, None)
            return fn(x, index, weights, up, of_up, down, of_down, **options)

        return call

    kernels = {
        "torch": triton.experts_by("torch"),
        "quack": quack.BACKEND.kernels[ops.experts].fn,
        "fp8": quack.BACKEND.kernel(ops.experts, "fp8").fn,
    }
    rows = tokens * top_k // e
    yield Case(
        f"{name}, {rows} rows an expert",
        [normal(tokens, hidden), matrices(wide, hidden), matrices(hidden, size), *biases],
        {who: experts(fn) for who, fn in kernels.items()},
        experts(ops.BODIES[ops.experts]) if tokens <= 4096 else None,
        bound={"fp8": BOUND},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    args = parser.parse_args()
    problem = quack.BACKEND.available()
    if problem:
        return verdict([f"FP8 experts cannot run here: {problem}"])
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in args.models:
        for tokens in args.tokens:
            for case in cases(name, tokens):
                rows += measure(case, tokens, problems)
            gc.collect()
            torch.cuda.empty_cache()
    tell("experts, forward + backward", "experts", rows, digits=2)
    return finish("fp8_experts", rows, problems)


if __name__ == "__main__":
    sys.exit(main())
