"""A seeded generator of LoRA trainings, from the first step to the merged checkpoint, each compared with plain Transformers and PEFT.

    python tests/flows/lora.py --cases 40             # one process
    python tests/flows/lora.py --cases 20 --ranks 2   # expert parallelism with DDP, and parallelize

A case is a family x what gets adapters (linears, shared experts, the router, experts' parameters, "all-linear") x ranks and alphas,
rsLoRA, dropout, `modules_to_save` x a second adapter x the order of `get_peft_model` and `optimize` x how it is spread. It trains
three steps, of which the second may follow a merge and an unmerge; switches, disables, saves, loads, merges, unmerges and unloads
the adapters. Losses and gradients must be PEFT's up to rounding; saved adapters, merged weights and saved checkpoints must be
PEFT's to the bit. A case that fails is printed as the Python that makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import moefx
from moefx.integrations.transformers.tiny_config import tiny_config
from tests.support.families import FAMILIES, batch, build

STEPS = 3
#: Families whose experts are no module of Transformers' usual kind: their weights are stacked rows, or those of a Python loop.
LOOPS = ("dbrx", "jetmoe", "longcat_flash")
#: Modules of single experts in older versions of Transformers, and families for which PEFT takes them for the fused parameters.
FORMER = ("down_proj", "gate_proj", "up_proj")
FORMERLY = ("qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "longcat_flash")
#: The second adapter's name; PEFT calls the first one "default".
SECOND = "second"


# --- a case ----------------------------------------------------------------------------------------------------------


def model_of(family: str) -> Any:
    """Small, with weights that differ from family to family alone."""
    if family not in LOOPS:
        return build(family)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family)).train()


@dataclass(frozen=True)
class Anatomy:
    """What of a family's model can get adapters, by the names that PEFT takes."""

    linears: tuple[str, ...]
    shared: tuple[str, ...]  #: linears of shared experts
    experts: tuple[str, ...]  #: parameters
    router_linears: tuple[str, ...]
    router_parameters: tuple[str, ...]


@functools.cache
def anatomy(family: str) -> Anatomy:
    model = model_of(family)
    mamba = {"out_proj"} if family == "nemotron_h" else set()  # PEFT refuses it
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear and n.rpartition(".")[2] not in {"lm_head", *mamba}}
    routers = {n for n in linears if n.rpartition(".")[2] in ("router", "gate") or n.endswith("router.proj")}
    shared = {n for n in linears if "shared_expert" in n}
    others = {
        n: p
        for n, p in model.named_parameters()
        if not isinstance(model.get_submodule(n.rpartition(".")[0]), (nn.Linear, nn.Embedding, nn.Conv1d)) and p.dim() > 1
    }
    of_routers = {n for n in others if "router" in n or "gate.weight" in n}

    def ends(names: set[str], many: int) -> tuple[str, ...]:
        return tuple(sorted({".".join(n.split(".")[-many:]) for n in names}))

    return Anatomy(
        ends(linears - routers - shared, 1),
        ends(shared, 2),
        # DBRX reads its experts' weights as attributes of a module, where PEFT puts a wrapper without them
        ends({n for n in others if n not in of_routers and "bias" not in n and family != "dbrx"}, 2),
        ends(routers, 2),
        ends(of_routers, 2),
    )


