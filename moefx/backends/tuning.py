"""Chooses between backends' kernels by running them: forward and backward, at the sizes of the site, once per kind of GPU.

    model = moefx.optimize(model, tune=(4, 4096))       # micro-batches of 4 sequences of 4,096 tokens

What was measured is kept on disk (``MOEFX_TUNING``, by default ``moefx/tuning.json`` in the user's cache folder) and printed in
the report. Each rank chooses for itself: kernels of one operation compute the same.

With ``MOEFX_TUNE=0`` nothing is timed, so that runs choose alike: what is kept decides, then the table that moefx has for this
kind of GPU (``moefx/tuned``, made by ``benchmarks/tune_table.py``; an H100 is served by the H200's), then the order of the
backends.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from moefx import ops
from moefx.analysis.cost import Sizes
from moefx.backends import Choice
from moefx.backends.compile import revision
from moefx.errors import MoefxError
from moefx.ir.graph import arguments, op_name, value
from moefx.ir.plan import Tune
from moefx.ir.program import Function
from moefx.ops import grouped_mlp as grouped

#: What takes long enough to be worth it. The rest is fused with what is around it: alone, its time says nothing.
TUNED = (ops.experts, grouped.grouped_mlp, ops.attention, ops.linear_cross_entropy)
WARM_UP, RUNS = 3, 10


def choose(node: fx.Node, function: Function, candidates: Sequence[Choice], tune: Tune, compile: bool | str) -> Choice:
    """The fastest of ``candidates``, with the times of all. One that fails is left out, with its error."""
    device = function.call.device
    if node.target not in TUNED or len(candidates) < 2 or device.type == "meta":
        return candidates[0]
    site = _Site(node, function, tune, device)
    known = _read(file()).get(site.key, {})
    missing = [c for c in candidates if c.backend.name not in known]
    if missing and os.environ.get("MOEFX_TUNE") == "0":
        return _untimed(site, candidates, known)
    for choice in tqdm(missing, f"timing {op_name(node.target)}", leave=False, disable=not missing):
        known[choice.backend.name] = site.measure(choice.kernel.fn, compile)
    if missing:
        _write(site.key, known)
    if not any(isinstance(known[c.backend.name], list) for c in candidates):
        reasons = "; ".join(f"{c.backend.name}: {known[c.backend.name]}" for c in candidates)
        raise MoefxError(f"no kernel of {op_name(node.target)} runs at {site.sizes} on {device}: {reasons}")
    return _fastest(candidates, known, f"measured at {site.sizes}")


def _untimed(site: _Site, candidates: Sequence[Choice], known: dict[str, Any]) -> Choice:
    """The choice where nothing may be timed, from what is kept of this site, else from the table for this GPU."""
    source = f"kept of {site.sizes}"
    if not known:
        table = table_of(site.where)
        if not table.exists():
            table = table_of(_same_chip(site.where))
        known, source = _read(table).get("sites", {}).get(site.row, {}), f"{table.name} at {site.sizes}"
    there = [c for c in candidates if isinstance(known.get(c.backend.name), list)]
    if there:
        return _fastest([c for c in candidates if c.backend.name in known], known, source)
    first = candidates[0]
    why = "; ".join(filter(None, (first.why, f"MOEFX_TUNE=0, and nothing is kept of {site.sizes} on {site.where}")))
    return replace(first, why=why, refusals=candidates[-1].refusals)


def _fastest(candidates: Sequence[Choice], known: dict[str, Any], source: str) -> Choice:
    best = min((c for c in candidates if isinstance(known[c.backend.name], list)), key=lambda c: sum(known[c.backend.name]))
    times = ", ".join(f"{c.backend.name} {_text(known[c.backend.name])}" for c in candidates)
    why = "; ".join(filter(None, (best.why, f"{source}: {times}")))
    return replace(best, why=why, refusals=candidates[-1].refusals)


def _text(found: list[float] | str) -> str:
    return found if isinstance(found, str) else " + ".join(f"{ms:.2f}" for ms in found) + " ms"


class _Site:
    """One call of one operation with numbers of the size that training has."""

    def __init__(self, node: fx.Node, function: Function, tune: Tune, device: torch.device):
        self.node, self.device, self.training = node, device, function.call.training
        self.sizes = f"B={tune.batch}, S={tune.sequence}"
        sizes = Sizes(function)
        numbers = {"B": tune.batch, "S": tune.sequence, **sizes.roles}

        def shape(val: Tensor) -> list[int]:
            return [int(e.subs({s: numbers[str(s)] for s in e.free_symbols})) for e in map(sizes.size, val.shape)]

        optional = {a.name for a in node.target._schema.arguments if a.kwarg_only and a.has_default_value()}  # type: ignore[union-attr]
        given = {k: v for k, v in arguments(node).items() if v is not None or k not in optional}
        self.given = {k: (shape(value(v)), value(v).dtype) if isinstance(v, fx.Node) else v for k, v in given.items()}
        self.where = name_of(device)
        inputs = {k: [v[0], str(v[1])] if isinstance(v, tuple) else v for k, v in self.given.items()}
        site = [op_name(node.target), inputs, self.training]
        self.row = json.dumps(site)  #: of a table, which is one device's and outlives versions
        self.key = json.dumps([*site, self.where, *versions()])

    def inputs(self) -> dict[str, Any]:
        """Random numbers; experts get as many tokens each, about."""
        generator = torch.Generator(self.device).manual_seed(0)
        found: dict[str, Any] = {}
        for name, what in self.given.items():
            if not isinstance(what, tuple):
                found[name] = what
                continue
            shape, dtype = what
            if name == "topk_ids":
                scores = torch.rand(shape[0], self.given["gate_up"][0][0], generator=generator, device=self.device)
                found[name] = scores.topk(shape[1]).indices.to(dtype)
            elif name == "tokens_per_expert":
                each = torch.full(shape, self.given["permuted_tokens"][0][0] // shape[0], dtype=dtype, device=self.device)
                each[0] += self.given["permuted_tokens"][0][0] - each.sum()
                found[name] = each
            elif name == "labels":
                high = self.given["weight"][0][0]
                found[name] = torch.randint(high, shape, generator=generator, device=self.device, dtype=dtype)
            elif dtype == torch.bool:
                found[name] = torch.ones(shape, dtype=dtype, device=self.device).tril()
            else:
                numbers = torch.randn(shape, generator=generator, device=self.device) * shape[-1] ** -0.5
                found[name] = numbers.to(dtype).requires_grad_(self.training and name != "mask")
        return found

    def measure(self, kernel: Callable, compile: bool | str) -> list[float] | str:
        """Medians in ms of forward and backward, or why it failed."""
        try:
            if compile:
                kernel = torch.compile(kernel, dynamic=False, backend=compile if isinstance(compile, str) else "inductor")
            given = self.inputs()
            schema = self.node.target._schema.arguments  # type: ignore[union-attr]
            args = [given[a.name] for a in schema if not a.kwarg_only]
            kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given}
            leaves = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
            times: list[tuple[float, float]] = []
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(bool(leaves)):
                for _ in range(WARM_UP + RUNS):
                    clock = _Clock(self.device)
                    out = kernel(*args, **kwargs)
                    clock.lap()
                    if leaves:
                        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
                    clock.lap()
                    times.append(clock.read())
            forward, backward = zip(*times[WARM_UP:])
            return [round(statistics.median(t), 4) for t in (forward, backward)]
        except Exception as error:  # OutOfMemoryError too: a kernel that needs more memory than there is does not run here
            return f"failed ({type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else '?'})"
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


class _Clock:
    """Times between laps in ms: of the device where it has events, else of the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> tuple[float, float]:
        first, second, third = self.marks
        if self.device.type == "cuda":
            third.synchronize()
            return first.elapsed_time(second), second.elapsed_time(third)
        return (second - first) * 1e3, (third - second) * 1e3


