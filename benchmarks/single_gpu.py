"""Training steps on one device: Transformers eager, torch.compile of it, NeMo AutoModel, and moefx, on the same weights in
one process.

    python benchmarks/single_gpu.py                                       # Qwen3-30B-A3B's widths, 2 and 6 layers
    python benchmarks/single_gpu.py --model gpt_oss_20b --peers hf,hf_compile
    python benchmarks/single_gpu.py --model tiny --device cpu --seq 64    # does it run?

bf16, random weights and tokens. Each row is checked in the same run: moefx's loss and every gradient against
Transformers', and both against Transformers in fp32 (``checks.py``). Exit code 1 if a check fails or moefx is slower than
``--min-speedup`` times Transformers eager. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import breakdown
import checks
import common
import extrapolate
import routing
import torch
from models import MODELS, build, config
from torch import Tensor, nn

PEERS = ("hf", "hf_compile", "nemo")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_30b")
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: the model's, in models.py)")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4], help="sequences per micro-batch")
    parser.add_argument("--peers", default="hf,hf_compile", help=f"of {', '.join(PEERS)}; hf always runs, for the check")
    parser.add_argument("--routing", choices=routing.ROUTINGS, default="real", help="real: as the random routers say; "
                        "balanced: experts in turn; zipf: router weights that give a Zipf(1) load")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--attention", help="Transformers' attention implementation (default: the model's, in models.py)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check-seq", type=int, help="tokens of a sequence in the check (default: the model's, or --seq)")
    parser.add_argument("--min-speedup", type=float, help="over hf, every row (default: 1.5 for qwen3_30b on CUDA)")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which peers other than hf are left out")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True,
                        help="one step of hf and of moefx by kernel, at the last depth")  # fmt: skip
    parser.add_argument("--name", help="of the JSON file")
    args = parser.parse_args()
    args.peers = [p for p in args.peers.split(",") if p]
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"no peer is named {sorted(unknown)[0]!r}; there are {', '.join(PEERS)}")
    model = MODELS[args.model]
    args.layers = args.layers or list(model.depths)
    args.check_seq = min(args.seq, args.check_seq or model.check_seq or args.seq)
    args.attention = args.attention or model.attention
    if args.min_speedup is None:
        args.min_speedup = 1.5 if args.model == "qwen3_30b" and args.device.startswith("cuda") else 0.0
    return args


def tokens(args: argparse.Namespace, batch: int, seq: int | None = None) -> dict[str, Tensor]:
    vocabulary = config(args.model, args.layers[0]).vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (batch, args.seq), generator=generator)[:, :seq].to(args.device)
    return {"input_ids": ids, "labels": ids}


# --- one depth -------------------------------------------------------------------------------------------------------


def depth(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """All contenders at one number of layers."""
    import moefx

    device = torch.device(args.device)
    model = build(args.model, layers, getattr(torch, args.dtype), device, attention=args.attention).train()
    gib = sum(p.nbytes for p in model.parameters()) / 2**30
    common.say(f"{layers} layers: {gib:.2f} GiB of weights")
    record: dict[str, Any] = {"layers": layers, "weights_gib": gib, "rows": [], "skipped": [], "checks": {}, "breakdown": []}
    record["work"] = {str(b): breakdown.work(model, b, args.seq) for b in args.mbs}
    if args.routing == "zipf":
        record["load"] = routing.skew(model, tokens(args, max(args.mbs)))
        common.say(f"  load: {next(iter(record['load'].values()))}")
    balanced = args.routing == "balanced"
    optimized = common.twin(model)  # before Transformers' routers are told: moefx is told by its own option
    if balanced:
        routing.balance(model)

    def timed(who: str, module: nn.Module, run: Callable, batch: int) -> None:
        timing = common.measure(module, run, tokens(args, batch), device, warmup=args.warmup, steps=args.steps)
        per_s = batch * args.seq / timing.median_ms * 1e3
        record["rows"].append({"who": who, "mbs": batch, "tokens_per_s": per_s, **timing.summary()})
        peak = "" if timing.peak_gib is None else f", peak {timing.peak_gib:.2f} GiB above weights and gradients"
        common.say(f"  {who}, mbs {batch}: {timing.median_ms:.2f} ms{peak} (warm-up {timing.warmup_s:.1f} s)")
        if args.profile and layers == args.layers[-1] and who in ("hf", "moefx", "nemo"):
            found = breakdown.profile(module, run, tokens(args, batch), device)
            record["breakdown"].append({"who": who, "mbs": batch, **found})
            breakdown.show(who, batch, found)

    for batch in args.mbs:
        timed("hf", model, model, batch)
        common.free(device)

    other = moefx.optimize(optimized, balanced_routing=balanced)
    for batch in args.mbs:
        timed("moefx", other, other, batch)
        common.free(device, code=False)  # its code serves every length: dropping it would hide that
    report = moefx.report(other)
    for batch in args.mbs:
        name = f"mbs {batch}"
        sequences = tokens(args, batch, args.check_seq)
        found = record["checks"][name] = checks.check(args.model, balanced, model, other, sequences)
        text = f"{len(found['problems'])} problems" if found["problems"] else "ok"
        common.say(f"  check, {name} of {args.check_seq}: {text}; losses {found['loss']}")
        common.free(device, code=False)
    record["fallbacks"] = [f"{p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()]
    record["kernels"] = {f"{op} by {backend}": many for (op, backend), (many, _) in report.kernels().items()}
    record["optimize_s"] = report.seconds
    del other, optimized, report
    common.free(device)

    for peer, batch in [(p, b) for p in args.peers if p != "hf" for b in args.mbs]:
        try:
            if common.elapsed() > args.budget:
                raise TimeoutError(f"the budget of {args.budget:.0f} s was used up")
            _PEERS[peer](args, model, batch, timed, record)
        except Exception as error:  # a peer that fails is a result; moefx's rows stand
            text = str(error).strip() or "?"
            record["skipped"].append(f"{peer}, mbs {batch}: {type(error).__name__}: {text.splitlines()[0][:300]}")
            common.say(f"  {record['skipped'][-1]}")
        common.drop_gradients(model)
        common.free(device)
    # the first contender again, at the end: whether the clocks of the device drifted meanwhile
    again = common.measure(model, model, tokens(args, args.mbs[0]), device, warmup=1, steps=max(3, args.steps // 3))
    record["hf_again_ms"] = again.median_ms
    common.say(f"  hf again, mbs {args.mbs[0]}: {again.median_ms:.2f} ms")
    del model
    common.free(device)
    return record


def hf_compile(args: argparse.Namespace, model: nn.Module, batch: int, timed: Callable, record: dict[str, Any]) -> None:
    peer = common.twin(model)
    # compiled for each shape alone: the fastest that torch.compile makes of it
    timed("hf_compile", peer, torch.compile(peer, dynamic=False), batch)


def nemo(args: argparse.Namespace, model: nn.Module, batch: int, timed: Callable, record: dict[str, Any]) -> None:
    import nemo_peer

    balanced = args.routing == "balanced"
    peer = nemo_peer.from_transformers(model, balanced)
    if not balanced:  # its balanced gate weighs all experts alike, so its loss is another
        sequences = tokens(args, batch)
        with torch.no_grad():
            wanted = float(model(**sequences, use_cache=False).loss)
            found = float(peer(**sequences).loss)
        record.setdefault("nemo_loss", {})[f"mbs {batch}"] = {"hf": wanted, "nemo": found}
        if not abs(found - wanted) <= checks.FLOOR[model.dtype] * abs(wanted):
            raise ValueError(f"its loss is {found:.5f}, Transformers' {wanted:.5f}: not the same model")
    timed("nemo", peer, peer, batch)


_PEERS: dict[str, Callable] = {"hf_compile": hf_compile, "nemo": nemo}


# --- the tables ------------------------------------------------------------------------------------------------------


def whole_model(args: argparse.Namespace, depths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each contender's step of the published model, extrapolated; none where the depths do not determine it."""
    model, found = MODELS[args.model], []
    units = {d["layers"]: model.units(d["layers"]) for d in depths}
    for who, batch in dict.fromkeys((r["who"], r["mbs"]) for d in depths for r in d["rows"]):
        measured = {d["layers"]: r["median_ms"] for d in depths for r in d["rows"] if (r["who"], r["mbs"]) == (who, batch)}
        result = extrapolate.whole(measured, units, model.whole, model.layers)
        if result:
            found.append({"who": who, "mbs": batch, **result, "tokens_per_s": batch * args.seq / result["ms"] * 1e3})
    return found


