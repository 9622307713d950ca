"""What moefx itself costs: capturing and rewriting Qwen3-30B-A3B on the meta device, and the Python of one block call.

    python benchmarks/capture.py

Bounds: 48 layers in under 15 s and 3 GiB; 96 layers at most 10 % longer; under 50 us of Python per block call. Exit
code 1 if one is broken. The JSON goes to ``benchmarks/results/capture.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import common

SECONDS, GIB, LONGER, MICROSECONDS = 15.0, 3.0, 1.10, 50.0


def child(layers: int) -> None:
    """In a process of its own: one capture, so that nothing is warm and the peak is this one's."""
    import torch
    from models import config
    from transformers import AutoModelForCausalLM

    import moefx

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("qwen3_30b", layers), dtype=torch.bfloat16)
    plan = moefx.Plan(moefx.backends.resolve(None))
    gc.collect()
    gc.freeze()  # one collection of torch's and Transformers' objects takes 0.3 s, and would fall into one depth or the other
    wall, cpu = time.perf_counter(), time.process_time()
    program = moefx.capture(model)
    captured = time.perf_counter()
    report = moefx.rewrite(program, plan, moefx.passes.default(), model)
    record = {
        "layers": layers,
        "seconds": time.perf_counter() - wall,
        "capture_s": captured - wall,
        "cpu_s": time.process_time() - cpu,
        # ru_maxrss is the whole process: interpreter, torch and the model included
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "functions": {f.name: len(f.instances) for f in program},
        "shortfall": [str(s) for s in report.shortfall()],
    }
    print(json.dumps(record))


def captures(layers: int) -> dict[str, Any]:
    out = subprocess.run([sys.executable, __file__, "--child", str(layers)], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"capturing {layers} layers failed:\n{out.stderr}")
    record = json.loads(out.stdout.splitlines()[-1])
    seconds, cpu = record["seconds"], record["cpu_s"]
    common.say(f"{layers} layers: {seconds:.2f} s (cpu {cpu:.2f} s), {record['peak_gib']:.2f} GiB")
    return record


def call_overhead(calls: int, rounds: int = 9) -> dict[str, Any]:
    """Microseconds of Python around a block's graph: all from ``block(...)`` to its result, the graph costing none."""
    import torch
    from models import build

    import moefx

    model = build("tiny", 2, torch.float32, "cpu").train()
    block = model.model.layers[0]
    untouched = model.model.layers[1]
    ids = torch.arange(32).view(2, 16)
    recorded: list[tuple[tuple, dict]] = []
    handle = block.register_forward_pre_hook(lambda _, a, k: recorded.append((a, k)), with_kwargs=True)
    model(input_ids=ids, labels=ids, use_cache=False)
    handle.remove()
    args, kwargs = recorded[0]

    def per_call(what: Any) -> list[float]:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(calls):
                what(*args, **kwargs)
            times.append((time.perf_counter() - started) / calls * 1e6)
        return times

    # the same measure of a block that computes nothing: what Transformers and nn.Module cost without moefx
    result = args[0].clone()
    plain = type(untouched).forward
    untouched.forward = lambda *a, **k: result
    floor = per_call(untouched)
    del untouched.forward
    assert type(untouched).forward is plain

    moefx.optimize(model, compile=False)
    state = model._moefx
    for function in state.program:
        state.runner(function)  # fills the dict below
    made: dict[int, Any] = {}

    def precomputed(key: int, run: Any) -> Any:
        def runner(*inputs: Any) -> Any:
            if key not in made:
                made[key] = run(*inputs)
            return made[key]

        return runner

    for key, run in list(state.runners.items()):
        state.runners[key] = precomputed(key, run)
    block(*args, **kwargs)
    if not made:
        raise SystemExit("the block's call did not reach its runner: nothing was measured")
    found = per_call(block)
    # the median of rounds: a round that a neighbour interrupted does not count, and neither does a lucky one
    return {
        "microseconds": statistics.median(found),
        "min_microseconds": min(found),
        "empty_block_microseconds": statistics.median(floor),
        "calls": calls,
        "rounds": rounds,
        "kwargs": sorted(kwargs),
        "recorded_reads": block._moefx_forward.snapshots[0].guard.size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="captures per depth, each in a fresh process")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    overhead = call_overhead(args.calls)
    common.say(f"Python per block call: {overhead['microseconds']:.1f} us")
    # depths alternate, so that a busy minute of the machine hits both
    pairs = [(captures(48), captures(96)) for _ in range(args.repeat)]
    shallow, deep = zip(*pairs)

    def median(runs: Any, key: str) -> float:
        return statistics.median(r[key] for r in runs)

    seconds, seconds96 = median(shallow, "seconds"), median(deep, "seconds")
    gib, gib96 = median(shallow, "peak_gib"), median(deep, "peak_gib")
    longer = seconds96 / seconds
    us = overhead["microseconds"]
    rows = [
        ("48 layers, seconds", f"{seconds:.2f}", f"< {SECONDS:.0f}"),
        ("48 layers, peak GiB", f"{gib:.2f}", f"< {GIB:.0f}"),
        ("96 layers / 48 layers, seconds", f"{longer:.3f}", f"<= {LONGER:.2f}"),
        ("96 layers, peak GiB", f"{gib96:.2f}", ""),
        ("Python per block call, us", f"{us:.1f}", f"< {MICROSECONDS:.0f}"),
        ("  of which nn.Module and Transformers", f"{overhead['empty_block_microseconds']:.1f}", ""),
        ("  recorded reads compared in it", str(overhead["recorded_reads"]), ""),
    ]
    common.show("capture + passes, Qwen3-30B-A3B, meta device", ("what", "measured", "bound"), rows)
    problems = []
    if seconds >= SECONDS:
        problems.append(f"48 layers took {seconds:.1f} s, {SECONDS:.0f} s is the bound")
    if gib >= GIB:
        problems.append(f"48 layers took {gib:.2f} GiB, {GIB:.0f} GiB is the bound")
    if longer > LONGER:
        problems.append(f"96 layers took {longer:.2f} times as long as 48, {LONGER:.2f} is the bound")
    if us >= MICROSECONDS:
        problems.append(f"a block call costs {us:.1f} us of Python, {MICROSECONDS:.0f} us is the bound")
    problems += [f"expected ops that were not matched: {s}" for s in shallow[0]["shortfall"]]
    record = {
        "machine": common.machine(),
        "median": {
            "seconds_48": seconds,
            "seconds_96": seconds96,
            "longer": longer,
            "peak_gib_48": gib,
            "peak_gib_96": gib96,
        },
        "call": overhead,
        "runs": [*shallow, *deep],
        "problems": problems,
    }
    common.save("capture", record)
    return common.verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
