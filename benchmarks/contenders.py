"""One rank of ``multi_gpu.py``: builds a contender over all ranks, times its rows, checks it. The ranks of a contender are
processes of their own: whatever happens to one of them, its memory and its communicators are gone with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks
import common
import models
import ranks as ranks_
import routing
import sketch
import torch
import torch.distributed as dist
import tunings
from torch import Tensor, nn
from transformers.distributed import DistributedConfig
from transformers.utils.logging import set_verbosity_error as quiet

import moefx
from moefx import passes
from moefx.backends import builtin, deepep
from moefx.distributed.initialize import initialize

#: Contenders in the order in which they run: what the headline needs comes first.
CONTENDERS = {
    "hf_fsdp": "Transformers, FSDP2 a layer",
    "moefx": "moefx, ep over all ranks",
    "moefx_graph": "moefx, steps replayed as CUDA graphs",
    "hf_ep": "Transformers' own expert parallelism",
    "moefx_chunks": "moefx, tokens in two chunks that overlap",
    "moefx_graph_chunks": "moefx, in two chunks and replayed",
    "moefx_graph_lean": "moefx, replayed, experts' pre-activations made again",
    "moefx_no_overlap": "moefx without the pass overlap",
}
#: Not timed: Transformers in fp32 on the same weights, against which all are checked.
EXACT = "exact"
TRANSPORTS = ("deepep", "deepep_elastic", "te_ep")
SEED = 0
#: Fewer steps than these are not worth a figure: a row that has no time for them is left out.
LEAST_WARMUP, LEAST_STEPS = 3, 5


@dataclass(frozen=True)
class Row:
    routing: str
    mbs: int
    recompute: bool = False  #: gradient checkpointing of every block

    def __str__(self) -> str:
        return f"{self.routing}, mbs {self.mbs}{', recomputed' if self.recompute else ''}"


@dataclass(frozen=True)
class Job:
    """What the ranks of one contender do. ``until`` is of ``time.time()``."""

    contender: str
    model: str
    layers: int
    rows: tuple[Row, ...]
    seq: int
    dtype: str
    device: str
    warmup: int
    steps: int
    until: float
    folder: str  #: where the results of the check go, for the others to be compared with
    check: tuple[str, ...] = ()  #: routings
    check_seq: int = 0
    compile: bool = True
    transport: str = "auto"
    fail: str = ""  #: for tests: how, which contender, which of its ranks, in which row


def main(rank: int, ranks: int, port: int, job: Job, events: Sequence[Any]) -> None:
    """A rank, as ``torch.multiprocessing`` starts it. What happens goes into its connection of ``events`` as (kind, details)."""
    for name in [n for n in os.environ if n.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # else a rank looks for the store of the torchrun that started the benchmark
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in where.items()}, MASTER_ADDR="127.0.0.1")
    warnings.filterwarnings("ignore")
    quiet()
    if job.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    here = Rank(job, rank, ranks, events[rank])
    try:
        here.start()
        run(here)
        dist.barrier()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            here.events.send(("failed", _failure(error, here)))
        sys.stderr.flush()
        os._exit(1)  # the way out would wait for communicators that wait for other ranks
    dist.destroy_process_group()


def _failure(error: BaseException, here: Rank) -> dict[str, Any]:
    lines = (str(error).strip() or "?").splitlines()
    text = " ... ".join([lines[0][:300], *lines[1:][-1:]])  # NCCL says what is wrong last
    if "Duplicate GPU detected" in text:
        text += ": ranks share a GPU, which takes NCCL 2.30 or later"
    return {
        "kind": "memory" if isinstance(error, torch.OutOfMemoryError) else "error",
        "rank": here.rank,
        "row": here.row,
        "at": time.time(),
        "why": f"{type(error).__name__}: {text}",
        "trace": traceback.format_exc(),
    }


class Rank:
    """Where this rank is, and how it tells the parent what happens."""

    def __init__(self, job: Job, rank: int, ranks: int, events: Any):
        self.job, self.rank, self.ranks, self.events = job, rank, ranks, events
        self.row: Row | None = None  #: that it is at
        self.device = torch.device("cpu")

    def start(self) -> None:
        _, _, self.device = ranks_.start(self.job.device)
        if self.device.type == "cuda":  # Transformers takes the device that this names; ranks may share one
            os.environ["LOCAL_RANK"] = str(self.device.index)

    def tell(self, kind: str, details: Any) -> None:
        if self.rank == 0:
            self.events.send((kind, details))

    def gather(self, value: Any) -> list[Any]:
        """Of all ranks; the CPUs talk, no kernel waits."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def tokens(self, batch: int, seq: int) -> dict[str, Tensor]:
        """This rank's batch, the same for all contenders: [batch, seq], labels alike."""
        return models.tokens(self.job.model, batch, seq, self.device, 1000 + self.rank)


