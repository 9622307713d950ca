"""Gradients over ranks against one process: ep x efsdp x dp_replicate x accumulation, in fp32 and bf16, as a table.

    torchrun --standalone --nproc-per-node 8 benchmarks/gradient_table.py                  # NCCL, one or more GPUs
    torchrun --standalone --nproc-per-node 4 benchmarks/gradient_table.py --device cpu     # gloo

NCCL 2.30 and later let several ranks share one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1, which this script sets).

Rank 0 first trains Transformers' own model on the global batch, in fp32 and in the dtype of the row. Ranks have texts of different
lengths, labels masked unevenly, one rank none at all; the loss has its auxiliary part. The measure is the relative L2 distance of
each gradient from fp32, and Transformers' own rounding is the tolerance: in bf16 moefx may be at most 1.5 times as far, in fp32
1e-4. The clipped norm and the weights after a step of AdamW are compared too.

The choice of experts is discontinuous, so in bf16 all follow the choices of the fp32 run; in fp32 each router chooses itself. In the
rows named "half", all tokens go to half of the experts, so that the other ranks' experts get none.
The JSON goes to ``benchmarks/results/``; exit code 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import common
import ranks as ranks_
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import moefx

K, EXPERTS, LAYERS, HEADS = 2, 16, 2, 4
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "moe_intermediate_size": 64},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
#: The routers' weights of given experts, from their logits; as the families define them.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "qwen3_moe": lambda logits, index: F.normalize(logits.softmax(-1, dtype=torch.float32).gather(1, index), p=1, dim=-1).to(logits.dtype),
    "gpt_oss": lambda logits, index: logits.gather(1, index).softmax(-1, dtype=logits.dtype),
}  # fmt: skip
FARTHER = 1.5  #: moefx's distance from fp32 over that of Transformers, in bf16
FLOOR = {torch.bfloat16: 2**-8, torch.float32: 1e-4}  #: distances below are rounding, whoever is farther


@dataclass(frozen=True)
class Case:
    """One row: sizes, and whether all tokens go to half of the experts."""

    family: str
    dtype: str
    ep: int
    dp_replicate: int
    accumulation: int
    half: bool = False

    @property
    def reference(self) -> tuple:
        return self.family, self.dtype, self.accumulation, self.half


def cases(ranks: int, quick: bool) -> list[Case]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for ep in [n for n in (2, 4, 8) if n <= ranks]:
            found.append(Case("qwen3_moe", dtype, ep, 1, 1))
        found.append(Case("qwen3_moe", dtype, min(ranks, 4), max(1, ranks // 4), 3))
        found.append(Case("qwen3_moe", dtype, min(ranks, 8), 1, 1, half=True))
        found.append(Case("gpt_oss", dtype, min(ranks, 4), 1, 1))
    return [c for c in found if c.family == "qwen3_moe" and c.accumulation == 1] if quick else found


def build(family: str, dtype: str, device: torch.device) -> Any:
    """The same weights on every rank and in both dtypes: those that bf16 can say."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        num_experts_per_tok=K,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        output_router_logits=True,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.dim() > 1 else 1)  # larger than a fresh model's: routers that prefer somebody
            p.copy_(p.bfloat16())
    return model.to(device, getattr(torch, dtype)).train()


# --- the batch -------------------------------------------------------------------------------------------------------


def global_batch(ranks: int, accumulation: int, device: torch.device) -> tuple[list[list[dict[str, Tensor]]], int]:
    """[accumulation][rank] micro-batches of 2 sequences, and the labels that count in all of them."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for a in range(accumulation):
        row = []
        for r in range(ranks):
            ids = torch.randint(0, 256, (2, 33 + 3 * r + a), generator=generator)
            labels = ids.clone()
            labels[:, : (r * 3) % 8] = -100
            if r == ranks - 1 and a == 0:
                labels[:] = -100
            row.append({"input_ids": ids.to(device), "labels": labels.to(device)})
        made.append(row)
    return made, sum(int((b["labels"][:, 1:] != -100).sum()) for row in made for b in row)


def together(row: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' micro-batches as one, padded on the right."""
    length = max(b["input_ids"].shape[1] for b in row)

    def join(tensors: list[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(t, (0, length - t.shape[1]), value=value) for t in tensors])

    ids = [b["input_ids"] for b in row]
    mask = join([torch.ones_like(t) for t in ids], 0)
    return {"input_ids": join(ids, 0), "labels": join([b["labels"] for b in row], -100), "attention_mask": mask}


