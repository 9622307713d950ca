"""Tokens per second of the demo's model on CPU: the untouched Transformers model and moefx, compiled, in one process.

    python benchmarks/cpu_demo.py

fp32, batch 8, sequence 256, bytes of the standard library's help topics. The steps of the two alternate, so that
whatever else the machine does hits both. Exit code 1 if moefx is slower or its loss or a gradient differs.
The JSON goes to ``benchmarks/results/cpu_demo.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import common
import torch
from models import build

sys.path.insert(0, str(common.HERE.parent / "examples"))
from bytes_data import batches

#: Relative L2 distance allowed per gradient, and for the loss: fp32 sums in another order. The bound is the demo's.
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--experts", default="grouped_mm", help="Transformers' experts implementation (its default)")
    args = parser.parse_args()

    import moefx

    device = torch.device("cpu")
    # what the threads of both are: the number is in the record
    model = build("demo", 4, torch.float32, device, experts=args.experts).train()
    other = moefx.optimize(common.twin(model))
    runs: dict[str, Any] = {"hf": model, "moefx": other}
    data = batches(args.batch, args.seq)
    timings = {}
    for name, run in runs.items():
        timings[name] = common.Timing(warmup_s=common.warm(run, run, next(data), device, args.warmup))
        common.say(f"{name}: warm-up {timings[name].warmup_s:.1f} s")
    for i in range(args.steps):
        batch = next(data)  # the same for both
        for name in list(runs) if i % 2 else list(reversed(runs)):
            common.drop_gradients(model)  # shared parameters: this drops both models' gradients
            ms = common.time_once(lambda r=runs[name], b=batch: common.train_step(r, b), device)
            timings[name].steps_ms.append(ms)
    batch = next(data)
    loss, wanted = common.gradients(model, model, batch)
    loss_moefx, found = common.gradients(other, other, batch)
    apart = common.spread(common.distances(wanted, found))
    loss_gap = abs(loss - loss_moefx) / abs(loss)

    tokens = args.batch * args.seq
    medians = {n: t.median_ms for n, t in timings.items()}
    # of pairs: a step and its neighbour in time share the machine's mood
    speedup = statistics.median(a / b for a, b in zip(timings["hf"].steps_ms, timings["moefx"].steps_ms))
    rows = [
        (n, f"{ms:.1f}", f"{tokens / ms * 1e3:.0f}", f"{medians['hf'] / ms:.2f}", f"{timings[n].warmup_s:.1f}")
        for n, ms in medians.items()
    ]
    columns = ("who", "ms", "tokens/s", "times HF", "warm-up s")
    common.show(f"demo model, fp32, {args.batch} x {args.seq}", columns, rows)
    print(
        f"loss {loss:.6f} against {loss_moefx:.6f}; gradients apart: max {apart['max']:.1e} ({apart['worst']}), "
        f"mean {apart['mean']:.1e}"
    )
    problems = []
    if medians["moefx"] > medians["hf"]:
        problems.append(f"moefx takes {medians['moefx']:.1f} ms, HF {medians['hf']:.1f} ms")
    if not loss_gap <= TOLERANCE:
        problems.append(f"the loss differs by {loss_gap:.1e}, {TOLERANCE:.0e} is allowed")
    if not apart["max"] <= TOLERANCE:
        problems.append(f"the gradient of {apart['worst']} differs by {apart['max']:.1e}, {TOLERANCE:.0e} is allowed")
    fell_back = {f"{p}: {r}": n for (p, r), n in moefx.report(other).fallbacks.items()}
    problems += [f"ran the original forward {n} times: {what}" for what, n in fell_back.items()]
    common.save(
        "cpu_demo",
        {
            "machine": common.machine(),
            "batch": args.batch,
            "sequence": args.seq,
            "experts": args.experts,
            "tokens_per_s": {n: tokens / ms * 1e3 for n, ms in medians.items()},
            "speedup": medians["hf"] / medians["moefx"],
            "speedup_of_pairs": speedup,
            "timings": {n: t.summary() for n, t in timings.items()},
            "check": {"loss": [loss, loss_moefx], "gradients": apart, "tolerance": TOLERANCE},
            "problems": problems,
        },
    )
    return common.verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
