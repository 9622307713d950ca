"""Training steps on one device: Transformers eager, torch.compile of it, NeMo AutoModel, and moefx, on the same weights in
one process.

    python benchmarks/single_gpu.py                                       # Qwen3-30B-A3B's widths, 2 and 6 layers
    python benchmarks/single_gpu.py --model gpt_oss_20b --peers hf,hf_compile
    python benchmarks/single_gpu.py --backends torch                      # no kernels but PyTorch's
    python benchmarks/single_gpu.py --model tiny --device cpu --seq 64    # does it run?

bf16, random weights and tokens. Each row is checked in the same run: moefx's loss and every gradient against
Transformers', and both against Transformers in fp32 (``checks.py``). Exit code 1 if a check fails or moefx is slower than
``--min-speedup`` times Transformers eager. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import breakdown
import checks
import common
import extrapolate
import models
import routing
import simulate_ep
import torch
from models import MODELS, build
from torch import Tensor, nn

import moefx

PEERS = ("hf", "hf_compile", "nemo")
#: Passes of moefx that are not in its default pipeline, and before which of those they run.
OPT_IN: dict[str, tuple[str, Callable[[], moefx.Pass]]] = {
    "fp8": ("lower", moefx.passes.FP8), "fp8_experts": ("lower", functools.partial(moefx.passes.FP8, linear=False)),
    "recompute_experts": ("overlap", moefx.passes.RecomputeExperts),
}  # fmt: skip
#: Relative L2 distance allowed to the logits of a peer that is another implementation: those of other weights are 1.4 apart.
LOGITS = 0.05


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_30b")
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: the model's, in models.py)")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4], help="sequences per micro-batch")
    parser.add_argument("--peers", default="hf,hf_compile", help=f"of {', '.join(PEERS)}; hf always runs, for the check")
    parser.add_argument(
        "--routing",
        choices=routing.ROUTINGS,
        default="real",
        help="real: as the random routers say; balanced: experts in turn; zipf: router weights that give a Zipf(1) load",
    )
    parser.add_argument("--packed", type=int, metavar="MEAN", help="rows of packed sequences, of that many tokens on average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--backends",
        help="moefx's, in order of preference, as triton,torch (default: moefx's own order); the "
        "reference comes last in any case",
    )
    parser.add_argument("--passes", default="", help=f"opt-in passes of moefx besides, of {', '.join(OPT_IN)}")
    parser.add_argument("--attention", help="Transformers' attention implementation (default: the model's, in models.py)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check-seq", type=int, help="tokens of a sequence in the check (default: the model's, or --seq)")
    parser.add_argument("--min-speedup", type=float, help="over hf, every row (default: 1.5 for qwen3_30b on CUDA)")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which peers other than hf are left out")
    parser.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one step of hf and of moefx by kernel, at the last depth",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="moefx's functions")
    parser.add_argument(
        "--simulate-ep",
        type=int,
        metavar="N",
        help="a MODEL, not a measurement: moefx as one of N ranks that "
        "share the experts (simulate_ep.py); nothing else is timed, nothing is checked",
    )
    parser.add_argument("--exchange-gb-per-s", type=float, default=350, help="that a rank is taken to send, with --simulate-ep")
    parser.add_argument("--name", help="of the JSON file")
    args = parser.parse_args()
    args.peers = [p for p in args.peers.split(",") if p]
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"no peer is named {sorted(unknown)[0]!r}; there are {', '.join(PEERS)}")
    args.backends = args.backends.split(",") if args.backends else None
    args.passes = [p for p in args.passes.split(",") if p]
    unknown = set(args.passes) - set(OPT_IN)
    if unknown:
        parser.error(f"no opt-in pass is named {sorted(unknown)[0]!r}; there are {', '.join(OPT_IN)}")
    if args.packed and "nemo" in args.peers:
        parser.error("--packed: nemo_peer.py does not tell NeMo where sequences begin; leave nemo out of --peers")
    if args.passes and args.simulate_ep:
        parser.error("--passes has no effect on the model that --simulate-ep times: leave one of them out")
    try:
        moefx.backends.resolve(args.backends)
    except moefx.MoefxError as error:
        parser.error(str(error))
    model = MODELS[args.model]
    args.layers = args.layers or list(model.depths)
    args.check_seq = min(args.seq, args.check_seq or model.check_seq or args.seq)
    args.attention = args.attention or model.attention
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    suffix = "" if args.routing == "real" else f"-{args.routing}"
    suffix += f"-packed-{args.packed}" if args.packed else ""
    if args.backends or args.passes:
        suffix = f"-{'-'.join([*(args.backends or []), *args.passes])}{suffix}"
    kind = f"simulated_ep{args.simulate_ep}" if args.simulate_ep else "single_gpu"
    args.name = args.name or f"{kind}-{args.model.replace('_', '-')}{suffix}-{common.slug(gpu)}"
    if args.min_speedup is None:
        args.min_speedup = 1.5 if args.model == "qwen3_30b" and args.device.startswith("cuda") else 0.0
    return args


def tokens(args: argparse.Namespace, batch: int, seq: int | None = None) -> dict[str, Tensor]:
    given = models.tokens(args.model, batch, args.seq, args.device)
    if args.packed:
        given["position_ids"] = positions(batch, args.seq, args.packed).to(args.device)
    return {n: t[:, :seq] for n, t in given.items()}


def positions(batch: int, seq: int, mean: int) -> Tensor:
    """Position ids [B, S] of packed sequences, whose lengths are drawn from an exponential distribution of that mean."""
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(batch, seq, generator=generator) < 1 / mean
    begins[:, 0] = True
    at = torch.arange(seq)
    return at - torch.where(begins, at, 0).cummax(1).values


# --- one depth -------------------------------------------------------------------------------------------------------


@dataclass
class Depth:
    """The contenders at one number of layers, and what was measured of them."""

    args: argparse.Namespace
    layers: int
    model: nn.Module  #: Transformers'; all others but NeMo's have its parameters
    record: dict[str, Any]

    def time(self, who: str, module: nn.Module, run: Callable, batch: int) -> None:
        args, device = self.args, torch.device(self.args.device)
        timing = common.measure(module, run, tokens(args, batch), device, warmup=args.warmup, steps=args.steps)
        per_s = batch * args.seq / timing.median_ms * 1e3
        self.record["rows"].append({"who": who, "mbs": batch, "tokens_per_s": per_s, **timing.summary()})
        peak = "" if timing.peak_gib is None else f", peak {timing.peak_gib:.2f} GiB above weights and gradients"
        common.say(f"  {who}, mbs {batch}: {timing.median_ms:.2f} ms{peak} (warm-up {timing.warmup_s:.1f} s)")
        if args.profile and self.layers == args.layers[-1] and who in ("hf", "moefx", "nemo"):
            found = breakdown.profile(module, run, tokens(args, batch), device)
            self.record["breakdown"].append({"who": who, "mbs": batch, **found})
            breakdown.show(who, batch, found)

    def time_graph(self, module: nn.Module, batch: int) -> None:
        self.time("moefx_graph", module, moefx.cuda_graph(module), batch)

    def check(self, other: nn.Module, batch: int, graph: bool) -> None:
        args, given = self.args, tokens(self.args, batch, self.args.check_seq)
        coarser = any(n.startswith("fp8") for n in args.passes)
        found = checks.check(args.model, args.routing == "balanced", self.model, other, given, graph=graph, coarser=coarser)
        name = f"mbs {batch}{', graph' if graph else ''}"
        self.record["checks"][name] = found
        text = f"{len(found['problems'])} problems" if found["problems"] else "ok"
        if found["problems"]:
            text += f" (Transformers one rounding off: {len(found['control_problems'])})"
        common.say(f"  check, {name} of {args.check_seq}: {text}; losses {found['loss']}")

    def attempt(self, who: str, batch: int, errors: Any, what: Callable, *given: Any, code: bool = True) -> None:
        """``what(*given)``; one of ``errors`` is noted, and the measurements go on."""
        try:
            what(*given)
        except errors as error:
            text = str(error).strip() or "?"
            self.record["skipped"].append(f"{who}, mbs {batch}: {type(error).__name__}: {text.splitlines()[0][:300]}")
            common.say(f"  {self.record['skipped'][-1]}")
        common.drop_gradients(self.model)
        common.free(torch.device(self.args.device), code=code)


def depth(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """All contenders at one number of layers."""
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
    here, memory = Depth(args, layers, model, record), torch.OutOfMemoryError
    failures = memory, moefx.MoefxError  # noted among the problems; what is measured besides stands

    for batch in args.mbs:
        here.attempt("hf", batch, memory, here.time, "hf", model, model, batch)
    pipeline = moefx.passes.default()
    for name in args.passes:
        before, opt_in = OPT_IN[name]
        pipeline = pipeline.before(before, opt_in())
    other = moefx.optimize(
        optimized, balanced_routing=balanced, compile=args.compile, backends=args.backends, pipeline=pipeline
    )
    for batch in args.mbs:
        # its code serves every length: dropping it in between would hide that
        here.attempt("moefx", batch, failures, here.time, "moefx", other, other, batch, code=False)
        if device.type == "cuda":
            here.attempt("moefx_graph", batch, failures, here.time_graph, other, batch, code=False)
    for batch in args.mbs:
        for graph in [False, True] if device.type == "cuda" else [False]:
            here.attempt("check", batch, failures, here.check, other, batch, graph, code=False)
    report = moefx.report(other)
    record["fallbacks"] = [f"{p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()]
    record["kernels"] = {f"{op} by {backend}": many for (op, backend), (many, _) in report.kernels().items()}
    record["optimize_s"] = report.seconds
    del other, optimized, report
    common.free(device)

    for peer, batch in [(p, b) for p in args.peers if p != "hf" for b in args.mbs]:
        if common.elapsed() > args.budget:
            record["skipped"].append(f"{peer}, mbs {batch}: the budget of {args.budget:.0f} s was used up")
            common.say(f"  {record['skipped'][-1]}")
            continue
        # a peer that fails is a result; moefx's rows stand
        here.attempt(peer, batch, Exception, _PEERS[peer], here, batch)
    # the first contender again, at the end: whether the clocks of the device drifted meanwhile
    again = common.measure(model, model, tokens(args, args.mbs[0]), device, warmup=1, steps=max(3, args.steps // 3))
    record["hf_again_ms"] = again.median_ms
    common.say(f"  hf again, mbs {args.mbs[0]}: {again.median_ms:.2f} ms")
    return record


def hf_compile(here: Depth, batch: int) -> None:
    peer = common.twin(here.model)
    # compiled for each shape alone: the fastest that torch.compile makes of it
    here.time("hf_compile", peer, torch.compile(peer, dynamic=False), batch)


def nemo(here: Depth, batch: int) -> None:
    import nemo_peer

    args, model = here.args, here.model
    balanced = args.routing == "balanced"
    peer = nemo_peer.from_transformers(model, balanced)
    if not balanced:  # its balanced gate weighs all experts alike: another model
        compare_logits(here, peer, tokens(args, batch, args.check_seq))
    here.time("nemo", peer, peer, batch)


def compare_logits(here: Depth, peer: Any, batch: dict[str, Tensor]) -> None:
    """Raises where NeMo's model is not Transformers': its logits are farther off than bf16 and flipped experts explain."""
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        wanted, found = here.model(input_ids=ids, use_cache=False).logits, peer.model(ids).logits
        losses = [float(m(**batch, use_cache=False).loss) for m in (here.model, peer)]
    gap = common.relative_l2(wanted, found.view_as(wanted))
    here.record.setdefault("nemo", []).append({"logits": gap, "loss_hf": losses[0], "loss_nemo": losses[1]})
    if not gap <= LOGITS:
        raise ValueError(f"its logits are {gap:.2e} from Transformers' (relative L2), {LOGITS:.0e} allowed")


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


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: pass --device cpu --model tiny")
        return 1
    common.say(
        f"{args.model}, {args.layers} layers, sequence {args.seq}, mbs {args.mbs}, {args.dtype} on {device}, "
        f"{args.routing} routing, attention of Transformers: {args.attention}"
    )
    if args.simulate_ep:
        return simulate_ep.run(args)
    reach = breakdown.peaks(device)
    common.say(
        f"this device: {reach['tflops']:.0f} TFLOP/s in a bf16 product, {reach['sustained_tflops']:.0f} without a pause, "
        f"{reach['tb_per_s']:.2f} TB/s in a copy"
    )
    common.free(device)
    depths: list[dict[str, Any]] = []
    for layers in args.layers:
        depths.append(depth(args, layers))
        common.free(device)
        record = summary(args, depths, reach)
        if layers != args.layers[-1]:
            common.save(args.name, record)  # a run that is cut off leaves what it has measured
    show(args, record)
    common.save(args.name, record)
    return common.verdict(record["problems"])


def summary(args: argparse.Namespace, depths: list[dict[str, Any]], reach: dict[str, float]) -> dict[str, Any]:
    """The record of a run: what was measured, what follows from it, and what is wrong with it."""
    problems = []
    for d in depths:
        eager = {r["mbs"]: r["median_ms"] for r in d["rows"] if r["who"] == "hf"}
        for r in [*d["rows"], *d["breakdown"]]:
            r["roofline"] = breakdown.roofline(d["work"][str(r["mbs"])], reach, r.get("median_ms", r.get("ms")))
        d["floors_ms"] = {batch: breakdown.floors(work, reach) for batch, work in d["work"].items()}
        for r in d["rows"]:
            r["speedup"] = eager[r["mbs"]] / r["median_ms"] if r["mbs"] in eager else None
            if r["who"] == "moefx" and r["speedup"] is not None and r["speedup"] < args.min_speedup:
                problems.append(f"{d['layers']} layers, mbs {r['mbs']}: {r['speedup']:.2f} times hf, {args.min_speedup} wanted")
        problems += [f"{d['layers']} layers: {s}" for s in d["skipped"] if s.startswith(("moefx", "check"))]
        for name, check in d["checks"].items():
            problems += [f"{d['layers']} layers, {name}: {p}" for p in check["problems"]]
        problems += [f"{d['layers']} layers: ran the original forward: {f}" for f in d["fallbacks"]]
    whole = whole_model(args, depths)
    eager = {r["mbs"]: r["ms"] for r in whole if r["who"] == "hf"}
    for r in whole:
        r["speedup"] = eager[r["mbs"]] / r["ms"] if r["mbs"] in eager else None
    return {
        "machine": common.machine(args.device),
        "settings": {k: v for k, v in vars(args).items() if k != "name"},
        "seconds": common.elapsed(),
        "peaks": reach,
        "depths": depths,
        "whole_model": whole,
        "problems": problems,
    }


def show(args: argparse.Namespace, record: dict[str, Any]) -> None:
    rows = []
    for d in record["depths"]:
        for r in sorted(d["rows"], key=lambda r: r["mbs"]):
            peak = "" if r["peak_gib"] is None else f"{r['peak_gib']:.2f}"
            clock = "" if r["clock"] is None else f"{r['clock']['sm_mhz']:.0f} {r['clock']['watts']:.0f}"
            rows.append(
                (
                    d["layers"],
                    r["mbs"],
                    r["who"],
                    f"{r['median_ms']:.2f}",
                    f"{r['tokens_per_s']:.0f}",
                    peak,
                    _times(r),
                    f"{r['roofline']['share']:.0%}",
                    clock,
                )
            )
    whole = sorted(record["whole_model"], key=lambda r: r["mbs"])
    for r in whole:
        layers = f"{r['layers']} (extrapolated)"
        rows.append((layers, r["mbs"], r["who"], f"{r['ms']:.2f}", f"{r['tokens_per_s']:.0f}", "", _times(r), "", ""))
    columns = ("layers", "mbs", "who", "ms", "tokens/s", "peak GiB", "times HF", "roofline", "MHz, W")
    title = f"{args.model}, sequence {args.seq}, {args.dtype}, {args.routing} routing: forward + loss + backward"
    common.show(title, columns, rows)
    checks.show(record["depths"])
    if whole:
        units = list(whole[0]["ms_per_unit"])
        common.show(
            "milliseconds of the parts",
            ("mbs", "who", "a layer", *units, extrapolate.REST),
            [
                (
                    r["mbs"],
                    r["who"],
                    f"{r['ms_per_layer']:.2f}",
                    *(f"{r['ms_per_unit'][u]:.2f}" for u in units),
                    f"{r['ms_head']:.2f}",
                )
                for r in whole
            ],
        )
    show_kinds(record["depths"][-1])


def _times(row: dict[str, Any]) -> str:
    return "" if row["speedup"] is None else f"{row['speedup']:.2f}"


def show_kinds(depth: dict[str, Any]) -> None:
    """The kinds of kernels of one step, contenders side by side, and the least that each kind can take."""
    if not depth["breakdown"]:
        return
    rows = []
    for batch, floor in depth["floors_ms"].items():
        for b in (b for b in depth["breakdown"] if str(b["mbs"]) == batch):
            rows.append(
                (batch, b["who"], *(f"{b['kinds_ms'].get(k, 0):.2f}" for k in breakdown.KINDS), f"{b['ms']:.2f}", b["launches"])
            )
        rows.append((batch, "floor", *(f"{floor[k]:.2f}" if k in floor else "" for k in breakdown.KINDS), "", ""))
    columns = ("mbs", "who", *breakdown.KINDS, "sum", "launches")
    common.show(f"kernels of one step, {depth['layers']} layers, ms", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
