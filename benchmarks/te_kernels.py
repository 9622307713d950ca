"""Transformer Engine's kernels against moefx's others, one operation at a time, at the widths of Qwen3-30B-A3B; bf16.

    python benchmarks/te_kernels.py [--tokens 4096 16384] [--only rms_norm route]

Forward + backward of each operation as it would be called from a compiled graph: opaque kernels are called directly, plain
torch ones are compiled by Inductor. Two times: ``device`` is the sum of the GPU's kernels (torch.profiler), what counts in a
step that keeps the GPU busy; ``call`` is the median over CUDA events around one call, launches included. The outputs and
gradients of every contender are compared with the operation's body in float32 (``error``, the worst relative L2 distance).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from common import finish, relative_l2, say, show, time_once, verdict
from torch import Tensor

from moefx import ops
from moefx.backends import te, triton
from moefx.backends import torch as plain
from moefx.distributed import aux_loss
from moefx.kernels.te import attention, available, grouped, linear, permute

DEVICE = torch.device("cuda")
H, HEADS, GROUPS, D, E, K, I = 2048, 32, 4, 128, 128, 8, 768  # Qwen3-30B-A3B # noqa: E741
SEQUENCE, STEPS = 4096, 15
#: The worst relative L2 distance from float32 that bf16 explains.
BOUND = 2e-2


@dataclass
class Case:
    """An operation, its inputs, who computes it, and its meaning (computed on float32 copies)."""

    name: str
    inputs: list[Any]
    contenders: dict[str, Callable[..., Any]]
    body: Callable[..., Any] | None
    skipped: dict[str, str] = field(default_factory=dict)
    backward: bool = True
    bound: dict[str, float] = field(default_factory=dict)  #: of a contender, where BOUND does not hold


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def compiled(fn: Callable) -> Callable:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def cases(tokens: int) -> Iterator[Case]:
    def norm(fn: Callable) -> Callable:
        return lambda x, w: fn(x, w, 1e-6)

    def add_norm(fn: Callable) -> Callable:
        return lambda x, y, w: fn(x, y, w, 1e-6)

    body, add_body = ops.BODIES[ops.rms_norm], ops.BODIES[ops.add_rms_norm]
    for name, shape in (("rms_norm", (tokens, H)), ("qk_norm", (tokens, HEADS, D))):
        yield Case(
            name,
            [normal(*shape), normal(shape[-1])],
            {
                "inductor": compiled(norm(body)),
                "torch": norm(plain.rms_norm),
                "triton": norm(triton.rms_norm),
                "te": norm(te.rms_norm),
            },
            norm(body),
        )
    yield Case(
        "add_rms_norm",
        [normal(tokens, H), normal(tokens, H), normal(H)],
        {"inductor": compiled(add_norm(add_body)), "triton": add_norm(triton.add_rms_norm), "te": add_norm(te.add_rms_norm)},
        add_norm(add_body),
    )

    def routed(fn: Callable) -> Callable:
        return lambda x: fn(x, None, K, renormalize=True)

    def sigmoid(fn: Callable) -> Callable:
        options = {
            "score": "sigmoid",
            "gather": True,
            "sorted": False,
            "renormalize": True,
            "eps": 1e-20,
            "routed_scaling_factor": 2.5,
        }
        return lambda x, bias: fn(x, bias, K, groups=8, topk_groups=4, **options)

    def one_order(fn: Callable) -> Callable:
        """Weights in the order of the experts: top-k's own order is free here."""

        def call(x: Tensor, bias: Tensor) -> Tensor:
            weights, index = fn(x, bias)
            return weights.gather(1, index.argsort(-1))

        return call

    route = ops.BODIES[ops.route]
    logits = normal(tokens, E, dtype=torch.float32)
    yield Case(
        "route softmax",
        [logits],
        {"inductor": compiled(routed(route)), "triton": routed(triton.route), "te": routed(te.route)},
        routed(route),
    )
    yield Case(
        "route sigmoid, bias, groups",
        [logits, torch.rand(E, device=DEVICE)],
        {"inductor": compiled(one_order(sigmoid(route)))}
        | {n: one_order(sigmoid(f)) for n, f in (("triton", triton.route), ("te", te.route))},
        one_order(sigmoid(route)),
    )
    batch = tokens // SEQUENCE
    q, k, v = normal(batch, HEADS, SEQUENCE, D), normal(batch, GROUPS, SEQUENCE, D), normal(batch, GROUPS, SEQUENCE, D)

    def attend(fn: Callable) -> Callable:
        return lambda q, k, v: fn(q, k, v, None, None, scale=D**-0.5, is_causal=True)

    unfused = attention.why_not_fused(torch.bfloat16, batch, HEADS, GROUPS, SEQUENCE, D, D, D**-0.5, True, None, False)
    who = {"torch": attend(plain.attention)} | ({} if unfused else {"te": attend(te.attention)})
    # float32 scores of all heads would not fit: torch's own kernel is the measure here, tests/gpu/test_te.py has the body
    yield Case("attention", [q, k, v], who, attend(plain.attention), {"te": unfused} if unfused else {})
    for name, (size, out) in {"q_proj": (H, HEADS * D), "k_proj": (H, GROUPS * D), "o_proj": (HEADS * D, H)}.items():
        yield fp8_case(f"linear {name}", normal(tokens, size), normal(out, size, scale=size**-0.5))
    yield from expert_cases(tokens)
    yield from aux_cases(tokens)


