"""What all benchmarks share: the step, the timer, peak memory, the record of the machine, JSON and table."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import clocks
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import moefx
from moefx.runtime.cuda_graph import GraphedStep

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
#: Whole records, with what is too long for the repository.
DETAILED = HERE.parent / "build/benchmarks"
#: Packages that are in a record where they are installed.
OPTIONAL = (
    "peft",
    "transformer-engine",
    "quack-kernels",
    "nemo-automodel",
    "mamba-ssm",
    "causal-conv1d",
    "deep-ep",
    "flash-attn-4",
)
_START = time.perf_counter()


def say(text: str) -> None:
    """A progress line with the seconds since the start, visible at once: device machines cut off silent runs."""
    print(f"[{elapsed():6.1f} s] {text}", flush=True)


def elapsed() -> float:
    return time.perf_counter() - _START


# --- the step --------------------------------------------------------------------------------------------------------


def drop_gradients(model: nn.Module) -> None:
    """As ``optimizer.zero_grad()`` does: the next backward allocates and writes instead of adding."""
    for p in model.parameters():
        p.grad = None


def local(t: Any) -> Tensor:
    """What this rank holds of a tensor that may be spread."""
    return getattr(t, "_local_tensor", t)


def train_step(model: Callable, batch: Mapping[str, Tensor]) -> Tensor:
    """Forward, loss and backward: all of a training step but the optimizer, which is the same for all contenders."""
    if isinstance(model, GraphedStep):
        return model(**batch, use_cache=False)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def recorded(model: nn.Module, batch: Mapping[str, Tensor]) -> GraphedStep:
    """moefx's step as a CUDA graph, which the next call replays."""
    step = moefx.cuda_graph(model)
    while not step.replays:
        drop_gradients(model)
        train_step(step, batch)
    drop_gradients(model)
    return step


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the parameters: the same weights without a second copy in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


