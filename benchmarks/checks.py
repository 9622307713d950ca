"""Is moefx right? Its loss and every gradient against Transformers', and both against Transformers in fp32.

The tolerance is Transformers' own rounding: moefx may be at most :data:`FARTHER` times as far from fp32 as Transformers in
bf16 is.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import common
import routing
import torch
from models import MODELS, mamba_in_torch
from torch import Tensor, nn

FARTHER = 1.5  #: moefx's distance from fp32 over that of Transformers in bf16
#: A distance that rounding the result alone can make (bf16: half a unit in the last place): below it nothing is wrong.
FLOOR = {torch.bfloat16: 2**-8, torch.float32: 1e-4}
#: What the table shows, as far as it was compared: the control only where there are problems.
_COMPARED = ("hf against fp32", "moefx against fp32", "moefx against hf", "control against fp32", "control against hf")


def flipped(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """Per layer, the share of tokens that visit other experts: bf16 ties and near ties go either way."""
    return [float((x.sort(-1).values != y.sort(-1).values).any(-1).float().mean()) for x, y in zip(a, b, strict=True)]


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32: the reference is to be better than what is measured by it."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with mamba_in_torch():
            yield
    finally:
        torch.set_float32_matmul_precision(kept)


def exact_twin(name: str, model: nn.Module) -> nn.Module:
    """A copy of the model in fp32 (each bf16 number is an fp32 number), which computes attention and experts by their definitions."""
    exact: Any = copy.deepcopy(
        model, {id(p): nn.Parameter(p.detach().float(), requires_grad=p.requires_grad) for p in model.parameters()}
    )
    for module in exact.modules():
        for n, b in module.named_buffers(recurse=False):
            module._buffers[n] = b.float() if b.is_floating_point() else b
    exact.set_attn_implementation(MODELS[name].check_attention or MODELS[name].attention)
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")  # the loop over experts: the model's own definition
    return exact.train()


def reference(name: str, balanced: bool, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, dict, list[Tensor]]:
    """Loss, gradients and choices of the same weights computed in fp32."""
    exact = exact_twin(name, model)
    if balanced:
        routing.balance(exact)
    # one sequence at a time, so that fp32 activations fit; all have as many labels, so the mean of losses is the loss
    many, loss, picked = len(batch["input_ids"]), 0.0, []
    with exact_fp32():
        for i in range(many):
            with routing.observed(exact) as seen:
                part = exact(**{n: t[i : i + 1] for n, t in batch.items()}, use_cache=False).loss / many
                part.backward()
            loss += float(part.detach())
            picked.append(list(seen.values()))
    grads = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    common.drop_gradients(exact)
    return loss, grads, [torch.cat(layer) for layer in zip(*picked)]


def check(
    name: str,
    balanced: bool,
    model: nn.Module,
    other: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    graph: bool = False,
    coarser: bool = False,
) -> dict[str, Any]:
    """moefx and Transformers against fp32 on a batch, and against each other: whose rounding is whose.

    Args:
        name: of the model, in ``MODELS``.
        balanced: experts are visited in turn; ``model`` and ``other`` do so already.
        model: Transformers'.
        other: moefx's, with the same parameters.
        batch: input_ids and labels [B, S].
        graph: of moefx, a step that is replayed as a CUDA graph.
        coarser: moefx was asked to round more than Transformers does (FP8): gradients' distances are measured, not judged.
    """
    import moefx

    loss, wanted, picked = reference(name, balanced, model, batch)
    record: dict[str, Any] = {
        "sequences": list(batch["input_ids"].shape),
        "loss": {"fp32": loss},
        "flipped": {},
    }
    far: dict[str, dict[str, float]] = {}
    chosen, found, gaps = {}, {}, {}
    tokens, sizes = batch["input_ids"].numel(), {n: p.numel() for n, p in model.named_parameters()}

    def measure(who: str, run: nn.Module, observed: Any, graph: bool = False) -> None:
        with observed(run) as seen:  # a replay writes the choices into the tensors that the recording left there
            step = common.recorded(run, batch) if graph else run
            record["loss"][who], found[who] = common.gradients(run, step, batch)
        far[who], gaps[who] = common.distances(wanted, found[who]), abs(record["loss"][who] - loss) / abs(loss)
        record[who] = common.spread(far[who])
        # by path, as the reference's are: recorded layer by layer
        chosen[who] = list(seen.values())
        record["flipped"][f"{who} against fp32"] = flipped(picked, chosen[who])

    def judged(who: str) -> dict[str, Any]:
        apart = common.distances(found["hf"], found[who])
        record["flipped"][f"{who} against hf"] = flipped(chosen["hf"], chosen[who])
        record[f"{who} against hf"] = common.spread(apart)
        found_so = judge(
            far["hf"],
            far[who],
            apart,
            gaps["hf"],
            gaps[who],
            sizes=sizes,
            tokens=tokens,
            dtype=model.dtype,
            share=max(record["flipped"][f"{who} against fp32"]),
        )
        if coarser:
            found_so["problems"] = [p for p in found_so["problems"] if not p.startswith("grad ")]
        return found_so

    own = common.twin(model)
    if MODELS[name].check_attention:
        own.set_attn_implementation(MODELS[name].check_attention)
    measure("hf", own, routing.observed)
    measure("moefx", other, moefx.record_routes, graph)
    record |= judged("moefx")
    if record["problems"]:  # they stand, but what does the rule say of Transformers against itself?
        measure("control", one_rounding_off(own), routing.observed)
        record["control_problems"] = judged("control")["problems"]
    record["loss_gap"] = gaps
    return record


def one_rounding_off(model: nn.Module) -> nn.Module:
    """The model with one number in 64 of its embeddings moved to a neighbour: what it computes differs from what the model does
    by roundings, and by what follows from them, such as other experts for near-tied tokens.
    """
    off = common.twin(model)
    table = off.get_input_embeddings()
    moved = table.weight.detach().clone()
    moved.view(-1)[::64] *= 1 + torch.finfo(moved.dtype).eps
    table.weight = nn.Parameter(moved, requires_grad=table.weight.requires_grad)
    return off


def judge(
    hf: Mapping[str, float],
    other: Mapping[str, float],
    apart: Mapping[str, float],
    hf_loss: float,
    other_loss: float,
    *,
    sizes: Mapping[str, int],
    tokens: int,
    share: float,
    dtype: torch.dtype,
    known: float = 0.0,
) -> dict[str, Any]:
    """Whether ``other`` is right, given how far it and Transformers in ``dtype`` are from fp32.

    Args:
        hf, other: by parameter, relative L2 distance of the gradient from fp32.
        apart: by parameter, relative L2 distance of the two from each other.
        hf_loss, other_loss: relative distance of the loss from fp32.
        sizes: numbers in each parameter.
        tokens: of the batch.
        share: of them, those of whose experts ``other`` and fp32 disagree about, in the worst layer.
        known: how far the ratio of two distances may be off by how they were estimated (relative, one standard deviation).

    Returns:
        "ratio" (spread of ``other`` over ``hf``), "floor", "distances" and "problems", one sentence each.
    """
    rounding, problems = FLOOR[dtype], []
    # How many tokens go to another expert is luck where they are few: 0 for one model, 2 for the other. A share f of
    # all tokens is about sqrt(f) of a gradient. From 30 flips on, as below: how far n of them lead varies by 1 / sqrt(2 n).
    flips = share * tokens
    floor = max(rounding, share**0.5 if flips < 30 else 0.0)
    luck = (1 + 2 / flips**0.5 if flips >= 30 else 1.0) * (1 + 2 * known)
    # The length of n random numbers varies by 1 / sqrt(2 n), so the ratio of two by 1 / sqrt(n): luck where n is small.
    few = {n: luck * (1 + 2 / sizes[n] ** 0.5 if sizes[n] < 30 else 1.0) for n in other}
    ratios = {n: other[n] / max(hf[n], floor) / few[n] for n in other}
    for n, r in ratios.items():
        if not r <= FARTHER:
            problems.append(f"grad {n}: {other[n]:.2e} from fp32, Transformers {hf[n]:.2e}: {r:.2f} times, {FARTHER} allowed")
    for n, d in apart.items():
        # two that are a and at most 1.5 a from the truth are at most 2.5 a from each other
        allowed = (1 + FARTHER) * few[n] * max(hf[n], floor)
        if not d <= allowed:
            problems.append(f"grad {n}: {d:.2e} from Transformers', {allowed:.2e} allowed")
    # a mean over many tokens, whose roundings cancel by luck: so the floor is what one rounding of bf16 makes
    if not other_loss <= max(FARTHER * hf_loss, rounding):
        problems.append(f"loss: {other_loss:.1e} from fp32, Transformers {hf_loss:.1e}")
    return {
        "ratio": common.spread(ratios),
        "floor": floor,
        "distances": {n: [hf[n], other[n]] for n in other},
        "problems": problems,
    }


def show(depths: Sequence[Mapping[str, Any]]) -> None:
    """Gradients' distances and flipped choices, one table."""
    rows = []
    for d in depths:
        for name, c in d["checks"].items():
            for who in (w for w in _COMPARED if w in c["flipped"]):
                found = c[who] if who in c else c[who.split()[0]]
                gap = c["loss_gap"].get(who.split()[0]) if who.endswith("fp32") else None
                gap = abs(c["loss"][who.split()[0]] - c["loss"]["hf"]) / abs(c["loss"]["hf"]) if gap is None else gap
                share = statistics.fmean(c["flipped"][who])
                rows.append(
                    (
                        d["layers"],
                        name,
                        who,
                        f"{gap:.1e}",
                        f"{found['max']:.1e}",
                        f"{found['mean']:.1e}",
                        found["worst"].removeprefix("base_model.model.").removeprefix("model."),
                        f"{share:.2%}",
                    )
                )
    columns = ("layers", "batch", "who", "loss", "grad max", "mean", "worst", "other experts")
    common.show("relative distance of the loss and of all gradients (L2)", columns, rows)