def fp8_case(name: str, x: Tensor, weight: Tensor) -> Case:
    who: dict[str, Callable] = {"torch": F.linear}
    skipped = {}
    for recipe in linear.RECIPES:
        problem = linear.why_not(recipe)
        if problem:
            skipped[f"fp8 {recipe}"] = problem
        else:
            who[f"fp8 {recipe}"] = lambda x, w, recipe=recipe: torch.ops.moefx.te_fp8_linear(x, w, None, recipe)
    bound = {f"fp8 {recipe}": 0.08 for recipe in linear.RECIPES}  # E5M2 gradients: 2**-3 relative, a third of it on average
    return Case(name, [x, weight], who, F.linear, skipped, bound=bound)


def expert_cases(tokens: int) -> Iterator[Case]:
    from moefx.kernels.counting_sort import sort_by_expert
    from moefx.kernels.permute import expand, reduce

    index = torch.rand(tokens, E, device=DEVICE).topk(K).indices
    weights = torch.rand(tokens, K, device=DEVICE, dtype=torch.float32)

    def move_te(x: Tensor) -> Tensor:
        rows, where = permute.te_permute(x, index.int())
        return permute.te_unpermute(rows, where, weights)

    def move(x: Tensor) -> Tensor:
        _, inverse, _ = sort_by_expert(index, E)
        return reduce(expand(x, inverse, K), inverse, K, x.dtype, weights=weights)

    x = normal(tokens, H)
    yield Case(
        "permute + unpermute",
        [x.detach()],
        {"triton": move, "te": move_te},
        lambda x: x * weights.sum(1, keepdim=True),
        backward=False,
    )
    up, down = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)

    def experts(fn: Callable) -> Callable:
        return lambda x, up, down: fn(x, index, weights, up, None, down, None, activation="swiglu")

    yield Case(
        "experts",
        [x, up, down],
        {"torch": experts(plain.experts), "triton": experts(triton.experts_by("torch")), "te": experts(te.experts)},
        experts(ops.BODIES[ops.experts]) if tokens <= 4096 else None,
    )
    flat = index.reshape(-1).sort().values
    counts = torch.zeros(E, dtype=torch.int64, device=DEVICE).scatter_add_(0, flat, torch.ones_like(flat))
    found = grouped.cublaslt()
    kind = "GroupedLinear, grouped tensors" if found >= grouped.CUBLASLT else "GroupedLinear, a call an expert"
    ours = {"triton": lambda r, u, d: triton.grouped_mlp_by("torch")(r, counts, u, None, d, None, activation="swiglu")}
    yield Case(
        f"grouped_mlp ({kind})", [normal(tokens * K, H), up, down], ours | {"te": grouped_linear(counts)}, ours["triton"]
    )


