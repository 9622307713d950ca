"""Does training in FP8 give bf16's loss curve? A small Qwen3-MoE on real text, the same batches, one process.

    python benchmarks/fp8_loss.py [--steps 200] [--recipes current block experts]

Weights are bf16 with a float32 copy in the optimizer (AdamW). Two runs that differ by rounding drift apart, since routing is
discontinuous: how far is measured by a control, bf16 from weights that are off by one rounding. A recipe passes if its loss, averaged
over the last fifth of the steps, is no more than ``--allowed`` (relative) above bf16's, or than three times the control's
distance. Exit code 1 otherwise. The JSON goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx
from moefx.passes import FP8, default

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bytes_data import batches

RECIPES = {"current": FP8("current"), "block": FP8("block"), "experts": FP8(linear=False)}


def build(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        norm_topk_prob=True,
        moe_intermediate_size=args.hidden // 2,
        num_experts=16,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()


def train(args: argparse.Namespace, model: Any) -> tuple[list[float], float]:
    """The loss of each step, and milliseconds of a step after the first twenty."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(exact, lr=args.lr, fused=True)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    data, losses, started = batches(args.batch, args.seq), [], time.perf_counter()
    for step in range(args.steps):
        if step == 20:
            torch.cuda.synchronize()
            started = time.perf_counter()
        loss = model(**{k: v.cuda() for k, v in next(data).items()}, use_cache=False).loss
        loss.backward()
        for p, master in zip(parameters, exact, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        warm_up.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, exact)
        losses.append(loss.detach())
    found = [float(x) for x in losses]
    return found, (time.perf_counter() - started) / max(1, args.steps - 20) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--allowed", type=float, default=0.01, help="relative, of the loss at the end")
    args = parser.parse_args()
    curves: dict[str, list[float]] = {}
    record: dict[str, Any] = {}
    problems = []
    for name in ("bf16", "control", *args.recipes):
        model = build(args)
        if name == "control":
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + torch.finfo(p.dtype).eps)
        pipeline = default() if name in ("bf16", "control") else default().before("lower", RECIPES[name])
        try:
            moefx.optimize(model, pipeline=pipeline, compile=False)
            curves[name], step_ms = train(args, model)
        except moefx.MoefxError as error:
            problems.append(f"{name}: {error}")
            continue
        made = 0 if "fp8" not in pipeline.names else moefx.report(model)["fp8"].made_count
        record[name] = {"losses": curves[name], "step_ms": step_ms, "fp8_products": made}
        common.say(
            f"{name}: loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f}, {step_ms:.1f} ms a step, {made} operations in fp8"
        )
        if pipeline.names != default().names and not made:
            problems.append(f"{name}: nothing ran in fp8")
        del model
        common.free(torch.device("cuda"))
    tail = max(1, args.steps // 5)
    end = {name: statistics.fmean(losses[-tail:]) for name, losses in curves.items()}
    rows = [(i, *(f"{losses[i]:.4f}" for losses in curves.values())) for i in range(0, args.steps, max(1, args.steps // 10))]
    rows.append((f"last {tail}", *(f"{x:.4f}" for x in end.values())))
    common.show("loss", ("step", *curves), rows)
    most = max(args.allowed * end["bf16"], 3 * abs(end["control"] - end["bf16"]))
    for name in args.recipes:
        if name in end and not end[name] - end["bf16"] <= most:
            problems.append(
                f"{name}: the loss ends at {end[name]:.4f}, bf16's at {end['bf16']:.4f}, {most:.4f} more is allowed"
            )
    settings = {"machine": common.machine("cuda"), "settings": vars(args), "end": end, "allowed": most}
    common.save(f"fp8_loss-{common.slug(torch.cuda.get_device_name())}", {**settings, "runs": record, "problems": problems})
    return common.verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
