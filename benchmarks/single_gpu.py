"""Training steps on one device: Transformers eager, torch.compile of it, and moefx, on the same weights in one process.

    python benchmarks/single_gpu.py                                     # Qwen3-30B-A3B's widths, 2 and 6 layers
    python benchmarks/single_gpu.py --model tiny --device cpu --seq 64  # does it run?

bf16, random weights and tokens. Each row is checked in the same run: moefx's loss and every gradient against
Transformers', and both against Transformers in fp32. The tolerance is Transformers' own rounding: moefx may be at most
1.5 times as far from fp32 as Transformers in bf16 is. Exit code 1 if a check fails or moefx is slower than
``--min-speedup`` times Transformers eager. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from models import DEPTH, build, config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

FARTHER = 1.5  #: moefx's distance from fp32 over that of Transformers in bf16
#: A distance that rounding the result alone can make (bf16: half a unit in the last place): below it nothing is wrong.
FLOOR = {torch.bfloat16: 2**-8, torch.float32: 1e-4}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("qwen3_30b", "tiny"), default="qwen3_30b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4], help="sequences per micro-batch")
    parser.add_argument("--peers", default="hf,hf_compile", help="besides moefx; hf always runs, for the check")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--min-speedup", type=float, help="over hf, every row (default: 1.5 for qwen3_30b on CUDA)")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which hf_compile is left out")
    parser.add_argument("--profile", action="store_true", help="print the 20 longest CUDA kernels of one moefx step")
    parser.add_argument("--name", help="of the JSON file")
    args = parser.parse_args()
    args.peers = [p for p in args.peers.split(",") if p]
    unknown = set(args.peers) - {"hf", "hf_compile"}
    if unknown:
        parser.error(f"no peer is named {sorted(unknown)[0]!r}; there are hf and hf_compile")
    if args.min_speedup is None:
        args.min_speedup = 1.5 if args.model == "qwen3_30b" and args.device.startswith("cuda") else 0.0
    return args


def tokens(args: argparse.Namespace, batch: int, seed: int = 1) -> dict[str, Tensor]:
    vocabulary = config(args.model, 1).vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, args.seq), generator=generator).to(args.device)
    return {"input_ids": ids, "labels": ids}


# --- checks ----------------------------------------------------------------------------------------------------------


def choices(model: nn.Module, run: Callable, batch: dict[str, Tensor]) -> list[Tensor]:
    """The experts of each token, layer by layer, sorted: from the router logits that the model returns."""
    with torch.no_grad():
        logits = run(input_ids=batch["input_ids"], use_cache=False, output_router_logits=True).router_logits
    k = model.config.num_experts_per_tok
    return [x.softmax(-1, dtype=torch.float32).topk(k, dim=-1).indices.sort(-1).values for x in logits]


def flipped(a: list[Tensor], b: list[Tensor]) -> list[float]:
    """Per layer, the share of tokens that visit other experts: bf16 ties and near ties go either way."""
    return [float((x != y).any(-1).float().mean()) for x, y in zip(a, b, strict=True)]


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32: the reference is to be better than what is measured by it."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


def reference(args: argparse.Namespace, model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict, list[Tensor]]:
    """Loss, gradients and choices of the same weights (each bf16 number is an fp32 number) computed in fp32."""
    layers = model.config.num_hidden_layers
    with torch.device("meta"):
        exact = AutoModelForCausalLM.from_config(config(args.model, layers), dtype=torch.float32, attn_implementation="sdpa")
    # assign: the meta parameters are replaced, and no random initialization is drawn that nobody uses
    exact.load_state_dict({n: t.float() for n, t in model.state_dict().items()}, assign=True)
    # rotary frequencies are buffers outside of the state dict, and fp32 in every model
    exact.model.rotary_emb = common.twin(model.model.rotary_emb)
    exact.set_experts_implementation("eager")  # the loop over experts: the model's own definition
    exact.train()
    # one sequence at a time, so that fp32 activations fit; all have as many labels, so the mean of losses is the loss
    many, loss, picked = len(batch["input_ids"]), 0.0, []
    with exact_fp32():
        for i in range(many):
            one = {n: t[i : i + 1] for n, t in batch.items()}
            part = exact(**one, use_cache=False).loss / many
            part.backward()
            loss += float(part)
            picked.append(choices(exact, exact, one))
    grads = {n: p.grad for n, p in exact.named_parameters()}
    common.drop_gradients(exact)
    return loss, grads, [torch.cat(layer) for layer in zip(*picked)]


def check(args: argparse.Namespace, model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """moefx and Transformers against fp32 on a timed batch, and against each other: whose rounding is whose."""
    loss, wanted, picked = reference(args, model, batch)
    record: dict[str, Any] = {"loss": {"fp32": loss}, "flipped": {}, "problems": []}
    far: dict[str, dict[str, float]] = {}
    chosen, found = {}, {}
    for name, run in (("hf", model), ("moefx", other)):
        record["loss"][name], found[name] = common.gradients(run, run, batch)
        far[name] = common.distances(wanted, found[name])
        record[name] = common.spread(far[name])
        chosen[name] = choices(run, run, batch)
        record["flipped"][f"{name} against fp32"] = flipped(picked, chosen[name])
    record["flipped"]["moefx against hf"] = flipped(chosen["hf"], chosen["moefx"])
    apart = common.distances(found["hf"], found["moefx"])
    record["moefx against hf"] = common.spread(apart)
    rounding = FLOOR[model.dtype]
    # How many tokens go to another expert is luck where they are few: 0 for one model, 2 for the other. A share f of
    # all tokens is about sqrt(f) of a gradient. From 30 flips on the luck is under a tenth: no allowance.
    share = max(record["flipped"]["moefx against fp32"])
    luck = share**0.5 if share * batch["input_ids"].numel() < 30 else 0.0
    floor = max(rounding, luck)
    ratios = {n: far["moefx"][n] / max(far["hf"][n], floor) for n in wanted}
    record["ratio"], record["floor"] = common.spread(ratios), floor
    record["distances"] = {n: [far["hf"][n], far["moefx"][n]] for n in wanted}
    for n, r in ratios.items():
        if not r <= FARTHER:
            record["problems"].append(
                f"grad {n}: {far['moefx'][n]:.2e} from fp32, Transformers {far['hf'][n]:.2e}: {r:.2f} times, {FARTHER} allowed"
            )
    for n, d in apart.items():
        # two that are a and at most 1.5 a from the truth are at most 2.5 a from each other
        allowed = (1 + FARTHER) * max(far["hf"][n], floor)
        if not d <= allowed:
            record["problems"].append(f"grad {n}: {d:.2e} from Transformers', {allowed:.2e} allowed")
    gaps = {n: abs(record["loss"][n] - loss) / abs(loss) for n in ("hf", "moefx")}
    record["loss_gap"] = gaps
    # a mean over many tokens, whose roundings cancel by luck: so the floor is what one rounding of bf16 makes
    if not gaps["moefx"] <= max(FARTHER * gaps["hf"], rounding):
        record["problems"].append(f"loss: {gaps['moefx']:.1e} from fp32, Transformers {gaps['hf']:.1e}")
    return record


# --- one depth -------------------------------------------------------------------------------------------------------


def depth(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """All contenders at one number of layers."""
    import moefx

    device = torch.device(args.device)
    model = build(args.model, layers, getattr(torch, args.dtype), device).train()
    gib = sum(p.nbytes for p in model.parameters()) / 2**30
    common.say(f"{layers} layers: {gib:.2f} GiB of weights")
    record: dict[str, Any] = {"layers": layers, "weights_gib": gib, "rows": [], "skipped": [], "checks": {}}

    def row(who: str, batch: int, timing: common.Timing) -> None:
        per_s = batch * args.seq / timing.median_ms * 1e3
        record["rows"].append({"who": who, "mbs": batch, "tokens_per_s": per_s, **timing.summary()})
        peak = "" if timing.peak_gib is None else f", peak {timing.peak_gib:.2f} GiB above weights and gradients"
        common.say(f"  {who}, mbs {batch}: {timing.median_ms:.2f} ms{peak} (warm-up {timing.warmup_s:.1f} s)")

    def timed(who: str, module: nn.Module, run: Callable, batch: int) -> None:
        row(who, batch, common.measure(module, run, tokens(args, batch), device, warmup=args.warmup, steps=args.steps))

    for batch in args.mbs:
        timed("hf", model, model, batch)
        common.free(device)

    other = moefx.optimize(common.twin(model))
    for batch in args.mbs:
        timed("moefx", other, other, batch)
        common.free(device, code=False)  # its code serves every length: dropping it would hide that
    if args.profile:
        record["profile"] = profile(args, other)
    report = moefx.report(other)
    record["fallbacks"] = [f"{p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()]
    for batch in args.mbs:
        name = f"mbs {batch}"
        found = record["checks"][name] = check(args, model, other, tokens(args, batch))
        text = f"{len(found['problems'])} problems" if found["problems"] else "ok"
        common.say(f"  check, {name}: {text}; losses {found['loss']}")
        common.free(device, code=False)
    # asking for router logits is another kind of call than the timed one: noted, but the times are not about it
    after = [f"{p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()]
    record["fallbacks_in_checks"] = [f for f in after if f not in record["fallbacks"]]
    for text in record["fallbacks_in_checks"][:1]:
        common.say(f"  output_router_logits ran the original forward, so moefx's choices are not known: {text}")
    record["kernels"] = {f"{op} by {backend}": many for (op, backend), (many, _) in report.kernels().items()}
    record["optimize_s"] = report.seconds
    del other, report
    common.free(device)

    for batch in args.mbs if "hf_compile" in args.peers else ():
        if common.elapsed() > args.budget:
            record["skipped"].append(f"hf_compile, mbs {batch}: the budget of {args.budget:.0f} s was used up")
            common.say(f"  {record['skipped'][-1]}")
            continue
        # compiled for each shape alone: the fastest that torch.compile makes of it
        peer = common.twin(model)
        try:
            timed("hf_compile", peer, torch.compile(peer, dynamic=False), batch)
        except Exception as error:  # a peer that fails is a result; moefx's rows stand
            text = str(error).strip() or "?"
            record["skipped"].append(f"hf_compile, mbs {batch}: {type(error).__name__}: {text.splitlines()[0][:300]}")
            common.say(f"  {record['skipped'][-1]}")
        del peer
        common.free(device)
    # the first contender again, at the end: whether the clocks of the device drifted meanwhile
    again = common.measure(model, model, tokens(args, args.mbs[0]), device, warmup=1, steps=max(3, args.steps // 3))
    record["hf_again_ms"] = again.median_ms
    common.say(f"  hf again, mbs {args.mbs[0]}: {again.median_ms:.2f} ms")
    del model
    common.free(device)
    return record


def profile(args: argparse.Namespace, model: nn.Module) -> list[dict[str, Any]]:
    """The kernels of one step at the largest micro-batch, which ran before: nothing is compiled within."""
    from torch.profiler import ProfilerActivity

    cuda = args.device.startswith("cuda")
    batch = tokens(args, args.mbs[-1])
    common.drop_gradients(model)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        common.train_step(model, batch)
        common.synchronize(torch.device(args.device))
    common.drop_gradients(model)

    def micros(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    events = sorted(found.key_averages(), key=micros, reverse=True)
    total = sum(map(micros, events)) or 1.0
    top = [{"kernel": e.key, "ms": micros(e) / 1e3, "calls": e.count, "share": micros(e) / total} for e in events[:20]]
    rows = [(f"{e['ms']:.2f}", f"{e['share']:.1%}", e["calls"], e["kernel"][:80]) for e in top]
    common.show(f"one moefx step, mbs {args.mbs[-1]}: {total / 1e3:.2f} ms", ("ms", "share", "calls", "kernel"), rows)
    sys.stdout.flush()
    return top


# --- the table -------------------------------------------------------------------------------------------------------


def extrapolate(args: argparse.Namespace, depths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the shallowest and the deepest: ms per layer, ms of the rest (embedding, head, loss), the whole model."""
    first, last = min(depths, key=lambda d: d["layers"]), max(depths, key=lambda d: d["layers"])
    if first is last:
        return []
    found = []
    deep = {(r["who"], r["mbs"]): r for r in last["rows"]}
    for r in first["rows"]:
        other = deep.get((r["who"], r["mbs"]))
        if other is None:
            continue
        layer = (other["median_ms"] - r["median_ms"]) / (last["layers"] - first["layers"])
        head = r["median_ms"] - layer * first["layers"]
        whole = head + layer * DEPTH[args.model]
        found.append({"who": r["who"], "mbs": r["mbs"], "ms_per_layer": layer, "ms_head": head, "ms": whole,
                      "layers": DEPTH[args.model], "tokens_per_s": r["mbs"] * args.seq / whole * 1e3})  # fmt: skip
    return found


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: pass --device cpu --model tiny")
        return 1
    common.say(f"{args.model}, {args.layers} layers, sequence {args.seq}, mbs {args.mbs}, {args.dtype} on {device}")
    depths = [depth(args, n) for n in args.layers]
    problems, rows = [], []
    for d in depths:
        eager = {r["mbs"]: r["median_ms"] for r in d["rows"] if r["who"] == "hf"}
        for r in sorted(d["rows"], key=lambda r: r["mbs"]):
            r["speedup"] = eager[r["mbs"]] / r["median_ms"]
            peak = "" if r["peak_gib"] is None else f"{r['peak_gib']:.2f}"
            rows.append((d["layers"], r["mbs"], r["who"], f"{r['median_ms']:.2f}", f"{r['tokens_per_s']:.0f}", peak,
                         f"{r['speedup']:.2f}"))  # fmt: skip
            if r["who"] == "moefx" and r["speedup"] < args.min_speedup:
                problems.append(f"{d['layers']} layers, mbs {r['mbs']}: {r['speedup']:.2f} times hf, {args.min_speedup} wanted")
        for name, check in d["checks"].items():
            problems += [f"{d['layers']} layers, {name}: {p}" for p in check["problems"]]
        problems += [f"{d['layers']} layers: ran the original forward: {f}" for f in d["fallbacks"]]
    whole = extrapolate(args, depths)
    eager = {r["mbs"]: r["ms"] for r in whole if r["who"] == "hf"}
    for r in sorted(whole, key=lambda r: r["mbs"]):
        r["speedup"] = eager[r["mbs"]] / r["ms"]
        layers = f"{r['layers']} (extrapolated)"
        per_s, speedup = f"{r['tokens_per_s']:.0f}", f"{r['speedup']:.2f}"
        rows.append((layers, r["mbs"], r["who"], f"{r['ms']:.2f}", per_s, "", speedup))
    columns = ("layers", "mbs", "who", "ms", "tokens/s", "peak GiB", "times HF")
    common.show(f"{args.model}, sequence {args.seq}, {args.dtype}: forward + loss + backward", columns, rows)
    show_checks(depths)
    if whole:
        common.show("per layer, and the rest", ("mbs", "who", "ms per layer", "ms embedding, head and loss"), [
            (r["mbs"], r["who"], f"{r['ms_per_layer']:.2f}", f"{r['ms_head']:.2f}") for r in whole
        ])  # fmt: skip
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {k: v for k, v in vars(args).items() if k != "name"}
    common.save(args.name or f"single_gpu-{args.model.replace('_', '-')}-{common.slug(gpu)}", {
        "machine": common.machine(device), "settings": settings, "seconds": common.elapsed(), "depths": depths,
        "whole_model": whole, "problems": problems,
    })  # fmt: skip
    return common.verdict(problems)


def show_checks(depths: list[dict[str, Any]]) -> None:
    """Gradients' distances and flipped choices, one table."""
    rows = []
    for d in depths:
        for name, c in d["checks"].items():
            for who in ("hf against fp32", "moefx against fp32", "moefx against hf"):
                found = c[who] if who in c else c[who.split()[0]]
                gap = c["loss_gap"].get(who.split()[0]) if who.endswith("fp32") else None
                gap = abs(c["loss"]["moefx"] - c["loss"]["hf"]) / abs(c["loss"]["hf"]) if gap is None else gap
                share = statistics.fmean(c["flipped"][who])
                rows.append((d["layers"], name, who, f"{gap:.1e}", f"{found['max']:.1e}", f"{found['mean']:.1e}",
                             found["worst"].removeprefix("model."), f"{share:.2%}"))  # fmt: skip
    columns = ("layers", "batch", "who", "loss", "grad max", "mean", "worst", "other experts")
    common.show("relative distance of the loss and of all gradients (L2)", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
