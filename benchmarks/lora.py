"""LoRA training steps on one device: Transformers + PEFT and moefx, with adapters on attention, on the experts, or on both.

    python benchmarks/lora.py                                             # Qwen3-30B-A3B's widths, 2 and 6 layers
    python benchmarks/lora.py --layers 48 --mbs 1 --cuda-graph            # all of Qwen3-30B-A3B
    python benchmarks/lora.py --targets attention both --max-ratio 1.15   # what do adapters on the experts cost?
    python benchmarks/lora.py --model tiny --device cpu --seq 64 --layers 2

A step is forward, loss, backward and AdamW of the adapters. Weights are random, frozen and in bf16; contenders share them, and
begin with the same adapters. The result is checked in the same run: moefx's loss and the gradients of all adapters against
Transformers + PEFT, and both against Transformers + PEFT in fp32 (``checks.py``). Exit code 1 if a check fails, or if a bound of
``--max-ratio`` or ``--min-speedup`` is broken. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import adapters
import checks
import common
import extrapolate
import models
import routing
import torch
import unsloth_peer
from models import MODELS, build
from torch import Tensor, nn

import moefx

PEERS = ("unsloth",)
#: Of ``adapters.TARGETS``, what the others are divided by.
ALONE = "attention"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_30b")
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: the model's, in models.py)")
    parser.add_argument("--targets", choices=adapters.TARGETS, nargs="+", default=["attention", "both"], help="of the adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", choices=("bfloat16", "float32"), default="bfloat16", help="their dtype")
    parser.add_argument("--checkpointing", action="store_true", help="blocks are computed again in the backward")
    parser.add_argument("--cuda-graph", action="store_true", help="moefx's steps also recorded and replayed (CUDA)")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", help="sequences per micro-batch (default: 1 and 4; 1 on the CPU)")
    parser.add_argument("--peers", default="", help=f"of {', '.join(PEERS)}, besides Transformers + PEFT")
    parser.add_argument("--routing", choices=("real", "balanced"), default="real", help="by the random routers, or in turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", help="Transformers' attention implementation (default: the model's, in models.py)")
    parser.add_argument("--backends", help="moefx's, in order of preference, as triton,torch (default: moefx's own order)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="moefx's functions")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="the result against fp32")
    parser.add_argument("--check-layers", type=int, help="depth of the check (default: the least with all --targets)")
    parser.add_argument("--check-seq", type=int, help="tokens of a sequence in the check (default: the model's, or --seq)")
    parser.add_argument("--max-ratio", type=float, help="of moefx's steps with --targets both over those with attention")
    parser.add_argument("--min-speedup", type=float, help="of moefx over Transformers + PEFT, every row")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which what remains is left out")
    parser.add_argument("--name", help="of the JSON file")
    args = parser.parse_args(given)
    args.peers = [p for p in args.peers.split(",") if p]
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"no peer is named {sorted(unknown)[0]!r}; there are {', '.join(PEERS)}")
    args.backends = args.backends.split(",") if args.backends else None
    try:
        moefx.backends.resolve(args.backends)
    except moefx.MoefxError as error:
        parser.error(str(error))
    if args.max_ratio and not {ALONE, "both"} <= set(args.targets):
        parser.error("--max-ratio compares the adapters of both with those of attention: --targets attention both")
    model = MODELS[args.model]
    cuda = args.device.startswith("cuda")
    if args.cuda_graph and not cuda:
        parser.error("--cuda-graph needs a CUDA device")
    args.mbs = args.mbs or ([1, 4] if cuda else [1])
    args.layers = sorted(args.layers or model.depths)
    args.check_layers = args.check_layers or _first_depth(args)
    args.check_seq = min(args.seq, args.check_seq or model.check_seq or args.seq)
    args.attention = args.attention or model.attention
    gpu = torch.cuda.get_device_name(args.device) if cuda and torch.cuda.is_available() else "cpu"
    parts = [*(args.backends or []), f"r{args.rank}" if args.rank != 16 else "", "fp32" if args.adapters == "float32" else ""]
    parts += ["checkpointing" if args.checkpointing else "", args.routing if args.routing != "real" else ""]
    args.name = args.name or "-".join(p for p in ("lora", args.model.replace("_", "-"), *parts, common.slug(gpu)) if p)
    return args


def _first_depth(args: argparse.Namespace) -> int:
    """The first of the model's depths and the given ones that has a layer of each kind that is to be adapted."""
    depths = sorted({*args.layers, *MODELS[args.model].depths})
    for layers in depths:
        empty = build(args.model, layers, torch.bfloat16, "meta")
        if all(
            adapters.targets(empty, which) for which in {t for t in args.targets if t != "both"} or {"attention", "experts"}
        ):
            return layers
    return depths[-1]


