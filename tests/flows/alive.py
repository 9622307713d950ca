"""A random walk over what users do to a model: after each action, moefx and the untouched model must agree.

    python -m tests.flows.alive --seeds 0:100                              # all families, ten actions each
    python -m tests.flows.alive --seeds 7 --families gpt_oss mixtral --actions 5
    python -m tests.flows.alive --seeds 0:500 --only attribute hook lora   # of these actions

A walk draws actions of alive_actions.py from its seed, and applies them to an optimized model and to another one with the same
weights. After each action a probe batch runs on both: loss, outputs and all gradients must agree, and so must what hooks and
reads have seen since. Where the untouched model raises, the optimized one must raise an error of the same kind. A failing walk
is shrunk, and printed as a script of plain PyTorch, Transformers and PEFT. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import random
import re
import sys
import textwrap
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import moefx
from moefx.internals.subclass import own_class
from tests.flows import alive_helpers
from tests.flows.alive_actions import ACTIONS, Anatomy, anatomy, sizes
from tests.support.families import FAMILIES

# --- a walk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One action and its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        return ACTIONS[self.name].code(**self.arguments).strip() + "\n"


@dataclass(frozen=True)
class Walk:
    """A family's model, and what is done to it; the step "optimized" is among them."""

    family: str
    steps: tuple[Step, ...]

    def in_fp32(self) -> Walk:
        """The same without 16 bits."""
        steps = [Step(s.name, {n: _in_fp32(x) for n, x in s.arguments.items()}) for s in self.steps]
        return Walk(self.family, tuple(Step("autocast", {"on": False}) if s.name == "autocast" else s for s in steps))

    @staticmethod
    def drawn(seed: int, actions: int, families: Sequence[str], names: Iterable[str]) -> Walk:
        """The walk of a seed. Some actions come before ``optimize``."""
        r = random.Random(seed)
        family = r.choice(list(families))
        before, state = min(r.choice((0, 0, 0, 1, 2)), actions), set[str]()
        steps = []
        for n in range(actions + 1):
            if n == before:
                steps.append(Step("optimized"))
                state.add("optimized")
                continue
            steps.append(_drawn(r, anatomy(family), [ACTIONS[name] for name in names], state))
        return Walk(family, tuple(steps))


def _in_fp32(value: Any) -> Any:
    return "float32" if value == "bfloat16" else value


def _drawn(r: random.Random, of: Anatomy, actions: list[Any], state: set[str]) -> Step:
    possible = []
    for a in actions:
        choices = a.values(of)
        if set(a.needs.split()) <= state and state.isdisjoint(a.unless.split()) and all(choices.values()):
            possible.append((a, choices))
    action, choices = r.choices(possible, [a.weight for a, _ in possible])[0]
    state |= set(action.gives.split())
    state -= set(action.takes.split())
    return Step(action.name, {k: r.choice(v) for k, v in choices.items()})