def run(here: Rank) -> None:
    job = here.job
    if here.rank == 0:
        here.tell("machine", _machine(here))
    started = time.perf_counter()
    contender = BUILDERS[job.contender](here)
    parameters = sum(p.numel() for p in contender.model.parameters())
    local = sum(common.local(p).nbytes for p in contender.model.parameters())
    here.tell(
        "built",
        {"seconds": time.perf_counter() - started, "parameters": parameters, "weights_gib": max(here.gather(local)) / 2**30},
    )
    kept = Path(job.folder, "tunings.json")
    if tunings.load(kept):
        here.tell("note", {"triton_tunings": "of the contender before"})
    # rows first: they share out the time that there is, and what a check takes is then known to the next contender
    for i, row in enumerate(job.rows):
        here.row = row
        contender.route(row.routing, row.mbs * job.seq)
        measure(here, contender, row, len(job.rows) - i)
        here.row = None
        if here.rank == 0:
            tunings.save(kept)
    for name in job.check:
        contender.route(name, job.check_seq)
        check(here, contender, name)
    here.tell("finished", contender.finish())


def _machine(here: Rank) -> dict[str, Any]:
    record = common.machine(here.device)
    record["ranks"] = here.ranks
    if here.device.type == "cuda":
        record["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        record["ranks_share_a_gpu"] = here.ranks > torch.cuda.device_count()
    for name in ("deep_ep", "mamba_ssm", "causal_conv1d"):
        record["versions"][name] = common._version(name)
    # what the machine says about its links; paths are nobody's business
    names = [n for n in os.environ if n.startswith(("NCCL_", "PYTORCH_", "NVSHMEM_")) and "/" not in os.environ[n]]
    record["environment"] = {n: os.environ[n] for n in sorted(names)}
    return record


# --- the contenders --------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    model: Any
    route: Callable[[str, int], None]  #: from now on: routing by this name, batches of so many tokens
    observe: Callable[[Any], contextlib.AbstractContextManager]  #: within, a forward's choices of experts by layer
    finish: Callable[[], dict[str, Any]] = dict  #: what is to be said at the end
    graph: bool = False  #: its steps are replayed as CUDA graphs


def _empty(job: Job, dtype: torch.dtype | None = None, experts: str = "grouped_mm") -> nn.Module:
    return models.build(job.model, job.layers, dtype or getattr(torch, job.dtype), "meta", experts=experts).train()


def transformers(here: Rank, ep_size: int = 1, dtype: torch.dtype | None = None, experts: str = "grouped_mm") -> Contender:
    """Transformers' own sharding of a model, as ``from_pretrained(distributed_config=...)`` does it before it loads: FSDP2 over
    every decoder block, and its experts over ``ep_size`` ranks if that is more than one. Parameters, gradients and their
    reduction are of the parameters' dtype.
    """
    model: Any = _empty(here.job, dtype, experts)
    sizes: dict[str, Any] = {"fsdp_size": here.ranks, "ep_size": ep_size}
    if ep_size > 1:
        sizes["ep_implementation"] = "all_to_all"
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes))
    model = model.maybe_distribute_model(model, config, meshes)
    torch.manual_seed(SEED)
    initialize(model, here.device)

    def route(name: str, tokens: int) -> None:
        for router in routing.routers(model).values():
            vars(router).pop("forward", None)
        if name == "balanced":
            routing.balance(model)

    return Contender(model, route, routing.observed)


def exact(here: Rank) -> Contender:
    """Transformers in fp32, by its own loop over experts, on the weights that the contenders have."""
    job = here.job
    found = transformers(here, dtype=torch.float32, experts="eager")
    if job.dtype != "float32":
        # drawn in the contenders' dtype: random numbers of another dtype are other numbers
        drawn = dict(transformers(here).model.named_parameters())
        with torch.no_grad():
            for name, p in found.model.named_parameters():
                common.local(p).copy_(common.local(drawn.pop(name)))
        del drawn
        common.free(here.device)
    if models.MODELS[job.model].check_attention:
        found.model.set_attn_implementation(models.MODELS[job.model].check_attention)
    return found


