"""A seeded generator of short trainings as new users write them, each compared with the same training without moefx.

    python tests/flows/first_contact.py --cases 200                  # one process
    python tests/flows/first_contact.py --cases 60 --ranks 2         # expert parallelism with DDP, and parallelize
    python tests/flows/first_contact.py --cases 50 --device cuda

A case is a family x number of experts x call form x rows and length (1 among them) x optimizer and its form x clipping x
precision x checkpointing x how it is spread. It trains three steps, whose batches differ. Losses, the first step's gradients
and the last parameters must be those of the untouched model, no step may have left its graph, and where the untouched model
raises, so must moefx. A case that fails is printed as the Python that makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import moefx
from tests.support.families import FAMILIES, build

STEPS = 3


# --- call forms ------------------------------------------------------------------------------------------------------


def _padded(ids: Tensor, left: bool) -> dict[str, Tensor]:
    """Row r lacks r tokens, but for the last one."""
    rows, length = ids.shape
    gap = torch.arange(rows).clamp(max=length - 1).unsqueeze(1)
    place = torch.arange(length).unsqueeze(0)
    mask = (place >= gap) if left else (place < length - gap)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def _packed(ids: Tensor) -> dict[str, Tensor]:
    half = max(ids.shape[1] // 2, 1)
    return {"input_ids": ids, "labels": ids, "position_ids": (torch.arange(ids.shape[1]) % half).expand(ids.shape).clone()}


def _padding_free(ids: Tensor) -> dict[str, Any]:
    """As TRL's collator without padding passes a row of several sequences."""
    found = _packed(ids[:1])
    starts = (found["position_ids"][0] == 0).nonzero().flatten().int()
    lengths = torch.cat((starts, torch.tensor([ids.shape[1]], dtype=torch.int32)))
    most = int(lengths.diff().max())
    return {**found, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": most, "max_length_k": most}


def _shifted(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids, "shift_labels": nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}


FORMS: dict[str, Callable[[Tensor, nn.Module], dict[str, Any]]] = {
    "labels": lambda ids, m: {"input_ids": ids, "labels": ids},
    "number of items": lambda ids, m: {"input_ids": ids, "labels": ids, "num_items_in_batch": ids.numel() * 2 + 1},
    "tensor of items": lambda ids, m: {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(ids.numel() + 3)},
    "shifted labels": lambda ids, m: _shifted(ids),
    "some labels ignored": lambda ids, m: {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -100)},
    "another ignore_index": lambda ids, m: {"input_ids": ids, "labels": ids, "ignore_index": 7},
    "mask of ones": lambda ids, m: {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)},
    "padded left": lambda ids, m: _padded(ids, True),
    "padded right": lambda ids, m: _padded(ids, False),
    "positions": lambda ids, m: {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).unsqueeze(0)},
    "packed": lambda ids, m: _packed(ids),
    "padding-free": lambda ids, m: _padding_free(ids),
    "embeddings": lambda ids, m: {"inputs_embeds": m.get_input_embeddings()(ids).detach(), "labels": ids},
    "router logits": lambda ids, m: {"input_ids": ids, "labels": ids, "output_router_logits": True},
    "hidden states": lambda ids, m: {"input_ids": ids, "labels": ids, "output_hidden_states": True},
    "tuple": lambda ids, m: {"input_ids": ids, "labels": ids, "return_dict": False},
    "cache": lambda ids, m: {"input_ids": ids, "labels": ids, "use_cache": True},
    "no labels": lambda ids, m: {"input_ids": ids},
}
#: Calls that fill a cache run the model's own code, and say so.
UNGRAPHED = {"cache"}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad, "NAdam": torch.optim.NAdam, "Adafactor": torch.optim.Adafactor,
}  # fmt: skip
#: Above the rounding of gradients: else a step of Adam is the sign of noise where a gradient is zero.
EPS = {"AdamW": 1e-4, "Adam": 1e-4, "RMSprop": 1e-4, "Adagrad": 1e-4, "NAdam": 1e-4}


