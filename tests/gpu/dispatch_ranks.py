"""DeepEP, NCCL all-to-all, NCCL all-gather and one process agree: forward, all gradients, and training. One rank of several.

    torchrun --nproc-per-node 2 tests/gpu/dispatch_ranks.py            # two GPUs, or one that two ranks share
    NCCL_MULTI_RANK_GPU_ENABLE=1 torchrun --nproc-per-node 8 ...        # NCCL >= 2.30: ranks may share a GPU
    torchrun --nproc-per-node 2 tests/gpu/dispatch_ranks.py --cpu       # small widths over gloo: tries this script

What is compared, and how far it may be apart. ``exact`` is one process in float32 on the same bfloat16 numbers, ``one`` the
same in bfloat16. Each rank adds up a token's rows in float32 and rounds the sum once to send it, the receiver rounds once: two
roundings of relative size u = 2**-8 at most, of independent sign in each number, so that their relative L2 size is below 2 u
(each is u / sqrt(3), and parts of a token on different ranks are not larger than the token's sum in the mean square). So

    |found - exact| / |exact| <= |one - exact| / |exact| + 2 u        for the result and every gradient

and two transports, which differ in the order of float32 sums only, are within 2 u of each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import moefx
from moefx import ops, transports
from moefx.ops import dispatch_combine, exchange
from moefx.ops import grouped_mlp as grouped

U = 2.0**-8
#: What rounding tokens to e4m3 adds: an error of each number of 2**-4 / sqrt(3) in the root mean square at most, independent; it goes
#: through the two products of an expert and the gate's, each of which has it in one factor: at most three times.
FP8 = 3 * 2.0**-4 / 3**0.5
#: H, I and K are the models' own; experts are as many as a few gibibytes hold.
BLOCKS: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(h=2048, i=768, k=8, e=64, activation="swiglu"),
    "deepseek_v3": dict(h=7168, i=2048, k=8, e=16, activation="swiglu"),
    "gpt_oss": dict(
        h=2880, i=2880, k=4, e=32, bias=True, activation="oai_swiglu", alpha=1.702, limit=7.0, transposed=True, interleaved=True
    ),
    "nemotron_h": dict(h=2688, i=1856, k=6, e=64, activation="relu2"),
}
#: name -> (tokens of a rank, which experts a token may choose and how likely) given rank, ranks, experts
ROUTINGS = ("even", "skewed", "one rank", "an empty rank", "one token", "nothing")
RANK, WORLD, CPU = 0, 1, False
failures: list[str] = []


def say(text: str) -> None:
    if RANK == 0:
        print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


START = time.perf_counter()


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
    return (made * scale).bfloat16()


def routed(name: str, k: int, e: int, tokens: int) -> tuple[int, Tensor, Tensor]:
    """Tokens of this rank, index [T, K], weights [T, K] in float32."""
    if name == "one token":
        tokens = 1
    if name == "nothing" or (name == "an empty rank" and RANK == WORLD - 1):
        tokens = 0
    g = torch.Generator(DEVICE).manual_seed(1000 + RANK)
    score = torch.rand(tokens, e, generator=g, device=DEVICE)
    if name == "skewed":  # the first experts are chosen far more often
        score = score * torch.linspace(3, 0.1, e, device=DEVICE)
    if name == "one rank":
        score[:, : e - e // WORLD] -= 2
    weights, index = score.topk(k, dim=1)
    return tokens, index, torch.softmax(weights, dim=1)


def far(found: Tensor, right: Tensor) -> float:
    """Relative L2 distance; of everything that all ranks have together, so that an empty part says nothing."""
    sums = torch.stack([(found.double() - right.double()).square().sum(), right.double().square().sum()]).float()
    dist.all_reduce(sums)
    gap, size = sums.sqrt().tolist()
    return gap / size if size else (0.0 if gap == 0 else float("inf"))


def check(what: str, ok: bool, text: str) -> None:
    if not ok:
        failures.append(f"{what}: {text}")
        print(f"rank {RANK} FAILED {what}: {text}", flush=True)


def available_transports() -> dict[str, dict[str, Any]]:
    from moefx.backends import deepep
    from moefx.backends.experimental import deepep_elastic, te_ep

    found: dict[str, dict[str, Any]] = {
        "all_to_all": {},
        "all_gather": {"capacity": True},
        "all_to_all, FP8": {"dispatch_dtype": "fp8"},
    }
    if not CPU:
        problem = deepep.available() or deepep.refuses_group(dist.group.WORLD.group_name)
        say(f"DeepEP: {problem or deepep.version()}")
        if problem is None:
            found |= {"deepep": {}, "deepep, no host sync": {"capacity": True}, "deepep, FP8": {"dispatch_dtype": "fp8"}}
        problem = deepep_elastic.available()
        say(f"ElasticBuffer: {problem or 'usable'}")
        if problem is None:
            found |= {"deepep_elastic": {"capacity": True}}
        problem = te_ep.missing() if "--try-refused" in sys.argv else te_ep.available()
        say(f"NCCL EP: {problem or 'usable'}")
        if problem is None:
            found |= {"te_ep": {"capacity": True}}
    return found


def spread(transport: str, how: dict, options: dict, x: Tensor, index: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
    rows, permuted_probs, counts, *route, tokens = dispatch_combine.dispatch_with(transport)(x, index, weights, **how)
    arrived = [tokens, route[0], route[2]]
    rows = grouped.grouped_mlp(rows, counts, *parameters, **options, permuted_probs=permuted_probs, arrived=arrived)
    return dispatch_combine.combine(rows, index, *route, num_experts=how["num_experts"], group=how["group"])


# --- the experts of each family --------------------------------------------------------------------------------------


def blocks(names: list[str], routings: list[str], tokens: int) -> None:
    group = dist.group.WORLD.group_name
    movers = available_transports()
    for family in names:
        b = dict(BLOCKS[family])
        if CPU:
            b |= {"h": 64, "i": 32, "e": 16}
        h, i, k, e = b.pop("h"), b.pop("i"), b.pop("k"), b.pop("e")
        bias = b.pop("bias", False)
        e = max(e, 2 * WORLD)
        wide = 2 * i if b["activation"] != "relu2" else i
        turn = b.get("transposed", False)
        up = random(e, *((h, wide) if turn else (wide, h)), seed=1, scale=h**-0.5)
        down = random(e, *((i, h) if turn else (h, i)), seed=2, scale=i**-0.5)
        biases = (random(e, wide, seed=3, scale=0.1), random(e, h, seed=4, scale=0.1)) if bias else (None, None)
        here = slice(RANK * e // WORLD, (RANK + 1) * e // WORLD)
        for routing in routings:
            many, index, weights = routed(routing, k, e, tokens)
            x, grad = random(many, h, seed=10 + RANK), random(many, h, seed=50 + RANK)

            def run(function, parameters, dtype, x=x, index=index, weights=weights, grad=grad):
                x = x.detach().to(dtype, copy=True).requires_grad_()
                weights = weights.clone().requires_grad_()
                own = [None if p is None else p.detach().to(dtype, copy=True).requires_grad_() for p in parameters]
                y = function(x, index, weights, *own)
                y.backward(grad.to(dtype))
                return [y.detach(), x.grad, weights.grad], [p.grad for p in own if p is not None]

            whole = (up, biases[0], down, biases[1])
            alone = functools.partial(ops.experts, **b)
            exact, exact_p = run(alone, whole, torch.float32)
            one, one_p = run(alone, whole, torch.bfloat16)
            for part in (exact_p, one_p):
                for g in part:  # as float32: a sum over ranks in bfloat16 would be an error of the reference
                    dist.all_reduce(summed := g.float())
                    g.data = summed[here]
            local = tuple(None if p is None else p[here].clone() for p in whole)
            results: dict[str, list[Tensor]] = {}
            for mover, options in movers.items():
                name = mover.split(",")[0]
                how = {"num_experts": e, "group": group, "capacity": (tokens + 8) if options.get("capacity") else 0}
                how["dispatch_dtype"] = options.get("dispatch_dtype", "")
                over_ranks = functools.partial(spread, "" if name.startswith("all") else name, how, b)
                found, found_p = run(over_ranks, local, torch.bfloat16)
                results[mover] = [*found, *found_p]
                names_of = ["y", "x.grad", "weights.grad", *[f"parameter {n}.grad" for n in range(len(found_p))]]
                worst = (0.0, "", 0.0, 0.0)
                for n, f, o, r in zip(names_of, results[mover], [*one, *one_p], [*exact, *exact_p], strict=True):
                    alone_at, distance = far(o, r), far(f, r)
                    limit = alone_at + 2 * U + (FP8 if how["dispatch_dtype"] else 0)
                    # a reference that is itself far off would let anything pass
                    check(f"{family}, {routing}, one process, {n}", alone_at < 0.05, f"{alone_at:.2e} from exact")
                    worst = max(worst, (distance / limit, n, distance, limit))
                    check(
                        f"{family}, {routing}, {mover}, {n}",
                        distance <= limit,
                        f"{distance:.2e} from exact, may be {limit:.2e}",
                    )
                    same = "all_to_all, FP8" if how["dispatch_dtype"] else "all_to_all"
                    apart = far(f, results[same][names_of.index(n)])
                    check(f"{family}, {routing}, {mover}, {n}", apart <= 2 * U, f"{apart:.2e} from {same}")
                say(f"{family:12s} {routing:14s} {mover:22s} {worst[1]} is {worst[2]:.1e} from exact, may be {worst[3]:.1e}")
            del exact, exact_p, one, one_p, results
        transports.release(group)
        del up, down, biases
        gc.collect()
        if not CPU:
            torch.cuda.empty_cache()
    check("after all blocks", not exchange.num_in_flight(), f"{exchange.num_in_flight()} exchanges were never waited for")


# --- training --------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(hidden_size=2048, moe_intermediate_size=768, num_experts=32, num_experts_per_tok=8, num_attention_heads=32,
                      num_key_value_heads=4, head_dim=128, num_hidden_layers=2),
    "deepseek_v3": dict(hidden_size=7168, moe_intermediate_size=2048, n_routed_experts=16, num_experts_per_tok=8, n_group=4,
                        topk_group=2, first_k_dense_replace=0, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
                        qk_nope_head_dim=128, v_head_dim=128, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=1),
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, num_local_experts=16, num_experts_per_tok=4, head_dim=64,
                    num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=2),
    "nemotron_h": dict(hidden_size=2688, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, n_routed_experts=32,
                       num_experts_per_tok=6, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
                       layers_block_type=["attention", "moe"], num_hidden_layers=2),
}  # fmt: skip


def held() -> tuple[float, int]:
    """MiB (of the device; on a CPU, of the process) and tensors that are alive."""
    gc.collect()
    if CPU:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    else:
        torch.cuda.synchronize()
        dist.barrier()
        time.sleep(1)  # NCCL's watchdog drops what finished collectives held
        mib = torch.cuda.memory_allocated() / 2**20
    return mib, sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@dataclasses.dataclass
class Trained:
    losses: list[float]  #: the mean over the ranks, of each step
    norms: list[float]  #: of all gradients, before they are clipped
    early: tuple[float, int]  #: ``held`` after WARM steps
    late: tuple[float, int]  #: after the last
    seconds: float  #: of a step, in the mean


WARM = 10  #: steps until memory has to be flat


def train(family: str, backends: tuple[str, ...], steps: int, compile: bool, chunks: int = 0, **options: Any) -> Trained:
    """As one would: checkpointed blocks, gradients clipped over all meshes at once, AdamW. Lengths change from step to step."""
    from tests.support.families import build

    with torch.device(DEVICE):
        model = build(family, **({} if CPU else MODELS[family])).bfloat16()
        for p in model.parameters():
            p.data /= 2 if p.dim() > 1 else 1  # as a fresh model's: the helper doubles them
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alone = not backends
    if alone:
        moefx.optimize(model, compile=False)
    else:
        if chunks:
            options["pipeline"] = moefx.passes.default().replace("overlap", moefx.passes.Overlap(chunks=chunks))
        moefx.optimize(model, ep_size=WORLD, backends=backends, compile=compile, **options)
    experts = {n for n, _ in model.named_parameters() if ".experts." in n}
    # foreach: what CUDA takes by default; parameters on a mesh and those on none go to it apart
    spread = [p for p in model.parameters() if isinstance(p, DTensor)]
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW([{"params": g} for g in (spread, plain) if g], lr=LEARNING_RATE, foreach=True)
    found = Trained([], [], (0, 0), (0, 0), 0.0)
    started = time.perf_counter()
    for step in range(steps):
        g = torch.Generator().manual_seed(97 * step + RANK)
        length = (64 if CPU else 512) + RANK + 3 * (step % 4)
        ids = torch.randint(0, 256, (1, length), generator=g).to(DEVICE)
        ids[:, 1::2] = ids[:, ::2][:, : ids[:, 1::2].shape[1]]  # something to learn: each token twice
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.grad is not None and (alone or n not in experts):
                    mean = p.grad.float()
                    dist.all_reduce(mean)
                    p.grad.copy_(mean / WORLD)
            mean = loss.detach().float().clone()
            dist.all_reduce(mean)
        found.losses.append(float(mean) / WORLD)
        found.norms.append(float(moefx.clip_grad_norm_(model, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        del loss, mean
        if step == min(WARM, steps - 1):
            found.early = held()
        if step % 50 == 49:
            say(f"{family} {backends}: step {step + 1}, loss {found.losses[-1]:.4f}")
    found.late, found.seconds = held(), (time.perf_counter() - started) / steps
    check(
        f"{family} {backends}",
        not exchange.num_in_flight(),
        f"{exchange.num_in_flight()} exchanges were never waited for",
    )
    if not alone:
        used = moefx.report(model).kernels()
        say(f"{family} {backends}: " + ", ".join(f"{op} -> {b}" for (op, b) in used if op in ("dispatch", "combine")))
    moefx.restore(model)
    del model, optimizer
    gc.collect()
    if not CPU:
        torch.cuda.empty_cache()
    return found


def tail(values: list[float]) -> float:
    """The mean of the last tenth, of five steps at least: single steps of two runs differ by rounding."""
    last = values[-max(5, len(values) // 10) :]
    return sum(last) / len(last)


def training(names: list[str], steps: int, compiled: bool, kinds_wanted: list[str] | None) -> None:
    for family in names:
        many = steps if family == names[0] else min(steps, 8)
        plain = ("torch",) if CPU else ("triton", "torch")
        kinds: dict[str, tuple[tuple[str, ...], bool, dict[str, Any]]] = {
            "one process": ((), False, {}),
            "all_to_all": (plain, False, {}),
            "all_to_all, two chunks": (plain, False, {"chunks": 2}),
            "all_to_all, FP8": (plain, False, {"dispatch_dtype": "fp8"}),
            "all_gather": (plain, False, {"dispatch_capacity": 1024}),
        }
        if not CPU and "deepep" in available_transports():
            kinds |= {
                "deepep": (("deepep", *plain), False, {}),
                "deepep, no host sync": (("deepep", *plain), False, {"dispatch_capacity": 1024}),
                "deepep, FP8": (("deepep", *plain), False, {"dispatch_dtype": "fp8"}),
            }
            if compiled and family == names[0]:
                kinds["deepep, compiled"] = (("deepep", *plain), True, {})
        if compiled and family == names[0]:
            kinds["all_to_all, compiled"] = (plain, True, {})
        right: Trained | None = None
        for kind, (backends, compile, options) in kinds.items():
            if kinds_wanted and kind != "one process" and kind not in kinds_wanted:
                continue
            found = train(family, backends, many, compile, **options)
            right = right or found
            # the same data and optimizer: rounding makes the weights drift apart by its own size a step
            apart = max(abs(a - b) / b for a, b in zip(found.losses, right.losses, strict=True))
            drift = abs(tail(found.losses) / tail(right.losses) - 1)
            first_norm = abs(found.norms[0] / right.norms[0] - 1)
            (mib, alive), (later_mib, later_alive) = found.early, found.late
            say(
                f"{family:12s} {kind:22s} loss {found.losses[0]:.4f} -> {found.losses[-1]:.4f} in {many} steps of {found.seconds:.2f} s; from one "
                f"process: a step by {apart:.1e} at most, the end by {drift:.1e}, the first gradient's norm ({found.norms[0]:.3f}) by "
                f"{first_norm:.1e}; {mib:.0f} -> {later_mib:.0f} MiB, {alive} -> {later_alive} tensors"
            )
            name, fp8 = f"{family}, {kind}", "FP8" in kind
            check(name, drift < (5e-2 if fp8 else 2e-2), f"losses end {drift:.1e} apart")
            check(name, first_norm < (0.1 if fp8 else 2e-2), f"the first gradients' norms are {first_norm:.1e} apart")
            check(
                name,
                many <= WARM or later_mib <= mib * 1.02 + (64 if CPU else 8),
                f"memory grows: {mib:.0f} -> {later_mib:.0f} MiB",
            )
            check(name, many <= WARM or later_alive <= alive, f"tensors pile up: {alive} -> {later_alive}")
            check(name, many < 20 or tail(found.losses) < found.losses[0], "the loss does not fall")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo and small widths: to try this script")
    parser.add_argument("--families", nargs="*", default=list(BLOCKS))
    parser.add_argument("--routings", nargs="*", default=list(ROUTINGS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="of training; 0: none")
    parser.add_argument("--no-blocks", action="store_true")
    parser.add_argument("--kinds", nargs="*", help="of training; by default all")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--try-refused", action="store_true", help="also NCCL EP where its backend refuses torch 2.11")
    parser.add_argument("--compile", action="store_true", help="also a compiled model")
    a = parser.parse_args()
    LEARNING_RATE = a.learning_rate
    RANK, WORLD, CPU = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), a.cpu
    DEVICE = "cpu"
    if not CPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        DEVICE = f"cuda:{torch.cuda.current_device()}"
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("gloo" if CPU else "nccl", timeout=timedelta(seconds=100))
    say(f"{WORLD} ranks on {1 if CPU else torch.cuda.device_count()} device(s) {'' if CPU else torch.cuda.get_device_name()}")
    if not a.no_blocks:
        blocks(a.families, a.routings, 32 if CPU else a.tokens)
    if a.steps:
        training(a.families, a.steps, a.compile, a.kinds)
    many = torch.tensor(len(failures), device=DEVICE)
    dist.all_reduce(many)
    say(f"{'FAILED: ' + str(int(many)) if many else 'ok'}")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(1 if many else 0)