def expert_parallel(here: Rank, pipeline: Callable[[], Any] = passes.default, graph: bool = False) -> Contender:
    """moefx, as a user calls it. A ``graph`` cannot wait for counts: it has a capacity, that of the batches to come."""
    job = here.job
    why = _refuses_deepep() if job.transport in ("auto", "deepep") else "not asked for"
    if job.transport == "deepep" and why:
        raise RuntimeError(f"DeepEP cannot be used here: {why}")
    # at once: if it fails, the parent is to know by what
    here.tell("note", {"transport": "all_to_all" if why else "deepep", "deepep_refuses": why})
    names = [n for n, b in builtin().items() if not b.opt_in and b.available() is None and n not in TRANSPORTS]
    backends = names if why else ["deepep", *names]
    options: dict[str, Any] = {"backends": backends, "compile": job.compile}
    torch.manual_seed(SEED)
    # of the same batch as the first that is run
    first = job.rows[0].routing if job.rows else job.check[0]
    tokens = job.rows[0].mbs * job.seq if job.rows else job.check_seq
    model = moefx.parallelize(
        _empty(job),
        ep_size=here.ranks,
        lost_after=0,
        pipeline=pipeline(),
        balanced_routing=first == "balanced",
        dispatch_capacity=tokens if graph else 0,
        **options,
    )
    now = first, tokens if graph else 0

    def route(name: str, tokens: int) -> None:
        nonlocal now
        wanted = name, tokens if graph else 0
        if wanted != now:
            moefx.restore(model)
            moefx.optimize(
                model, pipeline=pipeline(), balanced_routing=name == "balanced", dispatch_capacity=wanted[1], **options
            )
            now = wanted

    def finish() -> dict[str, Any]:
        report = moefx.report(model)
        return {
            "kernels": {f"{op} by {backend}": many for (op, backend), (many, _) in report.kernels().items()},
            "fallbacks": [f"{p}: {r}: {n} times" for (p, r), n in report.fallbacks.items()],
            "optimize_s": report.seconds,
        }

    return Contender(model, route, moefx.record_routes, finish, graph)


def _refuses_deepep() -> str | None:
    return deepep.available() or deepep.refuses_group(dist.group.WORLD.group_name)


def _lean() -> Any:
    return passes.default().after("lower", passes.RecomputeExperts())


def _in_two() -> Any:
    return passes.default().replace("overlap", passes.Overlap(chunks=2))


BUILDERS: dict[str, Callable[[Rank], Contender]] = {
    EXACT: exact,
    "hf_fsdp": transformers,
    "hf_ep": lambda here: transformers(here, ep_size=here.ranks),
    "moefx": expert_parallel,
    "moefx_graph": lambda here: expert_parallel(here, graph=True),
    "moefx_chunks": lambda here: expert_parallel(here, _in_two),
    "moefx_graph_chunks": lambda here: expert_parallel(here, _in_two, graph=True),
    "moefx_graph_lean": lambda here: expert_parallel(here, _lean, graph=True),
    "moefx_no_overlap": lambda here: expert_parallel(here, lambda: passes.default().without("overlap")),
}


# --- is it right -----------------------------------------------------------------------------------------------------


def check(here: Rank, contender: Contender, name: str) -> None:
    """One step on short sequences; loss, sketches of the weights and of all gradients, choices of experts: to the folder."""
    job, model = here.job, contender.model
    batch = here.tokens(1, job.check_seq)
    common.drop_gradients(model)
    reference = job.contender == EXACT
    still = checks.exact_fp32() if reference else contextlib.nullcontext()
    # the reference in fp32 keeps one block's tensors at a time: Mamba's scan in torch alone would fill the device
    arriving = sketch.Arriving(model) if reference else None
    began = time.perf_counter()
    with contender.observe(model) as seen, still, recomputed(model, reference), arriving or contextlib.nullcontext():
        loss = float(common.train_step(common.recorded(model, batch) if contender.graph else model, batch))
    stepped = time.perf_counter()
    found = {
        "loss": sum(here.gather(loss)) / here.ranks,
        "gradients": arriving.sketch() if arriving else sketch.sketch(model, lambda p: p.grad),
        "norm": arriving.norm() if arriving else sketch.norm(model),
        "weights": sketch.sketch(model, lambda p: p.detach(), draws=1),  # equal or not
    }
    routes = [index.to(torch.int16).cpu() for index in seen.values()]
    torch.save(routes, check_file(job, job.contender, name, here.rank))
    if here.rank == 0:
        torch.save(found, check_file(job, job.contender, name))
    common.drop_gradients(model)
    common.free(here.device, code=False)
    dist.barrier()  # all files are there
    here.tell(
        "checked",
        {
            "routing": name,
            "loss": found["loss"],
            "norm": found["norm"],
            "tokens": job.check_seq * here.ranks,
            "step_s": stepped - began,
            "sketch_s": time.perf_counter() - stepped,
            "sizes": {n: p.numel() for n, p in model.named_parameters()},
        },
    )