@dataclass(frozen=True)
class Case:
    family: str = "qwen3_moe"
    experts: str = "some"  #: "some", "one", or "all": every expert is chosen
    form: str = "labels"
    rows: int = 2
    length: int = 8
    grows: int = 0  #: tokens more in each step
    optimizer: str = "AdamW"
    option: str = ""  #: "foreach", "fused"
    clip: str = ""  #: "torch", "moefx"
    precision: str = "fp32"  #: "fp32", "autocast"
    checkpointing: str = ""  #: "reentrant", "not reentrant"
    spread: str = ""  #: "ddp": experts over ranks, DDP for the rest; "parallelize"; "fsdp": parallelize with ep_size=1

    def __str__(self) -> str:
        return "Case(" + ", ".join(f"{k}={v!r}" for k, v in asdict(self).items() if v != getattr(Case(), k)) + ")"

    @staticmethod
    def drawn(seed: int, ranks: int = 1) -> Case:
        r = random.Random(seed)
        optimizer = r.choice([*OPTIMIZERS])
        optional = set(inspect.signature(OPTIMIZERS[optimizer]).parameters) & {"foreach", "fused"}
        if optimizer in ("NAdam", "RMSprop", "Adafactor"):
            optional -= {"fused"}
        # over ranks these mean something else: items and loads of all ranks, an embedding that FSDP has sharded
        alone = ("number of items", "tensor of items", "router logits", "embeddings")
        forms = [f for f in FORMS if ranks == 1 or f not in alone]
        return Case(
            family=r.choice([*FAMILIES]),
            experts=r.choice(["some", "some", "one", "all"]) if ranks == 1 else "some",
            form=r.choice(forms),
            rows=r.choice([1, 1, 2, 3]),
            length=r.choice([1, 2, 7, 16, 24]),
            grows=r.choice([0, 0, 1, 5]),
            optimizer=optimizer,
            option=r.choice(["", *sorted(optional)]),
            clip=r.choice(["", "torch", "moefx"]),
            precision=r.choice(["fp32", "fp32", "autocast"]),
            checkpointing=r.choice(["", "", "reentrant", "not reentrant"]),
            spread=r.choice(["ddp", "parallelize", "fsdp"]) if ranks > 1 else "",
        )


# --- a training ------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    losses: list[float]
    gradients: dict[str, Tensor]  #: of the first step
    parameters: dict[str, Tensor]
    began: dict[str, Tensor]


def model_of(case: Case) -> Any:
    """Small, of the case's family and number of experts."""
    model = build(case.family)
    text = model.config.get_text_config()
    many = next((n for n in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(text, n)), "")
    chosen = next((n for n in ("top_k_experts", "num_experts_per_tok") if hasattr(text, n)), "")
    if case.experts == "one" and many:
        changes = {many: 1, chosen: 1} | {n: 1 for n in ("n_group", "topk_group") if hasattr(text, n)}
        return build(case.family, **changes)
    if case.experts == "all" and many and case.family != "llama4_text":
        return build(
            case.family, **{chosen: getattr(text, many)}, **({"topk_group": text.n_group} if hasattr(text, "n_group") else {})
        )
    return model


def batches(case: Case, rank: int) -> Iterator[Tensor]:
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        yield torch.randint(0, 256, (case.rows, case.length + step * case.grows), generator=generator)


def _whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().float().cpu().clone()