# --- what is kept ----------------------------------------------------------------------------------------------------


def file() -> Path:
    """Where measurements are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MOEFX_TUNING") or cache / "moefx" / "tuning.json")


def name_of(device: torch.device) -> str:
    """What measurements are kept under: the GPU's name, or the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"


def versions() -> list[str]:
    """What else makes two measurements of one site on one kind of device differ."""
    return [torch.__version__, revision()[:16]]


def table_of(where: str) -> Path:
    """The table that moefx has for a device; it need not be there."""
    return Path(__file__).parent / "tuned" / f"{re.sub('[^a-z0-9]+', '-', where.lower()).strip('-')}.json"


def _same_chip(where: str) -> str:
    """The device whose table serves one that has none: an H200 is an H100 with more and faster memory."""
    return "NVIDIA H200" if re.match(r"NVIDIA (H100|H800|GH200)\b", where) else where


def rows(where: str) -> dict[str, dict[str, Any]]:
    """What is kept of this device and these versions, as a table's ``sites``."""
    wanted = [where, *versions()]
    kept = ((json.loads(key), found) for key, found in _read(file()).items())
    return {json.dumps(key[:3]): found for key, found in kept if key[3:] == wanted}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # none yet, or another process is writing: measured again
    return found if isinstance(found, dict) else {}


def _write(key: str, found: dict[str, Any]) -> None:
    """Other processes may write too: the last one wins, and no reader sees half a file."""
    path = file()
    with contextlib.suppress(OSError):  # a home that cannot be written to: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps({**_read(path), key: found}, indent=1))
        part.replace(path)