Routes = list[list[Tensor]]  # [accumulation][layer] -> [tokens of the padded global batch, K]


def half_of_the_experts(batch: list[dict[str, Tensor]]) -> Routes:
    generator = torch.Generator().manual_seed(5)
    return [
        [
            torch.rand(b["input_ids"].numel(), EXPERTS // 2, generator=generator).topk(K).indices.to(b["input_ids"].device)
            for _ in range(LAYERS)
        ]
        for b in batch
    ]


def of_rank(told: Tensor, row: list[dict[str, Tensor]], rank: int) -> Tensor:
    """The part of a padded global batch's routes that belongs to a rank's tokens."""
    length = max(b["input_ids"].shape[1] for b in row)
    mine, (many, own) = told.view(-1, length, K), row[rank]["input_ids"].shape
    first = sum(len(b["input_ids"]) for b in row[:rank])
    return mine[first : first + many, :own].reshape(-1, K)


@contextlib.contextmanager
def routers(model: Any, family: str, told: list[Tensor] | None, seen: list[Tensor]) -> Iterator[None]:
    """Within: Transformers' routers choose the experts in ``told``, if given; their choices are appended to ``seen``."""
    gates = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]

    def hook(layer: int) -> Callable:
        def tell(gate: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, index = out
            if told is not None:
                weights, index = WEIGHTS[family](logits, told[layer]), told[layer]
            seen.append(index)
            return logits, weights, index

        return tell

    handles = [gate.register_forward_hook(hook(i)) for i, gate in enumerate(gates)]
    assert len(handles) == LAYERS
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- one process and many ---------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What a step leaves: gradients before clipping, their norm, weights after AdamW."""

    gradients: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]
    loss: float


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def finish(model: Any, loss: float) -> Step:
    gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    norm = float(moefx.clip_grad_norm_(model, 0.5))
    torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3).step()
    return Step(gradients, norm, {n: whole(p.detach()).clone() for n, p in model.named_parameters()}, loss)


def one_process(
    family: str, dtype: str, device: torch.device, ranks: int, accumulation: int, told: Routes | None
) -> tuple[Step, Routes]:
    model = build(family, dtype, device)
    micro, items = global_batch(ranks, accumulation, device)
    total, routes = 0.0, []
    for i, batch in enumerate(map(together, micro)):
        seen: list[Tensor] = []
        with routers(model, family, None if told is None else told[i], seen):
            loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
        routes.append(seen)
    return finish(model, total), routes


def over_ranks(case: Case, rank: int, ranks: int, device: torch.device, told: Routes | None) -> Step:
    model = build(case.family, case.dtype, device)
    model = moefx.parallelize(model, ep_size=case.ep, dp_replicate=case.dp_replicate, compile=False, strict=True)
    micro, items = global_batch(ranks, case.accumulation, device)
    total = 0.0
    paths = [n for n, m in model.named_modules() if n.endswith(".experts")]
    for i, row in enumerate(micro):
        model.set_requires_gradient_sync(i == len(micro) - 1)
        replay: Any = contextlib.nullcontext()
        if told is not None:
            replay = moefx.replay_routes(model, {p: of_rank(t, row, rank) for p, t in zip(paths, told[i], strict=True)})
        with replay:
            loss = model(**row[rank], num_items_in_batch=items, use_cache=False).loss
        (loss * ranks).backward()
        total += float(loss.detach())
    if moefx.report(model).fallbacks:
        raise SystemExit(f"{case}: original forwards ran: {moefx.report(model).fallbacks}")
    return finish(model, total)


def row(case: Case, exact: Step, hf: Step, found: Step) -> tuple[dict[str, Any], list[str]]:
    """The record of a case, and what is out of bounds."""
    dtype = getattr(torch, case.dtype)
    gaps = common.distances(exact.gradients, found.gradients)
    theirs = common.distances(exact.gradients, hf.gradients)
    ratio = {n: gaps[n] / max(theirs[n], FLOOR[dtype]) for n in gaps}
    allowed = FARTHER if dtype == torch.bfloat16 else 1.0
    problems = [
        f"{case}: gradient of {n} is {gaps[n]:.1e} from fp32, Transformers' {theirs[n]:.1e}: {r:.2f} times, {allowed} allowed"
        for n, r in ratio.items()
        if not r <= allowed
    ]
    norm, theirs_norm = (abs(s.norm - exact.norm) / exact.norm for s in (found, hf))
    if not norm <= FARTHER * max(theirs_norm, FLOOR[dtype]):
        problems.append(f"{case}: norm {found.norm}, {exact.norm} in fp32, Transformers {hf.norm}")
    # an entry whose gradient is near eps moves by less than lr, by how much is rounding: so the mean, against the step's size
    moved = {n: float((found.weights[n].double() - hf.weights[n].double()).abs().mean()) / 1e-2 for n in gaps}
    worst = max(moved, key=lambda n: moved[n])
    if not moved[worst] <= (1e-3 if dtype == torch.float32 else 0.1):
        problems.append(f"{case}: after a step {worst} is on average {moved[worst]:.1e} of the step off")
    record = {
        **asdict(case), "moefx": common.spread(gaps), "transformers": common.spread(theirs), "ratio": common.spread(ratio),
        "norm_gap": norm, "transformers_norm_gap": theirs_norm, "step_gap": moved[worst], "loss": found.loss,
        "loss_fp32": exact.loss, "gradients": {n: [theirs[n], gaps[n]] for n in gaps},
    }  # fmt: skip
    return record, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="qwen3_moe without accumulation only")
    args = parser.parse_args()
    rank, ranks, device = ranks_.start(args.device)
    torch.set_float32_matmul_precision("highest")
    # gathering a strided shard takes two steps, which DTensor says of every parameter
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    records, problems, references = [], [], {}
    todo = cases(ranks, args.quick)
    if rank == 0:
        common.say(f"{ranks} ranks on {device.type}, {len(todo)} cases; one process first")
        for case in todo:
            if case.reference not in references:
                told = (
                    half_of_the_experts([together(r) for r in global_batch(ranks, case.accumulation, device)[0]])
                    if case.half
                    else None
                )
                exact, chosen = one_process(case.family, "float32", device, ranks, case.accumulation, told)
                follow = told if case.half else chosen if case.dtype == "bfloat16" else None
                hf, _ = one_process(case.family, case.dtype, device, ranks, case.accumulation, follow)
                references[case.reference] = (exact, hf, follow)
        common.say("one process done")
    # the routes to follow travel as lists, over gloo
    lists = {k: v[2] and [[t.tolist() for t in layer] for layer in v[2]] for k, v in references.items()}
    lists = ranks_.from_first(lists)
    for case in todo:
        follow = lists[case.reference]
        told = follow and [[torch.tensor(t, device=device) for t in layer] for layer in follow]
        found = over_ranks(case, rank, ranks, device, told)
        if rank == 0:
            exact, hf, _ = references[case.reference]
            record, wrong = row(case, exact, hf, found)
            records.append(record)
            problems += wrong
            common.say(f"{case}: {record['moefx']['max']:.1e} from fp32, Transformers {record['transformers']['max']:.1e}")
    code = 0
    if rank == 0:
        rows = [
            (
                r["family"] + (" half" if r["half"] else ""),
                r["dtype"],
                r["ep"],
                ranks // r["dp_replicate"] // r["ep"],
                r["dp_replicate"],
                r["accumulation"],
                f"{r['moefx']['max']:.1e}",
                f"{r['transformers']['max']:.1e}",
                f"{r['ratio']['max']:.2f}",
                f"{r['norm_gap']:.1e}",
            )
            for r in records
        ]
        columns = ("family", "dtype", "ep", "efsdp", "replicas", "micro", "farthest", "Transformers'", "ratio", "norm")
        common.show(f"gradients' distance from fp32 in one process, {ranks} ranks", columns, rows)
        where = common.slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu"
        common.save(
            f"gradient_table-{ranks}ranks-{where}",
            {
                "machine": common.machine(device),
                "gpus": torch.cuda.device_count(),
                "ranks": ranks,
                "allowed": FARTHER,
                "floor": {str(k).removeprefix("torch."): v for k, v in FLOOR.items()},
                "cases": records,
                "problems": problems,
            },
        )
        code = common.verdict(problems)
    code = ranks_.from_first(code)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