# --- time and memory -------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Milliseconds of the timed steps, and of the warm-up (with compilation)."""

    steps_ms: list[float] = field(default_factory=list)
    warmup_s: float = 0.0
    peak_gib: float | None = None  #: above weights and gradients; None where the device does not tell
    allocated_gib: float | None = None  #: all that tensors took at the peak
    clock: dict[str, float] | None = None  #: of the device in the timed steps: clocks.Readings.summary

    @property
    def median_ms(self) -> float:
        return statistics.median(self.steps_ms)

    def summary(self) -> dict[str, Any]:
        return {"median_ms": self.median_ms, "min_ms": min(self.steps_ms), **asdict(self)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one ``step``. CUDA events, so that the clock starts and stops on the device's own timeline."""
    synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def warm(
    model: nn.Module,
    run: Callable,
    batch: Mapping[str, Tensor],
    device: torch.device,
    steps: int,
    after: Callable[[], Any] = lambda: None,
) -> float:
    """Seconds of the first steps, where code is compiled and memory is reserved."""
    started = time.perf_counter()
    for _ in range(steps):
        drop_gradients(model)
        train_step(run, batch)
        after()
    synchronize(device)
    return time.perf_counter() - started


def measure(
    model: nn.Module,
    run: Callable,
    batch: Mapping[str, Tensor],
    device: torch.device,
    *,
    warmup: int,
    steps: int,
    after: Callable[[], Any] = lambda: None,
) -> Timing:
    """Times ``run`` (the model, compiled or recorded) and what is to follow ``after`` each backward, such as an optimizer's step.
    Gradients are None before each step, outside the clock.
    """
    graphed = isinstance(run, GraphedStep)

    def step() -> None:
        train_step(run, batch)
        after()

    def from_now_on() -> int:
        """Bytes of weights and whatever the benchmark itself keeps; the peak is counted from here."""
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    if device.type == "cuda" and graphed:
        others = from_now_on()  # a replay allocates nothing: what counts is what it was recorded with
    with clocks.reading(device) as clock:
        first = max(warmup, run.warmup + 1) if graphed else warmup
        timing = Timing(warmup_s=warm(model, run, batch, device, first, after))
        drop_gradients(model)
        if device.type == "cuda" and not graphed:
            others = from_now_on()
        clock.since_now()
        for _ in range(steps):
            drop_gradients(model)
            timing.steps_ms.append(time_once(step, device))
        timing.clock = clock.summary()
    if device.type == "cuda":
        gradients = sum(local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
        most = torch.cuda.max_memory_allocated(device)
        timing.peak_gib, timing.allocated_gib = (most - others - gradients) / 2**30, most / 2**30
    drop_gradients(model)
    return timing


def free(device: torch.device, *, code: bool = True) -> None:
    """Between contenders: garbage, cached device memory and (``code``) what torch.compile keeps."""
    if code:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- comparing gradients ---------------------------------------------------------------------------------------------


def gradients(model: nn.Module, run: Callable, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    """Loss and all gradients of one step."""
    drop_gradients(model)
    loss = float(train_step(run, batch))
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    drop_gradients(model)
    return loss, grads


def relative_l2(wanted: Tensor | None, found: Tensor | None) -> float:
    """|found - wanted| / |wanted|; infinite where one is missing or not finite, so that no check passes by accident."""
    if wanted is None or found is None:
        return 0.0 if wanted is found else float("inf")
    if wanted.shape != found.shape:
        return float("inf")
    # row by row in float64 sums, so that no float64 copy of all experts has to fit in memory
    gap = size = 0.0
    rows = zip(wanted, found) if wanted.dim() > 2 else [(wanted, found)]
    squares = torch.zeros(2, dtype=torch.float64, device=wanted.device)
    for w, f in rows:
        w, f = w.detach().float(), f.detach().float()
        squares += torch.stack([(f - w).square().sum(dtype=torch.float64), w.square().sum(dtype=torch.float64)])
    gap, size = squares.sqrt().tolist()
    if not (gap == gap and gap != float("inf")):
        return float("inf")
    return gap / size if size else (0.0 if gap == 0 else float("inf"))


def distances(wanted: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None]) -> dict[str, float]:
    """``relative_l2`` per parameter; a parameter that only one side has is infinitely far."""
    names = list(wanted) + [n for n in found if n not in wanted]
    return {n: relative_l2(wanted.get(n), found.get(n)) for n in names}


def spread(values: Mapping[str, float]) -> dict[str, Any]:
    """The worst and the mean of ``distances``."""
    worst = max(values, key=lambda n: values[n])
    return {"max": values[worst], "mean": statistics.fmean(values.values()), "worst": worst, "tensors": len(values)}


# --- one rank of many ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_ep(ep_size: int, device: torch.device | str, backends: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Within: this process plays one of ``ep_size`` ranks; yields the options for ``moefx.optimize``.

    It holds its share of the experts and computes as many rows as it sends; rows that would travel are copied instead. Its
    time is that of a rank whose exchange costs nothing: add :func:`exchange_ms`. Numbers (the loss) mean nothing.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moefx.backends import Backend, Kernel
    from moefx.ops import dispatch_combine

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep_size)
    try:
        loop = Backend(
            "loop_back", {dispatch_combine.dispatch: Kernel(dispatch_combine.dispatch_with("loop_back"), why="simulated")}
        )
        mesh = init_device_mesh(torch.device(device).type, (ep_size,), mesh_dim_names=("ep",))
        usable = [name for name, b in moefx.backends.builtin().items() if b.available() is None and name != "deepep"]
        yield {"mesh": mesh, "backends": (loop, *(backends or usable))}
    finally:
        dist.destroy_process_group()


def fill_experts(model: nn.Module, std: float = 0.02) -> None:
    """Random numbers for the experts of a simulated rank: nobody scattered any."""
    from torch.distributed.tensor import DTensor

    for p in model.parameters():
        if isinstance(p, DTensor):
            p.to_local().detach().normal_(std=std)


def exchange_ms(model: nn.Module, gb_per_s: float, **sizes: int) -> float:
    """A MODEL, not a measurement: milliseconds of all exchanges of one step, one after the other and none overlapped.

    Bytes to other ranks are the cost model's (B, S, ep in ``sizes``), as many in the backward as in the forward.
    """
    return 2 * moefx.report(model).cost(**sizes).evaluate()[3] / gb_per_s / 1e6


# --- the record ------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit that was measured, "+" if files differ from it; None outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        out = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and with what this was measured. No host name, no paths: results are published."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in ("moefx", "torch", "transformers", "triton")}
        | {p: v for p in OPTIONAL if (v := _version(p)) is not None},
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        record["gpu"] = {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return record


#: What stays out of the repository: kernels, single steps, each parameter's distance, and what follows from the configuration.
DETAILS = {"top", "steps_ms", "distances", "gradients", "flipped", "losses", "trace", "work", "floors_ms"}
#: Characters of a line of a result: a row of a table is one line.
WIDTH = 500


def summary(record: Any) -> Any:
    """A record without its details: what stays in the repository (rows, machine, versions, checks)."""
    if isinstance(record, Mapping):
        return {k: summary(v) for k, v in record.items() if k not in DETAILS}
    return [summary(v) for v in record] if isinstance(record, (list, tuple)) else record


def dump(record: Any, indent: int = 0) -> str:
    """``record`` as JSON: what fits on a line stands on one, numbers have seven digits."""
    line = json.dumps(_rounded(record))
    if len(line) + indent <= WIDTH or not record or not isinstance(record, (Mapping, list, tuple)):
        return line
    if isinstance(record, Mapping):
        parts, brackets = [f"{json.dumps(str(k))}: {dump(v, indent + 1)}" for k, v in record.items()], "{}"
    else:
        parts, brackets = [dump(v, indent + 1) for v in record], "[]"
    return f",\n{' ' * (indent + 1)}".join(parts).join(
        (f"{brackets[0]}\n{' ' * (indent + 1)}", f"\n{' ' * indent}{brackets[1]}")
    )


def _rounded(record: Any) -> Any:
    if isinstance(record, float):
        return float(f"{record:.7g}") if abs(record) < 1e7 else round(record, 1)
    if isinstance(record, Mapping):
        return {k: _rounded(v) for k, v in record.items()}
    return [_rounded(v) for v in record] if isinstance(record, (list, tuple)) else record


def details_of(path: Path) -> Path:
    """Where the whole record of the result at ``path`` is written: into a folder that git ignores."""
    return (DETAILED if path.parent == RESULTS else path.parent / "details") / path.name


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the summary of ``record`` to ``path`` and all of it to :func:`details_of`; a run that is cut off leaves no half file."""
    for file, content in ((details_of(path), json.dumps(record, indent=1)), (path, dump(summary(record)))):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(content + "\n")
        part.replace(file)


def save(name: str, record: Mapping[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``, and all of the record to ``build/benchmarks/<name>.json``, which git ignores."""
    path = RESULTS / f"{name}.json"
    write(path, record)
    say(f"wrote {path.relative_to(HERE.parent)} (its details: {details_of(path).relative_to(HERE.parent)})")
    return path


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    # a fixed width: output that is not a terminal would be cut at 80 columns
    Console(width=120, highlight=False).print(table)


def finish(name: str, rows: Sequence[Any], problems: Sequence[str], **more: Any) -> int:
    """Writes what was measured on this CUDA device to ``<name>-<device>.json``; the exit code."""
    record = {"machine": machine("cuda"), **more, "rows": rows, "problems": problems}
    save(f"{name}-{slug(torch.cuda.get_device_name())}", record)
    return verdict(problems)


def verdict(problems: Sequence[str]) -> int:
    """Prints what is wrong; the exit code."""
    for p in problems:
        print(f"FAILED: {p}", flush=True)
    print("FAILED" if problems else "ok", flush=True)
    return 1 if problems else 0