@dataclass
class Outcome:
    """What was seen after one step."""

    error: Exception | None = None  #: of the action
    probe_error: Exception | None = None
    found: dict[str, Tensor] = field(default_factory=dict)  #: by the probe
    seen: list[tuple[str, Any]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    autocast: bool = False  #: around the probe
    loose: bool = False  #: something is computed in 16 bits


class Refused(Exception):
    """``optimize`` does not take the model, and says so."""


def play(walk: Walk, optimize: Callable, restore: Callable) -> Iterator[tuple[Outcome, Any]]:
    """Applies the steps to a new model; yields what was seen after each, and the model.

    Raises:
        Refused: ``optimize`` raised MoefxError.
    """
    alive_helpers.SEEN.clear()
    with contextlib.ExitStack() as undo:
        names = {name: getattr(alive_helpers, name) for name in alive_helpers.__all__}
        model = alive_helpers.fresh(walk.family, **sizes(walk.family))
        names |= {"model": model, "optimize": optimize, "restore": restore, "probing": {}, "handles": [], "undo": undo}
        optimized = False
        for step in walk.steps:
            begun, outcome = len(alive_helpers.SEEN), Outcome()
            torch.manual_seed(3)
            try:
                exec(compile(step.code, step.name, "exec"), names)
            except Refused:
                raise
            except Exception as error:
                outcome.error = error.with_traceback(None)
            if "optimize(" in step.code:
                begun = len(alive_helpers.SEEN)  # it runs an example, and hooks with it
            model, probing = names["model"], names["probing"]
            optimized = optimized or step.name == "optimized"
            if optimized:
                try:
                    outcome.found = alive_helpers.probe(model, **probing)
                except Exception as error:
                    outcome.probe_error = error.with_traceback(None)
            outcome.seen = alive_helpers.SEEN[begun:]
            outcome.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
            wide = (torch.float32, torch.float64)
            outcome.autocast = probing.get("autocast", False)
            outcome.loose = outcome.autocast or any(p.dtype not in wide for p in model.parameters())
            yield outcome, model


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """The first difference of a walk."""

    step: int
    kind: str
    text: str
    loose: bool = False  #: numbers differ where something is computed in 16 bits


def _same_kind(a: Exception, b: Exception) -> bool:
    """Of a model that is broken: one operation or another fails first. An error of moefx's own must be of the same class."""
    return not isinstance(b, moefx.MoefxError) or isinstance(b, type(a))


def _said(error: Exception | None) -> str:
    return "nothing" if error is None else f"{type(error).__name__}: {error}"[:400]


def _apart(a: Any, b: Any, loose: bool, scale: float = 0.0) -> str | None:
    """How two values differ; None if they do not. ``scale``: of all gradients, since rounding of a sum is relative to it."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(a.shape)} {a.dtype} / {tuple(b.shape)} {b.dtype}"
        if not a.is_floating_point():
            return None if loose or torch.equal(a, b) else f"{a.tolist()} / {b.tolist()}"
        x, y = a.detach().double(), b.detach().double()
        gap, size = float((x - y).norm()), float(x.norm())
        near = 0.3 if loose and x.numel() > 1 else 3e-2 if loose else 1e-3 if x.numel() > 1 else 2e-5
        if gap <= near * size + (1e-2 if loose else 1e-5) * scale * x.numel() ** 0.5 + 3e-6:
            return None
        if x.isnan().any() and torch.equal(x.isnan(), y.isnan()):
            return None
        return (
            f"{float(x):.7f} / {float(y):.7f}"
            if x.numel() == 1
            else f"norm {size:.6f} / {float(y.norm()):.6f}, apart by {gap:.2e}"
        )
    if isinstance(a, float) and isinstance(b, float):
        near = abs(a - b) <= (0.3 if loose else 2e-3) * abs(a) + (1e-2 if loose else 1e-5)
        return None if near or (a != a and b != b) else f"{a} / {b}"
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next((said for x, y in zip(a, b) if (said := _apart(x, y, loose))), None)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return "not without moefx" if a is None else "only without moefx" if b is None else "a tensor on one side only"
    return None if a == b else f"{a} / {b}"


def _together(outcome: Outcome) -> Outcome:
    """With all gradients as one vector: in 16 bits a router's near tie moves a token, and with it a small gradient, far."""
    gradients = [g.flatten().float() for n, g in outcome.found.items() if n.startswith("gradient")]
    rest = {n: x for n, x in outcome.found.items() if not n.startswith("gradient")}
    return replace(outcome, found=rest | ({"gradient": torch.cat(gradients)} if gradients else {}))


def compared(step: int, wanted: Outcome, found: Outcome) -> Failure | None:
    """The first difference of what was seen after a step."""
    for what, a, b in (("action", wanted.error, found.error), ("probe", wanted.probe_error, found.probe_error)):
        if (a is None) != (b is None) or (a is not None and b is not None and not _same_kind(a, b)):
            kind = f"{what} raises {type(b or a).__name__}"
            return Failure(step, kind, f"the {what} raises {_said(b)}; without moefx {_said(a)}")
    for name in dict.fromkeys((*wanted.parameters, *found.parameters)):
        said = _apart(wanted.parameters.get(name), found.parameters.get(name), wanted.loose)
        if said:
            return Failure(step, "parameter", f"parameter {name}: {said}")
    names, others = [n for n, _ in wanted.seen], [n for n, _ in found.seen]
    if names != others:
        missing = Counter(names) - Counter(others)
        more = Counter(others) - Counter(names)
        return Failure(
            step, "seen", f"hooks and reads: missing {dict(missing)}, more {dict(more)}, of {len(names)} / {len(others)}"
        )
    for (name, a), (_, b) in zip(wanted.seen, found.seen):
        said = _apart(a, b, wanted.loose)
        if said:
            return Failure(step, "value", f"{name}: {said}")
    if wanted.loose and wanted.found.keys() == found.found.keys():
        wanted, found = _together(wanted), _together(found)
    scale = max((float(g.abs().max()) for n, g in wanted.found.items() if n.startswith("gradient") and g.numel()), default=0.0)
    for name in dict.fromkeys((*wanted.found, *found.found)):
        said = _apart(
            wanted.found.get(name), found.found.get(name), wanted.loose, scale if name.startswith("gradient") else 0.0
        )
        if said:
            return Failure(
                step, "loss" if name == "loss" else "gradient" if "gradient" in name else "output", f"{name}: {said}"
            )
    return None


#: Errors without moefx that end a walk where moefx has none: there is nothing to compare with.
_LIMITS = (
    "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double",  # torch's grouped products have no float64
    "Cannot get conv state for non linear attention layer",  # of a cache that moefx leaves out of training steps
    "has been modified by an inplace operation",  # captured graphs are functional
)


@torch.no_grad()
def _follow(model: Any, parameters: dict[str, Tensor]) -> None:
    """Gives a model the weights of the other: rounding grows over the steps of a walk, until a router chooses otherwise."""
    for name, p in model.named_parameters():
        if not torch.equal(p, parameters[name]):
            p.copy_(parameters[name])


@dataclass
class Result:
    """Of a walk: the failure, if there is one; which steps raised on both sides; why ``optimize`` refused, if it did."""

    failure: Failure | None = None
    raised: dict[int, str] = field(default_factory=dict)
    refused: str = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _same(model: Any) -> Any:
    return model


def _ours(model: Any, **options: Any) -> Any:
    try:
        return moefx.optimize(model, **options)
    except moefx.MoefxError as error:
        raise Refused(str(error)) from error


def result(walk: Walk, compile: bool = False) -> Result:
    """Plays a walk on both sides.

    Where something is computed in 16 bits, a router's near tie sends a token elsewhere, and everything differs: such a failure
    counts if the walk fails in fp32 too.
    """
    found = _result(walk, compile)
    if found.failure and found.failure.loose and walk != walk.in_fp32():
        return replace(found, failure=_result(walk.in_fp32(), compile).failure)
    return found


def _result(walk: Walk, compile: bool) -> Result:
    found = Result()
    with _quiet():
        wanted = [outcome for outcome, _ in play(walk, _same, _same)]
        ours = play(walk, functools.partial(_ours, compile=compile), moefx.restore)
        played = 0
        with contextlib.closing(ours):
            try:
                for n, (a, (b, model)) in enumerate(zip(wanted, ours)):
                    played = n + 1
                    for error, of_ours in ((a.error, b.error), (a.probe_error, b.probe_error)):
                        if of_ours is None and any(limit in _said(error) for limit in _LIMITS):
                            found.raised[n] = _said(error)
                            return found
                    if a.error:
                        found.raised[n] = _said(a.error)
                    found.failure = compared(n, a, b)
                    if found.failure:
                        numbers = found.failure.kind in ("parameter", "value", "loss", "gradient", "output")
                        found.failure = replace(found.failure, loose=a.loose and numbers)
                        return found
                    _follow(model, a.parameters)
            except Refused as refusal:
                found.refused = str(refusal)
                there = wanted[played]
                if not (there.error or there.probe_error or there.autocast):  # optimize is called outside of autocast
                    found.failure = Failure(played, "refusal", f"the model runs, and optimize refuses it: {refusal}")
    return found


# --- shrinking -------------------------------------------------------------------------------------------------------


def shrunk(walk: Walk, failure: Failure, fails: Callable[[Walk], Failure | None]) -> tuple[Walk, Failure]:
    """A smaller walk that fails in the same way: without actions that do not matter, with simpler arguments."""

    def still(smaller: Walk) -> bool:
        nonlocal walk, failure
        found = fails(smaller)
        if found is None or found.kind != failure.kind:
            return False
        walk, failure = replace(smaller, steps=smaller.steps[: found.step + 1]), found
        return True

    walk = replace(walk, steps=walk.steps[: failure.step + 1])
    smaller = True
    while smaller:
        smaller = False
        for n in reversed(range(len(walk.steps))):
            if n < len(walk.steps) and walk.steps[n].name != "optimized":
                smaller |= still(replace(walk, steps=walk.steps[:n] + walk.steps[n + 1 :]))
    for n in range(len(walk.steps)):
        for name, choices in ACTIONS[walk.steps[n].name].values(anatomy(walk.family)).items() if n < len(walk.steps) else ():
            for choice in choices:
                if n >= len(walk.steps) or choice == walk.steps[n].arguments[name]:
                    break
                step = Step(walk.steps[n].name, {**walk.steps[n].arguments, name: choice})
                if still(replace(walk, steps=(*walk.steps[:n], step, *walk.steps[n + 1 :]))):
                    break
    return walk, failure


# --- scripts ---------------------------------------------------------------------------------------------------------

_MAIN = """
def walk(optimize, restore):
    SEEN.clear()
    model, probing, handles = fresh({family!r}, **SIZES), {{}}, []
    with contextlib.ExitStack() as undo:
{steps}

wanted = list(walk(lambda m: m, lambda m: m))
for step, found in enumerate(walk(lambda m: moefx.optimize(m, compile=False), moefx.restore)):
    for name in {{**wanted[step], **found}}:
        a, b = wanted[step].get(name), found.get(name)
        print(step, name, *(x if not isinstance(x, torch.Tensor) else float(x.double().norm()) for x in (a, b)))
"""


def script(walk: Walk, failure: Failure, raised: Iterable[int] = ()) -> str:
    """The walk as a program that needs moefx, PyTorch, Transformers and PEFT only."""
    lines, optimized = [], False
    for n, step in enumerate(walk.steps):
        code = step.code
        if n in raised:
            code = "with contextlib.suppress(Exception):  # raises without moefx too\n" + textwrap.indent(code, "    ")
        optimized = optimized or step.name == "optimized"
        code += "yield {**probe(model, **probing), 'seen': list(SEEN)}\n" if optimized else ""
        lines.append(code)
    body = f"SIZES = {sizes(walk.family)!r}\n" + _MAIN.format(
        family=walk.family, steps=textwrap.indent("\n".join(lines), " " * 8)
    )
    return f"# {walk.family}, after step {failure.step}: {failure.text}\n{_helpers(body)}\n{body}"


def _helpers(body: str) -> str:
    """The imports and functions of alive_helpers.py that ``body`` uses."""
    source = Path(inspect.getsourcefile(alive_helpers) or "").read_text()
    parts: dict[str, str] = {}  # in the order in which they stand there
    imports: dict[str, str] = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parts[node.name] = text
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parts[node.target.id] = text
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            origin = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            imports |= {a.name: f"{origin}import {a.name}" for a in node.names}
    used, todo = set(), [body]
    while todo:
        words = set(re.findall(r"\w+", todo.pop()))
        todo += [parts[name] for name in parts if name in words - used]
        used |= words
    chosen = [text for name, text in parts.items() if name in used]
    needed = [line for name, line in imports.items() if name in used]
    return "\n".join(["from __future__ import annotations", "", *needed, "", "import moefx", "", *(f"{t}\n\n" for t in chosen)])


# --- a cache of captures ---------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """A value that the cache does not compare."""


def state_of(module: nn.Module) -> Hashable | None:
    """A key of all that the capture of ``module`` could read; None if there is something that it does not know."""
    plain = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
    everywhere = nn.modules.module
    if any(vars(everywhere)[f"_global_{k}_hooks"] for k in ("forward", "forward_pre", "backward", "backward_pre")):
        return None
    try:
        return plain, tuple((path, _state(m)) for path, m in module.named_modules(remove_duplicate=False))
    except _Unknown:
        return None


def _state(m: nn.Module) -> Hashable:
    cls = own_class(type(m))
    hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    if any(hooks):
        raise _Unknown
    code = sys.modules[cls.__module__]
    functions = (
        tuple(v for v in vars(code).values() if isinstance(v, types.FunctionType)) if "transformers" in cls.__module__ else ()
    )
    own = {k: v for k, v in vars(m).items() if not k.startswith("_moefx") and k not in ("_parameters", "_buffers", "_modules")}
    tensors = [*m._parameters.items(), *m._buffers.items()]
    weights = tuple((n, None if t is None else (type(t), t.shape, t.dtype, t.requires_grad, t.device)) for n, t in tensors)
    return cls, cls.forward, functions, weights, _frozen(own)


def _frozen(value: Any, depth: int = 0) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type, types.BuiltinFunctionType)):
        return type(value), value
    if isinstance(value, (list, tuple, dict, set, frozenset)) and depth < 8:
        if isinstance(value, dict):
            return type(value), tuple((_frozen(k), _frozen(v, depth + 1)) for k, v in value.items())
        return type(value), tuple(_frozen(v, depth + 1) for v in value)
    if isinstance(value, types.FunctionType) and "<locals>" not in value.__qualname__:
        return value
    if hasattr(value, "to_dict") and depth < 8:  # a configuration
        return type(value), _frozen(vars(value), depth + 1)
    raise _Unknown