@dataclass(frozen=True)
class Case:
    family: str = "qwen3_moe"
    modules: tuple[str, ...] | str = ()  #: PEFT's ``target_modules``
    parameters: tuple[str, ...] = ()  #: PEFT's ``target_parameters``
    rank: int = 3
    alpha: int = 6
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, int], ...] = ()
    rslora: bool = False
    dropout: float = 0.0
    saved: str = ""  #: of PEFT's ``modules_to_save``
    second: tuple[str, ...] | str | None = None  #: ``target_modules`` of a second adapter; None: there is none
    optimized: str = "with adapters"  #: or "without", or "after a step"
    merged_between: bool = False  #: merged and unmerged after the first step
    safe: bool = False  #: PEFT's ``safe_merge``
    spread: str = ""  #: "ddp": experts over ranks, DDP for the rest; "parallelize"
    ep: int = 1  #: ``ep_size``

    def __str__(self) -> str:
        return "Case(" + ", ".join(f"{k}={v!r}" for k, v in asdict(self).items() if v != getattr(Case(), k)) + ")"

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.modules if isinstance(self.modules, str) else [*self.modules],
            target_parameters=[*self.parameters],
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            modules_to_save=[self.saved] if self.saved else None,
        )

    @property
    def second_config(self) -> LoraConfig:
        modules = self.second if isinstance(self.second, str) else [*(self.second or ())]
        return LoraConfig(r=2, lora_alpha=9, target_modules=modules, target_parameters=[*self.parameters])

    @staticmethod
    def drawn(seed: int, ranks: int = 1) -> Case:
        r = random.Random(seed)
        family = r.choice([*FAMILIES] if ranks > 1 else [*FAMILIES, *FAMILIES, *LOOPS])
        of = anatomy(family)

        def some(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(sorted(r.sample(names, r.randint(1, len(names))))) if names else ()

        modules: tuple[str, ...] | str = ()
        parameters: tuple[str, ...] = ()
        kinds = ("experts", "linears", "linears experts", "linears experts", "shared", "router", "former", "all", "all-linear")
        kind = r.choice(kinds)
        if kind == "all-linear" and family not in (
            "nemotron_h",
            "llama4_text",
        ):  # PEFT refuses out_proj; Llama4Router gives a tuple
            modules = kind
        else:
            for part in ("experts linears shared router" if kind == "all" else kind).split():
                parameters += {"experts": some(of.experts), "router": of.router_parameters}.get(part, ())
                modules += {
                    "linears": some(of.linears),
                    "shared": some(of.shared),
                    "router": of.router_linears,
                    "former": FORMER if family in FORMERLY else (),
                }.get(part, ())
            modules = _together(modules or (() if parameters else some(of.linears)), of)
        fused = {m for m in (FORMER if isinstance(modules, str) else modules) if _is_fused(m, family)}
        named = () if isinstance(modules, str) else (*modules, *parameters)
        other: tuple[str, ...] | str = modules
        if not isinstance(modules, str):  # all adapters must be on the same parameters
            other = tuple(sorted(fused.union(m for m in some(of.linears) if not _is_fused(m, family))))
        second = r.choice((None, None, modules, other if parameters or fused or other else modules))
        spread = r.choice(("ddp", "parallelize", "parallelize")) if ranks > 1 else ""
        return Case(
            family,
            modules,
            parameters,
            rank=r.choice((1, 2, 3, 4)),
            alpha=r.choice((2, 4, 6, 8)),
            rank_pattern=((r.choice(named), 5),) if named and r.random() < 0.3 else (),
            alpha_pattern=((r.choice((*named, r"layers\.1\..*")), 16),) if named and r.random() < 0.3 else (),
            rslora=r.random() < 0.3,
            dropout=0.2 if not parameters and not fused and r.random() < 0.5 else 0.0,
            saved=r.choice(("", "", "", "lm_head", "embed_tokens", "lm_head" if family in LOOPS else "norm")),
            second=second,
            optimized=r.choice(("with adapters", "with adapters", "without", "after a step"))
            if ranks == 1
            else "with adapters",
            merged_between=r.random() < 0.3,
            safe=r.random() < 0.3,
            spread=spread,
            ep=ranks if spread == "ddp" else r.choice([n for n in (1, 2, 4) if n <= ranks]),
        )


def _is_fused(module: str, family: str) -> bool:
    return family in FORMERLY and module.rpartition(".")[2] in FORMER


def _together(modules: tuple[str, ...], of: Anatomy) -> tuple[str, ...]:
    """With gate_proj where up_proj is and the reverse: PEFT takes them for experts' fused weights, both or neither."""
    pairs = {m: m.replace("gate_proj", "up_proj") for m in (*of.linears, *of.shared) if m.endswith("gate_proj")}
    return tuple(sorted({*modules, *(m for pair in pairs.items() if {*pair} & {*modules} for m in pair)}))


# --- two models ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Of a case."""

    differences: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)  #: what raises with moefx and without


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random factors: PEFT begins with zeros, whose update is none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def adapted(case: Case, base: Any = None) -> Any:
    model = get_peft_model(model_of(case.family) if base is None else base, case.config)
    if case.second is not None:
        model.add_adapter(SECOND, case.second_config)
    fill(model)
    return model