def add_rooflines(depths: list[dict[str, Any]], reach: dict[str, float]) -> None:
    for d in depths:
        for r in [*d["rows"], *d["breakdown"]]:
            r["roofline"] = breakdown.roofline(d["work"][str(r["mbs"])], reach, r.get("median_ms", r.get("ms")))


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: pass --device cpu --model tiny")
        return 1
    common.say(f"{args.model}, {args.layers} layers, sequence {args.seq}, mbs {args.mbs}, {args.dtype} on {device}, "
               f"{args.routing} routing, attention of Transformers: {args.attention}")  # fmt: skip
    reach = breakdown.peaks(device)
    common.say(f"this device: {reach['tflops']:.0f} TFLOP/s in a bf16 product, {reach['tb_per_s']:.2f} TB/s in a copy")
    common.free(device)
    depths = [depth(args, n) for n in args.layers]
    add_rooflines(depths, reach)
    problems, rows = [], []
    for d in depths:
        eager = {r["mbs"]: r["median_ms"] for r in d["rows"] if r["who"] == "hf"}
        for r in sorted(d["rows"], key=lambda r: r["mbs"]):
            r["speedup"] = eager[r["mbs"]] / r["median_ms"]
            peak = "" if r["peak_gib"] is None else f"{r['peak_gib']:.2f}"
            rows.append((d["layers"], r["mbs"], r["who"], f"{r['median_ms']:.2f}", f"{r['tokens_per_s']:.0f}", peak,
                         f"{r['speedup']:.2f}", f"{r['roofline']['share']:.0%}"))  # fmt: skip
            if r["who"] == "moefx" and r["speedup"] < args.min_speedup:
                problems.append(f"{d['layers']} layers, mbs {r['mbs']}: {r['speedup']:.2f} times hf, {args.min_speedup} wanted")
        for name, check in d["checks"].items():
            problems += [f"{d['layers']} layers, {name}: {p}" for p in check["problems"]]
        problems += [f"{d['layers']} layers: ran the original forward: {f}" for f in d["fallbacks"]]
    whole = whole_model(args, depths)
    eager = {r["mbs"]: r["ms"] for r in whole if r["who"] == "hf"}
    for r in sorted(whole, key=lambda r: r["mbs"]):
        r["speedup"] = eager[r["mbs"]] / r["ms"]
        layers = f"{r['layers']} (extrapolated)"
        per_s, speedup = f"{r['tokens_per_s']:.0f}", f"{r['speedup']:.2f}"
        rows.append((layers, r["mbs"], r["who"], f"{r['ms']:.2f}", per_s, "", speedup, ""))
    columns = ("layers", "mbs", "who", "ms", "tokens/s", "peak GiB", "times HF", "roofline")
    title = f"{args.model}, sequence {args.seq}, {args.dtype}, {args.routing} routing: forward + loss + backward"
    common.show(title, columns, rows)
    checks.show(depths)
    if whole:
        units = list(whole[0]["ms_per_unit"])
        common.show("milliseconds of the parts", ("mbs", "who", "a layer", *units, extrapolate.REST), [
            (r["mbs"], r["who"], f"{r['ms_per_layer']:.2f}", *(f"{r['ms_per_unit'][u]:.2f}" for u in units), f"{r['ms_head']:.2f}")
            for r in whole
        ])  # fmt: skip
    show_kinds(depths[-1])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {k: v for k, v in vars(args).items() if k != "name"}
    suffix = "" if args.routing == "real" else f"-{args.routing}"
    common.save(args.name or f"single_gpu-{args.model.replace('_', '-')}{suffix}-{common.slug(gpu)}", {
        "machine": common.machine(device), "settings": settings, "seconds": common.elapsed(), "peaks": reach, "depths": depths,
        "whole_model": whole, "problems": problems,
    })  # fmt: skip
    return common.verdict(problems)


def show_kinds(depth: dict[str, Any]) -> None:
    """The kinds of kernels of one step, contenders side by side."""
    if not depth["breakdown"]:
        return
    rows = [
        (b["mbs"], b["who"], *(f"{b['kinds_ms'].get(k, 0):.2f}" for k in breakdown.KINDS), f"{b['ms']:.2f}", b["launches"],
         f"{b['roofline']['arithmetic_ms']:.2f}", f"{b['roofline']['bytes_ms']:.2f}")
        for b in sorted(depth["breakdown"], key=lambda b: b["mbs"])
    ]  # fmt: skip
    columns = ("mbs", "who", *breakdown.KINDS, "sum", "launches", "floor: FLOPs", "floor: bytes")
    common.show(f"kernels of one step, {depth['layers']} layers, ms", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