# --- command ---------------------------------------------------------------------------------------------------------


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_range, default=range(100), help="7, or 0:100")
    parser.add_argument("--actions", type=int, default=10, help="of each walk")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES], metavar="FAMILY")
    parser.add_argument("--only", nargs="+", default=[*ACTIONS], choices=[*ACTIONS], metavar="ACTION")
    parser.add_argument("--without", nargs="+", default=[], choices=[*ACTIONS], metavar="ACTION")
    parser.add_argument("--compile", action="store_true", help="with Inductor")
    parser.add_argument("--no-shrink", action="store_true")
    args = parser.parse_args()
    names = [n for n in args.only if n not in args.without]
    from tests.support import capture_cache

    capture_cache.start(state_of)
    if args.compile:  # else Inductor draws dropout's random numbers in an order of its own
        from torch._inductor import config

        config.fallback_random = True
    raised, refused, failed = Counter[str](), Counter[str](), 0
    for seed in tqdm(args.seeds, unit="walk", disable=None):
        walk = Walk.drawn(seed, args.actions, args.families, names)
        found = result(walk, args.compile)
        raised.update(f"{walk.steps[n].name}: {said.splitlines()[0][:100]}" for n, said in found.raised.items())
        refused.update([found.refused[:160]] if found.refused else [])
        if found.failure is None:
            continue
        failed += 1
        failure = found.failure
        if not args.no_shrink:
            walk, failure = shrunk(walk, failure, lambda w: result(w, args.compile).failure)
            found = result(walk, args.compile)
        tqdm.write(f"{'=' * 20} seed {seed}: {' > '.join(s.name for s in walk.steps)}\n{script(walk, failure, found.raised)}")
        sys.stdout.flush()
    print(f"{len(args.seeds)} walks, {failed} failed, {refused.total()} refused by optimize")
    for title, counts in (("raised on both sides", raised), ("refused", refused)):
        print(*(f"  {title}: {n} {said}" for said, n in counts.most_common(12)), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