def tokens(args: argparse.Namespace, batch: int, seq: int | None = None) -> dict[str, Tensor]:
    return {n: t[:, :seq] for n, t in models.tokens(args.model, batch, args.seq, args.device).items()}


# --- one model with one set of adapters ------------------------------------------------------------------------------


@dataclass
class Case:
    """The contenders on one model with one set of adapters, and what was measured of them."""

    args: argparse.Namespace
    name: str  #: of the model, in MODELS
    targets: str
    record: dict[str, Any]  #: of the depth

    def time(self, who: str, module: nn.Module, run: Callable, batch: int) -> None:
        args, device = self.args, torch.device(self.args.device)
        adapters.fill(module)  # the contender before has trained them
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
        timing = common.measure(
            module, run, tokens(args, batch), device, warmup=args.warmup, steps=args.steps, after=optimizer.step
        )
        weights = sum(p.nbytes for p in module.parameters()) / 2**30
        row = {"who": who, "targets": self.targets, "mbs": batch, **timing.summary()}
        row["tokens_per_s"] = batch * args.seq / timing.median_ms * 1e3
        row["adapters_millions"] = sum(p.numel() for p in trained) / 1e6
        row["above_weights_gib"] = None if timing.allocated_gib is None else timing.allocated_gib - weights
        self.record["rows"].append(row)
        peak = ""
        if timing.allocated_gib is not None:
            peak = f", peak {timing.allocated_gib:.2f} GiB, {row['above_weights_gib']:.2f} above weights"
        common.say(f"  {who}, {self.targets}, mbs {batch}: {timing.median_ms:.2f} ms{peak} (warm-up {timing.warmup_s:.1f} s)")

    def time_hf(self, adapted: nn.Module, batch: int) -> None:
        peer = own(self.args, adapted)
        self.time("hf", peer, peer, batch)

    def time_graph(self, module: nn.Module, batch: int) -> None:
        step = moefx.cuda_graph(module)
        try:
            self.time("moefx_graph", module, step, batch)
        finally:
            step.close()

    def check(self, adapted: nn.Module, other: nn.Module, batch: int, graph: bool) -> None:
        args = self.args
        adapters.fill(other)  # both have the same
        given = tokens(args, batch, args.check_seq)
        found = checks.check(self.name, args.routing == "balanced", own(args, adapted), other, given, graph=graph)
        name = f"{self.targets}, mbs {batch}{', graph' if graph else ''}"
        self.record["checks"][name] = found
        text = f"{len(found['problems'])} problems" if found["problems"] else "ok"
        if found["problems"]:
            text += f" (Transformers one rounding off: {len(found['control_problems'])})"
        ratio = found["ratio"]
        text += f"; distance from fp32 over Transformers': {ratio['max']:.2f} at most, {ratio['mean']:.2f} in the mean"
        common.say(f"  check, {name} of {args.check_seq}: {text}; losses {found['loss']}")

    def skip(self, who: str, batch: int | None, kind: str, why: str, **more: str) -> None:
        self.record["skipped"].append({"who": who, "targets": self.targets, "mbs": batch, "kind": kind, "why": why, **more})
        common.say(f"  {_said(self.record['skipped'][-1])}: {why}")

    def attempt(self, who: str, batch: int | None, what: Callable, *given: Any, code: bool = True) -> Any:
        """``what(*given)``; an error is noted, and the measurements go on."""
        found = None
        if common.elapsed() > self.args.budget:
            self.skip(who, batch, "budget", f"left out, the budget of {self.args.budget:.0f} s was used up")
            return found
        try:
            found = what(*given)
        except Exception as error:
            text = (str(error).strip() or "?").splitlines()[0][:300]
            full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower()
            why = f"{type(error).__name__}: {text}"
            self.skip(who, batch, "memory" if full else "error", why, trace=traceback.format_exc())
        common.free(torch.device(self.args.device), code=code)
        return found