def grouped_linear(counts: Tensor) -> Callable:
    """Transformer Engine's module as it comes, on slices of the stacked weights."""
    import transformer_engine.pytorch as tep

    native = grouped.cublaslt() >= grouped.CUBLASLT
    sizes = [(H, 2 * I), (I, H)]
    made = [
        tep.GroupedLinear(E, a, b, bias=False, params_dtype=torch.bfloat16, device="cuda", use_grouped_tensor=native)
        for a, b in sizes
    ]
    splits = counts if native else counts.tolist()
    parameters = [[getattr(m, f"weight{e}") for e in range(E)] for m in made]

    def call(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        for many, weight in zip(parameters, (up, down), strict=True):
            if many[0].data_ptr() != weight.data_ptr():
                for e, p in enumerate(many):
                    p.data = weight.detach()[e]
        gate, value = made[0](rows, splits).chunk(2, dim=-1)
        return made[1](F.silu(gate) * value, splits)

    call.parameters = parameters  # type: ignore[attr-defined]
    return call


def aux_cases(tokens: int) -> Iterator[Case]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = [normal(tokens, E, dtype=torch.float32) for _ in range(8)]
    who = {
        "transformers": lambda *x: load_balancing_loss_func(x, E, K),
        "torch": lambda *x: aux_loss.load_balancing_loss(x, E, K),
        "te": lambda *x: te.load_balancing_loss(torch.cat(x), K),
    }
    yield Case("auxiliary loss of 8 layers", logits, who, who["transformers"])


# --- measuring -------------------------------------------------------------------------------------------------------


def step(case: Case, fn: Callable, inputs: list[Any], grads: list[Tensor]) -> list[Tensor]:
    out = fn(*inputs)
    found = [o for o in ([out] if isinstance(out, Tensor) else out) if o.is_floating_point()]
    if case.backward:
        torch.autograd.backward(found, grads or [torch.ones_like(o) for o in found])
    return found


def drop(inputs: list[Any], fn: Callable) -> None:
    for t in [*inputs, *(p for many in getattr(fn, "parameters", []) for p in many)]:
        t.grad = None


def results(case: Case, fn: Callable, inputs: list[Any], grads: list[Tensor]) -> list[Tensor]:
    drop(inputs, fn)
    found = [o.detach() for o in step(case, fn, inputs, grads)]
    if hasattr(fn, "parameters"):
        for t, many in zip(inputs[1:], fn.parameters, strict=True):
            t.grad = torch.stack([p.grad for p in many])
    found += [t.grad for t in inputs if t.requires_grad and t.grad is not None] if case.backward else []
    drop(inputs, fn)
    return found


def flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.dim() > 2 else t


def device_ms(case: Case, fn: Callable, grads: list[Tensor]) -> float:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            step(case, fn, case.inputs, grads)
            drop(case.inputs, fn)
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in p.key_averages()) / 5e3


def measure(case: Case, tokens: int, problems: list[str]) -> list[dict[str, Any]]:
    some = next(iter(case.contenders.values()))
    with torch.no_grad():
        shapes = case.body or some
        out = shapes(*case.inputs)
    outs = [o for o in ([out] if isinstance(out, Tensor) else out) if o.is_floating_point()]
    grads = [torch.randn_like(o, dtype=torch.float32) for o in outs] if case.backward else []
    del out
    wanted = None
    if case.body is not None:
        exact = case.name not in ("attention",) and not case.name.startswith("grouped")
        inputs = [t.detach().float().requires_grad_(t.requires_grad) for t in case.inputs] if exact else case.inputs
        wanted = results(case, case.body, inputs, [g.to(o.float().dtype if exact else o.dtype) for g, o in zip(grads, outs)])
        wanted = [w.float() for w in wanted]
        del inputs
    rows = []
    for who, fn in case.contenders.items():
        mine = [g.to(o.dtype) for g, o in zip(grads, outs)]
        row: dict[str, Any] = {"case": case.name, "tokens": tokens, "who": who}
        try:
            found = results(case, fn, case.inputs, mine)
            if wanted is not None:
                row["error"] = max(relative_l2(flat(w), flat(f)) for w, f in zip(wanted, found, strict=True))
                most = case.bound.get(who, BOUND)
                if not row["error"] < most:
                    problems.append(f"{case.name}, {tokens} tokens, {who}: {row['error']:.1e} from float32, allowed {most}")
            del found
            for _ in range(3):
                step(case, fn, case.inputs, mine)
                drop(case.inputs, fn)
            times = []
            for _ in range(STEPS):
                times.append(time_once(lambda: step(case, fn, case.inputs, mine), DEVICE))  # noqa: B023
                drop(case.inputs, fn)
            row |= {"call_ms": statistics.median(times), "device_ms": device_ms(case, fn, mine)}
        except Exception as error:  # the others are still worth measuring
            problems.append(f"{case.name}, {tokens} tokens, {who}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            row["error"] = float("nan")
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()))
        rows.append(row)
    rows += [{"case": case.name, "tokens": tokens, "who": who, "why": why} for who, why in case.skipped.items()]
    return rows


def tell(title: str, what: str, rows: list[dict[str, Any]], digits: int = 3) -> None:
    """Prints what :func:`measure` found; ``what`` its cases are."""
    table = [
        [
            r["case"],
            r["tokens"],
            r["who"],
            *(f"{r[k]:.{digits}f}" if k in r else "" for k in ("device_ms", "call_ms")),
            f"{r['error']:.1e}" if "error" in r else r.get("why", ""),
        ]
        for r in rows
    ]
    show(title, (what, "tokens", "who", "device ms", "call ms", "error"), table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name starts with one of these")
    args = parser.parse_args()
    problem = available()
    if problem:
        return verdict([problem])
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for tokens in args.tokens:
        for case in cases(tokens):
            if not args.only or case.name.startswith(tuple(args.only)):
                rows += measure(case, tokens, problems)
            del case
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    tell("Transformer Engine's kernels, forward + backward, bf16", "case", rows)
    return finish("te_kernels", rows, problems, cublaslt=grouped.cublaslt())


if __name__ == "__main__":
    sys.exit(main())