def train(case: Case, model: Any, wrapped: Any, ranks: list[int], device: str, ours: bool) -> Training:
    """``ranks``: whose batches this process sees; of several the loss is the mean."""
    options = {case.option: True} if case.option else {}
    named = {k: v for k, v in {"eps": EPS.get(case.optimizer)}.items() if v}
    optimizer = OPTIMIZERS[case.optimizer](wrapped.parameters(), lr=1e-3, **options, **named)
    found = Training([], {}, {}, {n: _whole(p) for n, p in model.named_parameters()})
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    for step, ids in enumerate(zip(*(batches(case, r) for r in ranks))):
        losses = []
        for part in ids:
            inputs = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in FORMS[case.form](part.to(device), model).items()
            }
            with torch.autocast(device, dtype=torch.bfloat16, enabled=case.precision == "autocast"):
                out = wrapped(**inputs)
                no_loss = case.form == "no labels"
                loss = (out.logits.float().square().mean() if no_loss else out[0]) / len(ids)
            loss.backward()
            losses.append(loss.detach())
        if not step:
            found.gradients = {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        if case.clip:
            clip = moefx.clip_grad_norm_ if case.clip == "moefx" and ours else nn.utils.clip_grad_norm_
            clip(wrapped.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(float(sum(losses)))
    found.parameters = {n: _whole(p) for n, p in model.named_parameters()}
    return found


def _spread(case: Case, model: Any) -> tuple[Any, Any]:
    """The model and what is called in its place."""
    if case.spread == "ddp":
        model = moefx.optimize(model, ep_size=2, compile=False)
        return model, nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    if case.spread:
        model = moefx.parallelize(model, ep_size=2 if case.spread == "parallelize" else 1, compile=False, lost_after=0)
        return model, model
    model = moefx.optimize(model, compile=False)
    return model, model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def differences(case: Case, rank: int = 0, ranks: int = 1, device: str = "cpu", moved: bool = False) -> list[str]:
    """What is not as it is without moefx; empty if all is. ``moved``: to the device after ``optimize``, as many do."""
    with _quiet():
        plain = model_of(case)
        ours = copy.deepcopy(plain) if moved else copy.deepcopy(plain).to(device)
        plain.to(device)
        wanted: Training | str
        try:
            wanted = train(case, plain, plain, list(range(ranks)), device, False)
        except Exception as error:
            wanted = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            ours, wrapped = _spread(case, ours)
            if moved:
                ours.to(device)
            found = train(case, ours, wrapped, [rank], device, True)
        except Exception as error:
            if isinstance(wanted, str):
                return []
            return [f"raises {type(error).__name__}: {error}"[:600]]
    if isinstance(wanted, str):
        return [f"the untouched model raises, moefx does not: {wanted}"]
    if ranks > 1:
        import torch.distributed as dist

        losses = torch.tensor(found.losses, device=device, dtype=torch.float64)
        dist.all_reduce(losses)
        found.losses = (losses / ranks).tolist()
    return [*_compared(case, wanted, found), *_left_its_graphs(case, ours)]


def _compared(case: Case, wanted: Training, found: Training) -> list[str]:
    loose = case.precision == "autocast"
    said = []
    for step, (a, b) in enumerate(zip(wanted.losses, found.losses)):
        if not (abs(a - b) <= (3e-2 if loose else 1e-4) * max(1.0, abs(a)) or (a != a and b != b)):
            said.append(f"loss of step {step}: {a:.6f} / {b:.6f}")
    largest = max((float(g.abs().max()) for g in wanted.gradients.values() if g.numel()), default=0.0)
    for name, a in wanted.gradients.items():
        b = found.gradients.get(name)
        if b is None:
            if a.any():
                said.append(f"no gradient of {name}")
            continue
        gap, size = float((a - b).norm()), float(a.norm())
        if gap > (0.25 if loose else 1e-3) * size + 1e-5 * largest * a.numel() ** 0.5:
            said.append(f"gradient of {name}: {gap / max(size, 1e-30):.1e} of its norm apart")
    if not loose:
        for name, a in wanted.parameters.items():
            step, gap = float((a - wanted.began[name]).norm()), float((a - found.parameters[name]).norm())
            if gap > 2e-2 * step + 1e-6 * float(a.norm()):  # the sign of noise moves a parameter too
                said.append(f"{name} after {STEPS} steps: {gap / max(step, 1e-30):.1e} of its way apart")
    return said


def _left_its_graphs(case: Case, model: Any) -> list[str]:
    if case.form in UNGRAPHED:
        return []
    return [f"left its graph: {path}: {reason}" for (path, reason) in moefx.report(model).fallbacks]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    seeds, wrong = range(args.seed, args.seed + args.cases), 0
    from tests.support import capture_cache

    capture_cache.start()
    for seed in seeds:
        case = Case.drawn(seed, args.ranks)
        if args.ranks > 1:
            from tests.flows.test_first_contact import in_ranks
            from tests.support.spawn import run

            said = next((s[seed] for s in run(in_ranks, args.ranks, [seed], timeout=120) if s[seed]), [])
        else:
            said = differences(case, device=args.device, moved=args.device != "cpu" and seed % 2 == 1)
        wrong += bool(said)
        print(f"{seed} {'WRONG' if said else 'ok':5} {case}", *said[:4], sep="\n    ", flush=True)
    print(f"{len(seeds)} cases, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