def optimized(case: Case, model: Any) -> Any:
    if case.spread == "ddp":
        return moefx.optimize(model, ep_size=case.ep, compile=False)
    if case.spread:
        return moefx.parallelize(model, ep_size=case.ep, compile=False, lost_after=0)
    return moefx.optimize(model, compile=False)


def plain_model(case: Case) -> Any:
    model = adapted(case)
    if case.optimized == "after a step":
        model(**batch(2, 5), use_cache=False).loss.backward()
        model.zero_grad()
    return model


def our_model(case: Case) -> Any:
    if case.optimized == "without":
        return adapted(case, optimized(case, model_of(case.family)))
    return optimized(case, plain_model(case))


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes, by file and name; every rank calls it."""
    model.save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    return {f"{f.relative_to(folder)}: {n}": t for f in sorted(folder.rglob("*.safetensors")) for n, t in load_file(f).items()}


class Pair:
    """The model with moefx and the one without, and how they differ."""

    def __init__(self, case: Case, rank: int, ranks: int, folder: Path):
        self.case, self.rank, self.ranks, self.folder = case, rank, ranks, folder
        self.outcome = Outcome()
        self.plain = self.ours = self.called = None

    def say(self, what: str) -> None:
        self.outcome.differences.append(what if self.ranks == 1 else f"rank {self.rank}: {what}")

    def both(self, what: str, plain: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Of two calls their results; None where both raise, or only one, which is a difference."""
        found, errors = [], []
        for call in (plain, ours):
            try:
                found.append(call())
                errors.append(None)
            except Exception as error:
                errors.append(error)
        if None not in errors:
            self.outcome.raised.append(f"{what}: {type(errors[0]).__name__}: {errors[0]}"[:300])
        if (errors[0] is None) != (errors[1] is None):
            without, ours_said = (f"{type(e).__name__}: {e}"[:300] if e else "nothing" for e in errors)
            self.say(f"{what} raises {ours_said}; without moefx {without}")
        return (found[0], found[1]) if len(found) == 2 else None

    def do(self, what: str, call: Callable[[Any], Any]) -> None:
        """The same on both models; a call that returns a model replaces it."""
        found = self.both(what, lambda: call(self.plain), lambda: call(self.ours))
        if found and isinstance(found[0], nn.Module):
            self.plain, self.ours = found
            self.called = self.ours

    # --- comparisons

    def same(self, what: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """To the bit."""
        if wanted.keys() != found.keys():
            self.say(f"{what}: names {sorted(wanted.keys() ^ found.keys())[:4]} on one side only")
        for name in wanted.keys() & found.keys():
            a, b = wanted[name], found[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                self.say(f"{what}: {name} {tuple(a.shape)} {a.dtype} / {tuple(b.shape)} {b.dtype}")
            elif not torch.equal(a, b):
                self.say(f"{what}: {name} differs by {float((a.double() - b.double()).abs().max()):.1e}")

    def weights(self, what: str) -> None:
        self.same(f"weights {what}", *({n: whole(p) for n, p in m.named_parameters()} for m in (self.plain, self.ours)))

    def near(self, what: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], scale: float = 0.0) -> None:
        """Up to rounding, which for gradients is relative to the largest of all, ``scale``."""
        for name in dict.fromkeys((*wanted, *found)):
            a, b = wanted.get(name), found.get(name)
            if a is None or b is None:
                if (a if b is None else b).any():  # zeros may stand for no gradient
                    self.say(f"{what}: {name} on one side only")
                continue
            gap, size = float((a.double() - b.double()).norm()), float(a.double().norm())
            if not gap <= 1e-3 * size * (0.1 if scale == 0 else 1) + 1e-5 * scale * a.numel() ** 0.5:
                self.say(f"{what}: {name} is {gap / max(size, 1e-30):.1e} of its norm apart")

    def probe(self, what: str, seed: int = 1, gradients: bool = True) -> None:
        """A step without an optimizer on both. With DDP gradients exist for the adapters alone that it was made for."""
        gradients = gradients and (self.case.spread != "ddp" or self.called is not self.ours)
        found = self.both(
            what, lambda: self._step(self.plain, seed, gradients, True), lambda: self._step(self.called, seed, gradients)
        )
        if not found:
            return
        (outputs, expected), (ours, got) = found
        self.near(what, outputs, ours)
        scale = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
        self.near(f"{what}, gradients", expected, got, max(scale, 1e-3))

    def _step(self, model: Any, seed: int, gradients: bool, plain: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs of this rank's batch; gradients of the mean over all ranks' batches."""
        model.zero_grad()
        outputs = {}
        for rank in range(self.ranks) if plain else [self.rank]:
            torch.manual_seed(2)
            with torch.set_grad_enabled(gradients):
                out = model(**batch(2, 9, seed=10 * seed + rank), use_cache=False)
            if rank == self.rank:
                outputs = {"loss": out.loss.detach(), "logits": out.logits.detach()}
            if gradients and out.loss.requires_grad:
                (out.loss / self.ranks if plain else out.loss).backward()
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        return outputs, {n: whole(p.grad) for n, p in inner.named_parameters() if p.grad is not None}

    def in_its_graphs(self, what: str) -> None:
        if self.case.optimized != "without":  # adapters that come later leave the graphs: docs/guides/lora.md
            for path, reason in moefx.report(self.ours).fallbacks:
                self.say(f"{what}: left its graph: {path}: {reason}"[:300])

    @torch.no_grad()
    def follow(self) -> None:
        """Gives the plain model the weights of the other: from here on they can be equal to the bit."""
        found = {n: whole(p) for n, p in self.ours.named_parameters()}
        for name, p in self.plain.named_parameters():
            p.copy_(found[name])

    # --- what people do

    def build(self) -> bool:
        """False where both refuse."""
        found = self.both("get_peft_model and optimize", lambda: plain_model(self.case), lambda: our_model(self.case))
        if not found:
            return False
        self.plain, self.ours = found
        if self.ranks > 1 and self.case.dropout:  # each rank draws numbers of its own
            self.plain.eval()
            self.ours.eval()
        self.called = DistributedDataParallel(self.ours) if self.case.spread == "ddp" else self.ours
        return True

    def train(self) -> None:
        trained = [[p for p in m.parameters() if p.requires_grad] for m in (self.plain, self.ours)]
        optimizers = [torch.optim.AdamW(ps, lr=1e-2, eps=1e-3) for ps in trained]
        for step in range(STEPS):
            self.probe(f"step {step}", step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step == 0 and self.case.merged_between:
                self.merge("between steps")
                self.unmerge("between steps")
            wanted, found = ({n: whole(p) for n, p in m.named_parameters()} for m in (self.plain, self.ours))
            self.near(f"weights after step {step}", wanted, found, 0.1)
            self.follow()  # else rounding grows from step to step
        self.in_its_graphs("after training")
        self.called = self.ours  # DDP is for training

    def merge(self, what: str) -> None:
        self.do(f"merging {what}", lambda m: m.merge_adapter(safe_merge=self.case.safe))
        self.probe(f"merged {what}", gradients=False)

    def unmerge(self, what: str) -> None:
        self.do(f"unmerging {what}", lambda m: m.unmerge_adapter())
        self.probe(f"unmerged {what}", gradients=False)

    def switch(self) -> None:
        if self.case.second is not None:
            for names in (SECOND, ["default", SECOND], "default"):
                self.do(f"set_adapter({names})", lambda m: m.base_model.set_adapter(names))  # noqa: B023
                self.probe(f"with {names}")
        with self.plain.disable_adapter(), self.ours.disable_adapter():
            self.probe("disabled", gradients=False)
        self.probe("enabled again")

    def save_and_load(self) -> None:
        """The adapter that each writes, read by the other."""
        files = [self.folder / n for n in ("plain", "ours")]
        if self.rank == 0:
            self.plain.save_pretrained(files[0])
        if found := self.both("save_pretrained", lambda: None, lambda: saved(self.ours, files[1])):
            written = {
                f"{f.relative_to(files[0])}: {n}": t
                for f in sorted(files[0].rglob("*.safetensors"))
                for n, t in load_file(f).items()
            }
            self.same("the saved adapter", written, found[1])
        mode = self.ours.training

        def loaded(folder: Path, ours: bool, first: bool) -> Any:
            base = model_of(self.case.family)
            if ours and first:
                base = optimized(self.case, base)
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
            if self.case.second is not None:
                model.load_adapter(folder / SECOND, SECOND)
                model.base_model.set_adapter(["default", SECOND])
            return (optimized(self.case, model) if ours and not first else model).train(mode)

        kept = self.plain, self.ours, self.called
        if pair := self.both(
            "loading the adapters",
            lambda: loaded(files[1], False, False),
            lambda: loaded(files[0], True, self.case.optimized == "without"),
        ):
            self.plain, self.ours = pair
            self.called = self.ours
            self.weights("loaded")
            self.probe("loaded")
            self.in_its_graphs("loaded")
        self.plain, self.ours, self.called = kept

    def merge_and_unmerge(self) -> None:
        if self.case.second is not None:
            self.do("set_adapter of both", lambda m: m.base_model.set_adapter(["default", SECOND]))
        self.merge("at the end")
        self.weights("merged")
        self.unmerge("at the end")
        self.weights("unmerged")

    def unload(self) -> None:
        """To a model without adapters, which is saved as Transformers saves it and trained further."""
        self.do("merge_and_unload", lambda m: m.merge_and_unload(safe_merge=self.case.safe))
        self.weights("unloaded")
        self.probe("unloaded", gradients=False)
        found = self.both(
            "saving the merged model",
            lambda: saved(self.plain, self.folder / f"merged {self.rank}"),
            lambda: saved(self.ours, self.folder / "merged"),
        )
        if found and self.rank == 0:  # Transformers writes on the first rank alone
            self.same("the merged checkpoint", *found)
        if self.ranks == 1:
            again = type(self.plain).from_pretrained(self.folder / "merged").train()
            with torch.no_grad():
                a, b = ({"logits": m(**batch(2, 9), use_cache=False).logits} for m in (self.plain, again))
            self.near("the merged checkpoint, loaded", a, b)
            for m in (self.plain, self.ours):
                m.requires_grad_(True)
            self.probe("trained further")


@contextlib.contextmanager
def _folder(ranks: int) -> Iterator[Path]:
    """One for all ranks."""
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        if ranks > 1:
            dist.broadcast_object_list(name)
        yield Path(name[0])
        if ranks > 1:
            dist.barrier()


PARTS = ("train", "switch", "save_and_load", "merge_and_unmerge", "unload")


def outcome(case: Case, rank: int = 0, ranks: int = 1, parts: Sequence[str] = PARTS) -> Outcome:
    """What is not as it is without moefx; over ranks every rank calls it."""
    with warnings.catch_warnings(), _folder(ranks) as folder:
        warnings.simplefilter("ignore")
        pair = Pair(case, rank, ranks, folder)
        if pair.build():
            for part in parts:
                getattr(pair, part)()
                if pair.outcome.differences and ranks == 1:  # what follows differs too
                    break
    return pair.outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    seeds, wrong, raised = range(args.seed, args.seed + args.cases), 0, 0
    from tests.flows.test_lora import across
    from tests.support import capture_cache

    capture_cache.start()
    for seed in seeds:
        case = Case.drawn(seed, args.ranks)
        try:
            found = across(case, args.ranks) if args.ranks > 1 else outcome(case)
        except Exception as error:
            found = Outcome([f"{type(error).__name__}: {error}"])
        wrong, raised = wrong + bool(found.differences), raised + bool(found.raised)
        word = "WRONG" if found.differences else "raise" if found.raised else "ok"
        print(f"{seed} {word:5} {case}", *found.differences[:4], *found.raised, sep="\n    ", flush=True)
    print(f"{len(seeds)} cases, {wrong} wrong, in {raised} something raises without moefx too")
    return int(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
