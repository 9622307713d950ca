"""Two runs, bit by bit, and what that costs: steps with and without ``torch.use_deterministic_algorithms(True)``.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 python benchmarks/determinism.py                      # CUDA, Qwen3-30B-A3B's widths
    python benchmarks/determinism.py --model tiny --device cpu --seq 64 --steps 3

Each mode trains the same model twice from the same weights, in turns with the other, and compares all gradients of the last step and
the loss. Exit code 1 if the deterministic runs differ. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from models import MODELS, build

import moefx


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3_30b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """On a CPU the processor's time: what else the machine does is not in it."""
    if device.type != "cpu":
        return common.time_once(step, device)
    began = time.process_time()
    step()
    return (time.process_time() - began) * 1e3


def run(args: argparse.Namespace, device: torch.device) -> tuple[list[float], list[torch.Tensor]]:
    """Milliseconds of the steps; the loss and the gradients of the last one, after steps of SGD in between."""
    model = moefx.optimize(
        build(args.model, args.layers, getattr(torch, args.dtype), device).train(), compile=not args.no_compile
    )
    generator = torch.Generator().manual_seed(1)
    times, found = [], []
    for _ in range(args.steps + 2):
        ids = torch.randint(0, model.config.vocab_size, (1, args.seq), generator=generator).to(device)
        loss: list[Any] = []
        common.drop_gradients(model)
        times.append(
            milliseconds(
                lambda ids=ids, loss=loss: loss.append(common.train_step(model, {"input_ids": ids, "labels": ids})), device
            )
        )
        found = [loss[0], *[p.grad for p in model.parameters()]]
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
    return times[2:], [t.clone() for t in found]


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait would count as work
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what Transformers' full_determinism sets
    record: dict[str, Any] = {"machine": common.machine(device), "settings": vars(args)}
    rows, problems = [], []
    modes: dict[str, list[tuple[list[float], list[torch.Tensor]]]] = {"usual": [], "deterministic": []}
    for _ in range(2):
        for name, runs in modes.items():  # in turns: a machine is not equally fast at all times
            torch.use_deterministic_algorithms(name == "deterministic")
            runs.append(run(args, device))
            common.free(device, code=False)
    for name, ((first_ms, first), (second_ms, second)) in modes.items():
        same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
        ms = statistics.median(first_ms + second_ms)
        record[name] = {
            "ms": ms,
            "least_ms": min(first_ms + second_ms),
            "steps_ms": [first_ms, second_ms],
            "tensors": len(same),
            "equal": sum(same),
        }
        rows.append((name, f"{ms:.2f}", f"{min(first_ms + second_ms):.2f}", f"{sum(same)} of {len(same)}"))
        if name == "deterministic" and not all(same):
            problems.append(f"{len(same) - sum(same)} of {len(same)} tensors differ between two deterministic runs")
        common.say(f"{name}: {ms:.2f} ms, {sum(same)} of {len(same)} tensors the same bit by bit")
    record["cost"] = record["deterministic"]["ms"] / record["usual"]["ms"]
    common.show(
        f"{args.model}, {args.layers} layers, {args.seq} tokens, {args.dtype}",
        ("mode", "ms a step", "the fastest", "the same bits"),
        rows,
    )
    where = common.slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu"
    common.save(f"determinism-{args.model}-{where}", record)
    return common.verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