def check_file(job: Job, contender: str, name: str, rank: int | None = None) -> Path:
    return Path(job.folder, f"{contender}-{name}{'' if rank is None else f'-{rank}'}.pt")


# --- how fast is it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recomputed(model: Any, on: bool) -> Iterator[None]:
    """Within, if ``on``: every decoder block keeps its input only and runs again in the backward."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


def measure(here: Rank, contender: Contender, row: Row, left: int) -> None:
    """Times a row; all ranks take as many steps as the first rank says, which looks at the clock: ``left`` rows share what
    is left of the job's time.
    """
    job, model = here.job, contender.model
    batch = here.tokens(row.mbs, job.seq)
    with recomputed(model, row.recompute):
        _fail(here, row)
        share = (job.until - time.time()) / left
        if ranks_.from_first(share <= 0):
            here.tell("skipped", {"row": row, "why": "its time was used up"})
            return
        began = time.perf_counter()
        step: Any = moefx.cuda_graph(model) if contender.graph else model
        if contender.graph:
            torch.cuda.reset_peak_memory_stats(here.device)  # a replay allocates nothing: the recording's memory counts
        least = step.warmup + 1 if contender.graph else min(LEAST_WARMUP, job.warmup)
        warming = common.warm(model, step, batch, here.device, least)  # with compilation
        common.drop_gradients(model)
        once = common.time_once(lambda: common.train_step(step, batch), here.device) / 1e3
        warmup, steps = ranks_.from_first(plan(job.warmup - least - 1, job.steps, share - (time.perf_counter() - began), once))
        if warmup:
            warming += common.warm(model, step, batch, here.device, warmup)
        here.tell("warm", {"row": row, "seconds": warming, "step_ms": once * 1e3, "steps": steps})
        mine = timed(model, step, batch, here.device, steps, fresh=not contender.graph)
    found = here.gather(mine)
    per_s = [row.mbs * job.seq / r["median_ms"] * 1e3 for r in found]
    here.tell(
        "row_done",
        {
            "row": row,
            "warmup": least + 1 + warmup,
            "warmup_s": warming,
            "steps": steps,
            "tokens_per_s_per_gpu": {"mean": sum(per_s) / len(per_s), "min": min(per_s), "max": max(per_s)},
            "median_ms": max(r["median_ms"] for r in found),
            "steps_ms": [round(max(r["steps_ms"][i] for r in found), 3) for i in range(steps)],
            **{
                k: None if found[0][k] is None else max(r[k] for r in found) for k in ("peak_gib", "reserved_gib", "device_gib")
            },
        },
    )
    common.free(here.device, code=False)


def plan(warmup: int, steps: int, seconds: float, step_s: float) -> tuple[int, int]:
    """How many more steps of warm-up and how many timed ones fit into ``seconds``: all, or a quarter and the rest."""
    fit = int(seconds / max(step_s, 1e-9))
    if fit >= warmup + steps:
        return max(0, warmup), steps
    extra = max(0, min(warmup, fit // 4))
    return extra, max(min(LEAST_STEPS, steps), min(steps, fit - extra))


def timed(
    model: nn.Module, step: Callable, batch: dict[str, Tensor], device: torch.device, steps: int, *, fresh: bool
) -> dict[str, Any]:
    """Milliseconds of each step, and memory: the most that tensors took (weights and gradients included; ``fresh``: from here
    on), that the allocator held, and that the device lacks at the end (communicators and other processes included).
    """
    cuda = device.type == "cuda"
    common.drop_gradients(model)
    if cuda and fresh:
        torch.cuda.reset_peak_memory_stats(device)
    took = common.Timing()
    for _ in range(steps):
        common.drop_gradients(model)
        took.steps_ms.append(common.time_once(lambda: common.train_step(step, batch), device))
    common.drop_gradients(model)
    memory: dict[str, Any] = {"peak_gib": None, "reserved_gib": None, "device_gib": None}
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        memory = {
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
            "device_gib": (total - free) / 2**30,
        }
    return {"median_ms": took.median_ms, "steps_ms": took.steps_ms, **memory}


def _fail(here: Rank, row: Row) -> None:
    """For tests: the rank that ``job.fail`` names runs out of memory, has an error, or stays away from the others' collective."""
    if not here.job.fail:
        return
    kind, who, rank, name = here.job.fail.split(":")
    if (who, int(rank), name) == (here.job.contender, here.rank, str(row)):
        if kind == "hang":
            time.sleep(1e6)
        raise torch.OutOfMemoryError("told to") if kind == "memory" else RuntimeError("told to")