def adapted_from(args: argparse.Namespace, base: nn.Module, which: str) -> Any:
    """A PEFT model that shares the parameters of ``base``, which stays without adapters."""
    model = adapters.adapt(common.twin(base), which, args.rank, getattr(torch, args.adapters))
    if args.checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def own(args: argparse.Namespace, adapted: nn.Module) -> nn.Module:
    """Transformers + PEFT on the same parameters: a tree of its own, so that a step that ended in an error leaves nothing behind."""
    peer = common.twin(adapted)
    if args.routing == "balanced":
        routing.balance(peer)
    return peer


def optimized(args: argparse.Namespace, adapted: nn.Module) -> nn.Module:
    balanced = args.routing == "balanced"
    return moefx.optimize(common.twin(adapted), balanced_routing=balanced, compile=args.compile, backends=args.backends)


def run_case(case: Case, base: nn.Module, timed: bool, checked: bool) -> None:
    args, record = case.args, case.record
    if not adapters.targets(base, case.targets):
        case.skip("all", None, "no target", "these layers have none of it")
        return
    adapted = adapted_from(args, base, case.targets)
    for batch in args.mbs if timed else []:
        case.attempt("hf", batch, case.time_hf, adapted, batch)
        common.drop_gradients(adapted)
    other = case.attempt("moefx", None, optimized, args, adapted)
    if other is None:
        return
    # what is recorded comes last: where a recording failed, the process cannot be relied on
    for graph in [False, True] if args.cuda_graph else [False]:
        for batch in args.mbs if timed else []:
            # moefx's code serves every length: dropping it in between would hide that
            what = (case.time_graph, other, batch) if graph else (case.time, "moefx", other, other, batch)
            case.attempt("moefx_graph" if graph else "moefx", batch, *what, code=False)
            common.drop_gradients(other)
        if checked:
            case.attempt("check", min(args.mbs), case.check, adapted, other, min(args.mbs), graph, code=False)
            common.drop_gradients(other)
    report = moefx.report(other)
    record["fallbacks"] += [f"{case.targets}: {p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()]
    record["kernels"][case.targets] = {f"{op} by {backend}": many for (op, backend), (many, _) in report.kernels().items()}
    record["optimize_s"][case.targets] = report.seconds


# --- one depth -------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> Iterator[tuple[str, int, bool, bool]]:
    """Models to build, (name, layers, timed, checked): the check first, with a model of its own where no timed one will do."""
    stand_in = MODELS[args.model].check_model or args.model
    among = stand_in == args.model and args.check_layers in args.layers
    if args.check and not among:
        yield stand_in, args.check_layers, False, True
    for layers in sorted(args.layers, key=lambda n: n != args.check_layers) if args.check and among else args.layers:
        yield args.model, layers, True, args.check and among and layers == args.check_layers


def depth(args: argparse.Namespace, name: str, layers: int, timed: bool, checked: bool) -> dict[str, Any]:
    """All contenders with all adapters at one number of layers."""
    device = torch.device(args.device)
    record: dict[str, Any] = {"model": name, "layers": layers, "rows": [], "skipped": [], "checks": {}}
    record |= {"fallbacks": [], "kernels": {}, "optimize_s": {}}
    cases = [Case(args, name, which, record) for which in args.targets]
    if common.elapsed() > args.budget:
        cases[0].skip("all", None, "budget", f"{layers} layers left out, the budget of {args.budget:.0f} s was used up")
        return record
    base = build(name, layers, torch.bfloat16, device, attention=args.attention).train().requires_grad_(False)
    record["weights_gib"] = sum(p.nbytes for p in base.parameters()) / 2**30
    common.say(f"{name}, {layers} layers: {record['weights_gib']:.2f} GiB of weights{'' if timed else ', for the check'}")
    for case in cases:
        run_case(case, base, timed, checked)
        common.free(device)
    first = next((r for r in record["rows"] if r["who"] == "hf"), None)
    if first and common.elapsed() <= args.budget:
        # the first contender again, at the end: whether the clocks of the device drifted meanwhile
        peer = own(args, adapted_from(args, base, first["targets"]))
        fewer = argparse.Namespace(**{**vars(args), "warmup": 1, "steps": max(3, args.steps // 3)})
        again = Case(fewer, name, first["targets"], {"rows": []})
        again.time("hf again", peer, peer, first["mbs"])
        record["hf_again_ms"] = again.record["rows"][0]["median_ms"]
    return record


def unsloth(args: argparse.Namespace, depths: list[dict[str, Any]]) -> None:
    """Its rows at all depths, after everything else. Their result is not checked."""
    if not unsloth_peer.installed():
        common.say("unsloth is not installed: it has no rows")
        return
    device = torch.device(args.device)
    for record, which, batch in itertools.product([d for d in depths if d["rows"]], args.targets, args.mbs):
        case = Case(args, args.model, which, record)

        def rows(case: Case = case, layers: int = record["layers"], batch: int = batch) -> None:
            given = args.model, layers, case.targets, args.rank, args.seq, args.checkpointing, device
            peer = unsloth_peer.load(*given)
            case.time("unsloth", peer, peer, batch)

        case.attempt("unsloth", batch, rows)


# --- the record and the table ----------------------------------------------------------------------------------------


def whole_model(args: argparse.Namespace, depths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each contender's step of the published model, extrapolated from less deep ones; none where they do not determine it."""
    model, found = MODELS[args.model], []
    shallow = [d for d in depths if d["rows"] and d["layers"] < model.layers]
    units = {d["layers"]: model.units(d["layers"]) for d in shallow}
    for key in dict.fromkeys(_key(r) for d in shallow for r in d["rows"]):
        measured = {d["layers"]: r["median_ms"] for d in shallow for r in d["rows"] if _key(r) == key}
        result = extrapolate.whole(measured, units, model.whole, model.layers) if len(measured) > 1 else None
        if result:
            who, which, batch = key
            speed = batch * args.seq / result["ms"] * 1e3
            found.append({"who": who, "targets": which, "mbs": batch, **result, "tokens_per_s": speed, "extrapolated": True})
    return found


def _key(row: dict[str, Any]) -> tuple[str, str, int | None]:
    return row["who"], row["targets"], row["mbs"]


def _said(row: dict[str, Any]) -> str:
    who, which, batch = _key(row)
    return f"{who}, {which}" if batch is None else f"{who}, {which}, mbs {batch}"


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its speed-up over Transformers + PEFT, and its time over that of the same contender's on attention alone."""
    ms = {_key(r): r.get("median_ms", r.get("ms")) for r in rows}
    for r in rows:
        who, which, batch = _key(r)
        mine, eager, alone = ms[_key(r)], ms.get(("hf", which, batch)), ms.get((who, ALONE, batch))
        r["speedup"] = eager / mine if eager else None
        r["ratio"] = mine / alone if alone and which != ALONE else None


def problems(args: argparse.Namespace, depths: list[dict[str, Any]]) -> list[str]:
    """What is wrong: with the result, with a bound, or with moefx where Transformers + PEFT did run."""
    found, ratios, speedups = [], 0, 0
    for d in depths:
        where = f"{d['layers']} layers"
        for r in d["rows"]:
            if not r["who"].startswith("moefx"):
                continue
            row = f"{where}, {_said(r)}"
            if args.min_speedup and r["speedup"] is not None:
                speedups += 1
                if r["speedup"] < args.min_speedup:
                    found.append(f"{row}: {r['speedup']:.2f} times Transformers + PEFT, {args.min_speedup} wanted")
            if args.max_ratio and r["ratio"] is not None and r["targets"] == "both":
                ratios += 1
                if r["ratio"] > args.max_ratio:
                    found.append(f"{row}: {r['ratio']:.2f} times attention alone, {args.max_ratio} allowed")
        ran = {(r["targets"], r["mbs"]) for r in d["rows"] if r["who"] == "hf"}
        for s in d["skipped"]:
            failed = s["kind"] == "error" and s["who"] != "unsloth"
            if failed or (s["kind"] == "memory" and _should_fit(s, ran)):
                found.append(f"{where}, {_said(s)}: {s['why']}")
        for name, check in d["checks"].items():
            found += [f"{where}, {name}: {p}" for p in check["problems"]]
        found += [f"{where}: ran the original forward: {f}" for f in d["fallbacks"]]
    if args.max_ratio and not ratios:
        found.append("--max-ratio: no rows of moefx with adapters on attention and on both to be compared")
    if args.min_speedup and not speedups:
        found.append("--min-speedup: no rows of moefx and of Transformers + PEFT to be compared")
    checked = {name.split(",")[0] for d in depths for name in d["checks"]}
    timed = {r["targets"] for d in depths for r in d["rows"] if r["who"].startswith("moefx")}
    if args.check:
        found += [f"{which}: not checked" for which in sorted(timed - checked)]
    return found


def _should_fit(skip: dict[str, Any], ran: set[tuple[str, int]]) -> bool:
    """Is running out of memory a failure? Of a check, and of moefx where Transformers + PEFT fits; not of a recording, which keeps
    all that a step needs at once.
    """
    if skip["who"] == "moefx" and skip["mbs"] is not None:
        return (skip["targets"], skip["mbs"]) in ran
    return skip["who"] in ("moefx", "check")


def summary(args: argparse.Namespace, depths: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a run: what was measured, what follows from it, and what is wrong with it."""
    whole = whole_model(args, depths)
    for rows in (*(d["rows"] for d in depths), whole):
        compare(rows)
    return {
        "machine": common.machine(args.device),
        "settings": {k: v for k, v in vars(args).items() if k != "name"},
        "seconds": common.elapsed(),
        "depths": depths,
        "whole_model": whole,
        "problems": problems(args, depths),
    }


def show(args: argparse.Namespace, record: dict[str, Any]) -> None:
    rows = []
    measured = [(str(d["layers"]), r) for d in record["depths"] for r in d["rows"]]
    for layers, r in [*measured, *((f"{r['layers']} (extrapolated)", r) for r in record["whole_model"])]:
        memory = [r.get("allocated_gib"), r.get("above_weights_gib")]
        figures = [r.get("median_ms", r.get("ms")), r["tokens_per_s"], *memory, r["speedup"], r["ratio"]]
        texts = ["" if f is None else f"{f:.0f}" if i == 1 else f"{f:.2f}" for i, f in enumerate(figures)]
        rows.append((layers, r["targets"], r["mbs"], r["who"], *texts))
    title = f"{args.model}, sequence {args.seq}, LoRA r={args.rank} in {args.adapters}"
    title += f"{', checkpointing' if args.checkpointing else ''}: forward + loss + backward + AdamW"
    columns = ("layers", "adapters", "mbs", "who", "ms", "tokens/s", "peak GiB", "above weights", "times HF", "ratio")
    common.show(title, columns, rows)
    checks.show(record["depths"])


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: pass --device cpu --model tiny")
        return 1
    common.say(
        f"{args.model}, {args.layers} layers, sequence {args.seq}, mbs {args.mbs}, LoRA r={args.rank} in {args.adapters} on "
        f"{' and '.join(args.targets)}, {args.routing} routing on {device}, attention of Transformers: {args.attention}"
    )
    depths: list[dict[str, Any]] = []
    for name, layers, timed, checked in plan(args):
        depths.append(depth(args, name, layers, timed, checked))
        common.free(device)
        common.save(args.name, summary(args, depths))  # a run that is cut off leaves what it has measured
    if "unsloth" in args.peers:
        unsloth(args, depths)
    record = summary(args, depths)
    show(args, record)
    common.save(args.name, record)
    return common.verdict(record["problems"])


if __name__ == "__main__":
    sys.exit(main())
