"""Training steps of whole models over the GPUs of one machine: Transformers with FSDP2, with its own expert parallelism, and
moefx with one, on the same weights and tokens.

    python benchmarks/multi_gpu.py --model qwen3_30b --gpus 8
    torchrun --nproc-per-node 8 benchmarks/multi_gpu.py --model nemotron_nano       # the same: the first rank starts all others
    python benchmarks/multi_gpu.py --model tiny --device cpu --gpus 2 --seq 64      # does it run?

Weights are random, at full depth, built on the meta device: a rank holds its shards and never a whole model. Each contender runs
in processes of its own, so that one which fails or hangs is a result and leaves nothing behind. The JSON is written after every
row. Exit code 1 if a check of moefx fails, a row of it failed, or, on 8 GPUs, a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import checks
import common
import contenders
import sketch
import torch
import torch.multiprocessing as mp
from contenders import CONTENDERS, EXACT, Job, Row
from models import MODELS

#: Goals on 8 GPUs: times the speed of a contender, and the share of its peak memory that is not needed.
TARGETS = {"hf_fsdp": 5.0, "hf_ep": 1.3}
MEMORY_TARGET = 0.38
#: What rows of one result have in common.
SETTINGS = ("model", "layers", "gpus", "seq", "dtype", "device", "warmup", "steps", "check_seq", "recompute", "compile")
#: Seconds in which other ranks may report a failure that came before the first report.
GRACE = 1.0
#: Seconds after the budget in which a row may end that was begun in time.
OVERTIME = 30.0
#: What CPU ranks are forked with. (The server of Python 3.11 does not look where this file lies.)
PRELOAD = (
    "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.auto.modeling_auto", "transformers.distributed",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers.models.nemotron_h.modeling_nemotron_h", "moefx",
    "moefx.passes",
)  # fmt: skip
#: The sketches of equal weights differ by the order of float32 sums.
SAME_WEIGHTS = 1e-4


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3_30b")
    parser.add_argument("--layers", type=int, help="fewer than the published model's")
    parser.add_argument("--gpus", type=int, help="ranks (default: torchrun's, else the GPUs that there are)")
    parser.add_argument("--contenders", help=f"in this order, of {', '.join(CONTENDERS)} (default: all; the CPU has no graphs)")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4], help="sequences of a rank's batch")
    parser.add_argument("--routing", nargs="+", choices=("balanced", "real"), default=["balanced", "real"])
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--recompute",
        choices=("auto", "always", "never"),
        default="auto",
        help="gradient checkpointing; auto: where a row ran out of memory without it",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="loss and all gradients against Transformers in fp32",
    )
    parser.add_argument("--check-seq", type=int, default=1024)
    parser.add_argument("--transport", choices=("auto", "deepep", "nccl"), default="auto", help="of moefx")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="moefx's functions")
    parser.add_argument("--budget", type=float, default=3600, help="seconds: rows take fewer steps or are left out")
    parser.add_argument("--patience", type=float, default=180, help="seconds without news after which ranks count as hung")
    parser.add_argument(
        "--resume", action="store_true", help="keep what its details have, from this machine and these settings"
    )
    parser.add_argument("--name", help="of the JSON file")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="its folder")
    parser.add_argument("--fail", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    usual = [c for c in CONTENDERS if args.device == "cuda" or "graph" not in c]
    args.contenders = usual if args.contenders is None else [c for c in args.contenders.split(",") if c]
    unknown = set(args.contenders) - set(CONTENDERS)
    if unknown:
        parser.error(f"no contender is named {sorted(unknown)[0]!r}; there are {', '.join(CONTENDERS)}")
    args.layers = args.layers or MODELS[args.model].layers
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: pass --device cpu --model tiny")
    args.gpus = args.gpus or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or torch.cuda.device_count() or 2
    args.check_seq = min(args.check_seq, args.seq)
    args.name = args.name or f"multi_gpu-{args.model.replace('_', '-')}-{args.gpus}x-{common.slug(_device_name(args.device))}"
    return args


def _device_name(device: str) -> str:
    """Asked of the driver's tool: this process stays off the GPUs, whose memory is the ranks'."""
    if device != "cuda":
        return device
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
    return device


class Run:
    """What is measured so far, what is left, and the time for it."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = time.time() + args.budget
        self.path = args.out / f"{args.name}.json"
        # a run's own, that --resume finds again: two at once with one name and other folders must not read each other's checks
        whose = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir(), f"moefx-{args.name}-{os.getuid()}-{whose}")
        settings = {k: v for k, v in vars(args).items() if k in SETTINGS}
        self.record: dict[str, Any] = {
            "machine": {},
            "boot": _boot(),
            "settings": settings,
            "contenders": {},
            "rows": [],
            "failed": [],
            "skipped": [],
            "checks": {},
            "problems": [],
        }
        if args.resume and common.details_of(self.path).exists():
            self._resume()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def _resume(self) -> None:
        before = json.loads(common.details_of(self.path).read_text())
        for what in ("boot", "settings"):
            if before[what] != json.loads(json.dumps(self.record[what])):
                raise SystemExit(
                    f"{self.path.name} is of another {'machine' if what == 'boot' else 'run'}, with {what} "
                    f"{before[what]}, not {self.record[what]}: leave --resume out"
                )
        self.record = {**before, "skipped": [], "problems": []}
        common.say(f"{len(before['rows'])} rows are there already")

    # --- the order of work ---------------------------------------------------------------------------------------------

    def go(self) -> int:
        args = self.args
        everyone = [Row(r, b, args.recompute == "always") for r in args.routing for b in args.mbs]
        todo = {c: [r for r in everyone if not self._row(c, r.routing, r.mbs)] for c in args.contenders}
        if any(todo.values()) and self._owed(EXACT):
            self._contender(EXACT, [], 0.0)
        for i, name in enumerate(args.contenders):
            if todo[name]:
                self._contender(name, todo[name], later=sum(_weight(todo[n]) for n in args.contenders[i + 1 :]))
        self.save()
        show(self.record)
        return common.verdict(self.record["problems"])

    def _row(self, contender: str, routing: str, mbs: int) -> dict[str, Any] | None:
        rows = self.record["rows"]
        return next((r for r in rows if (r["who"], r["routing"], r["mbs"]) == (contender, routing, mbs)), None)

    def _owed(self, contender: str) -> list[str]:
        """The routings in which it is to be checked and has not been."""
        job = self._job(contender, [])
        return [r for r in self.args.routing if self.args.check and not contenders.check_file(job, contender, r).exists()]

    def _job(
        self, contender: str, rows: Sequence[Row], until: float = 0.0, check: Sequence[str] = (), transport: str = ""
    ) -> Job:
        a = self.args
        return Job(
            contender,
            a.model,
            a.layers,
            tuple(rows),
            a.seq,
            a.dtype,
            a.device,
            a.warmup,
            a.steps,
            until,
            str(self.folder),
            tuple(check),
            a.check_seq,
            a.compile,
            transport or a.transport,
            a.fail,
        )

    def _contender(self, name: str, rows: list[Row], later: float) -> None:
        """All rows of a contender: by new processes as often as some fail. ``later``: the weight of what comes after them."""
        transport, errors = self.args.transport, 0
        while rows or self._owed(name):  # a row that fails must not keep those before it from being checked
            if time.time() >= self.end:
                self._skip(name, rows, f"the budget of {self.args.budget:.0f} s was used up")
                return
            until = time.time() + (self.end - time.time()) * (_weight(rows) or 1) / ((_weight(rows) or 1) + later)
            common.say(f"{name}: {CONTENDERS.get(name, 'Transformers in fp32')}")
            left, failure = self._launch(self._job(name, rows, until, self._owed(name), transport))
            if failure is None:
                self._skip(name, left, "its time was used up")
                return
            self.record["failed"].append({"who": name, **failure})
            common.say(f"  failed at {failure['row'] or failure['during']}: {failure['why']}")
            self.save()
            failed = next((r for r in left if str(r) == failure["row"]), None)
            if failure["kind"] == "memory" and failed and not failed.recompute and self.args.recompute == "auto":
                # the same with gradient checkpointing, and so for the rows that need as much or more
                left = [replace(r, recompute=True) if r.mbs >= failed.mbs else r for r in left]
            elif self.record["contenders"].get(name, {}).get("transport") == "deepep" and transport == "auto":
                common.say("  once more without DeepEP")
                transport = "nccl"
            elif failed:
                left.remove(failed)
                errors += failure["kind"] != "memory"
            else:
                return
            if errors > 1:
                self._skip(name, left, "two rows of it failed")
                left = []
            rows = left

    def _skip(self, name: str, rows: Sequence[Row], why: str) -> None:
        for row in rows:
            self.record["skipped"].append({"who": name, "row": str(row), "why": why})
            common.say(f"  {name}, {row}: left out, {why}")

    # --- the ranks of a contender ----------------------------------------------------------------------------------------

    def _launch(self, job: Job) -> tuple[list[Row], dict[str, Any] | None]:
        """Starts the ranks and follows them; the rows that were not measured, and what failed first."""
        # a forked process cannot use CUDA if its parent has, and importing may: there, new ones
        method = "spawn" if job.device == "cuda" else "forkserver"
        if method == "forkserver":
            multiprocessing.get_context(method).set_forkserver_preload(list(PRELOAD))
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(self.args.gpus)]
        readers, writers = [r for r, _ in pipes], [w for _, w in pipes]
        ranks = mp.start_processes(
            contenders.main, (self.args.gpus, _free_port(), job, writers), self.args.gpus, join=False, start_method=method
        )
        for w in writers:
            w.close()  # so that a pipe ends with its rank
        follow = _Follower(self, job)
        try:
            while readers and not follow.over:
                for reader in wait(readers, timeout=0.5):
                    try:
                        follow.event(*reader.recv())
                        while reader.poll():  # what a rank said before another's failure counts, however late it is heard
                            follow.event(*reader.recv())
                    except (EOFError, ConnectionError):
                        readers.remove(reader)
                follow.tick()
        finally:
            self._stop(ranks, gracefully=follow.finished)
        if not follow.finished and follow.failure is None:
            codes = {i: p.exitcode for i, p in enumerate(ranks.processes)}
            follow.fail("error", f"a rank ended without a word, exit codes {codes}", follow._row())
        return follow.left, follow.failure

    @staticmethod
    def _stop(ranks: Any, gracefully: bool) -> None:
        """No rank of this contender runs afterwards."""
        limit = time.time() + (20 if gracefully else 0)
        for p in ranks.processes:
            p.join(max(0.0, limit - time.time()))
        for p in ranks.processes:
            if p.is_alive():
                p.kill()
        for p in ranks.processes:
            p.join()

    # --- what comes of it --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.summarize()  # a run that is cut off leaves its speed-ups too
        self.record["seconds"] = common.elapsed()
        common.write(self.path, self.record)

    def compare(self, name: str, routing: str, said: dict[str, Any]) -> None:
        """A contender's loss and gradients against fp32's and against those of Transformers with FSDP2."""
        job = self._job(name, [])

        def load(who: str, rank: int | None = None) -> Any:
            path = contenders.check_file(job, who, routing, rank)
            return torch.load(path) if path.exists() else None

        found, wanted, peer = load(name), load(EXACT), load("hf_fsdp")
        record: dict[str, Any] = {"loss": found["loss"], "norm": found["norm"], "problems": []}
        self.record["checks"].setdefault(routing, {})[name] = record
        if wanted is None:
            record["problems"].append("there is no reference in fp32 to compare with")
            return
        weights = common.distances(wanted["weights"], found["weights"])
        far = max(weights, key=lambda n: weights[n])
        if not weights[far] <= SAME_WEIGHTS:
            record["problems"].append(f"not the same weights: {far} is {weights[far]:.1e} from the reference's")
        distance = {w: common.distances(wanted["gradients"], f["gradients"]) for w, f in (("own", found), ("hf", peer)) if f}
        gap = {w: abs(f["loss"] - wanted["loss"]) / abs(wanted["loss"]) for w, f in (("own", found), ("hf", peer)) if f}
        flips = [checks.flipped(load(EXACT, r), load(name, r)) for r in range(self.args.gpus)]
        shares = [statistics.fmean(layer) for layer in zip(*flips)]
        record |= {
            "against fp32": common.spread(distance["own"]),
            "loss_gap": gap["own"],
            "other_experts": statistics.fmean(shares),
        }
        if peer is None:
            record["problems"].append("hf_fsdp has no check: nothing says how far rounding alone is from fp32")
        elif name != "hf_fsdp":
            apart = common.distances(peer["gradients"], found["gradients"])
            judged = checks.judge(
                distance["hf"],
                distance["own"],
                apart,
                gap["hf"],
                gap["own"],
                sizes=said["sizes"],
                tokens=said["tokens"],
                share=max(shares),
                dtype=getattr(torch, self.args.dtype),
                known=sketch.DRAWS**-0.5,
            )
            record |= {"against hf_fsdp": common.spread(apart), "ratio": judged["ratio"]}
            record["problems"] += judged["problems"]
        verdict = f"{len(record['problems'])} problems: {record['problems'][0]}" if record["problems"] else "ok"
        common.say(
            f"  check, {routing}: loss {found['loss']:.5f} (fp32 {wanted['loss']:.5f}), gradients "
            f"{record['against fp32']['mean']:.1e} from fp32: {verdict}"
        )

    def summarize(self) -> None:
        """Speed-ups, the targets (on 8 GPUs), and what is wrong with moefx."""
        record = self.record
        record["targets"] = []
        for row in record["rows"]:
            row["speedup"] = {}
            for peer in TARGETS:
                other = self._row(peer, row["routing"], row["mbs"])
                if other and peer != row["who"]:
                    row["speedup"][peer] = _speed(row) / _speed(other)
                    if peer == "hf_fsdp" and row["peak_gib"] is not None:
                        row["less_memory"] = 1 - row["peak_gib"] / other["peak_gib"]
        machine = record["machine"]
        if "gpu" in machine and self.args.gpus == 8 and not machine["ranks_share_a_gpu"]:
            record["targets"] = [t for row in record["rows"] if row["who"] == "moefx" for t in _targets(row)]
        missed = [t for t in record["targets"] if not t["reached"]]
        record["problems"] = [f"{t['row']}: {t['found']:.2f} {t['what']}, {t['wanted']} wanted" for t in missed]
        everyone = dict.fromkeys([*record["contenders"], *(x["who"] for x in (*record["failed"], *record["skipped"]))])
        for name in (c for c in everyone if c.startswith("moefx")):
            record["problems"] += self._problems(name)

    def _problems(self, name: str) -> list[str]:
        record = self.record
        found = [f"{name}, {r}: {p}" for r, c in record["checks"].items() for p in c.get(name, {}).get("problems", [])]
        for f in record["failed"]:
            # a row that was measured after all, with recomputation or another transport, is there
            if f["who"] == name and not (f["row"] and self._row(name, f["routing"], f["mbs"])):
                found.append(f"{name}, {f['row'] or f['during']}: {f['why']}")
        timed = dict.fromkeys(r["routing"] for r in record["rows"] if r["who"] == name)
        if not timed:
            found += [f"{name}: nothing of it was measured, {s['why']}" for s in record["skipped"] if s["who"] == name][:1]
        if self.args.check:
            found += [f"{name}, {r}: timed and not checked" for r in timed if name not in record["checks"].get(r, {})]
        return found + [
            f"{name} ran the original forward: {f}" for f in record["contenders"].get(name, {}).get("fallbacks", [])
        ]


class _Follower:
    """Hears what the ranks of one contender say, and notices when they say nothing."""

    def __init__(self, run: Run, job: Job):
        self.run, self.job = run, job
        self.left, self.finished = list(job.rows), False
        self.failures: list[dict[str, Any]] = []
        self.built = False
        self.heard = time.time()

    @property
    def at(self) -> str:
        return "start" if not self.built else "rows" if self.left else "check"

    @property
    def over(self) -> bool:
        return self.finished or (bool(self.failures) and time.time() > self.failures[0]["at"] + GRACE)

    @property
    def failure(self) -> dict[str, Any] | None:
        """The first: the others' collectives fail after it."""
        return min(self.failures, key=lambda f: f["at"], default=None)

    def fail(self, kind: str, why: str, row: Row | None, rank: int | None = None, at: float | None = None) -> None:
        where = {"row": str(row), "routing": row.routing, "mbs": row.mbs} if row else {"row": None}
        at = time.time() if at is None else at
        self.failures.append({"kind": kind, "why": why, "rank": rank, "at": at, "during": self.at, **where})

    def tick(self) -> None:
        now, patience = time.time(), self.run.args.patience
        if now - self.heard > patience:
            self.fail("hang", f"no rank said anything for {patience:.0f} s", self._row())
        elif now > self.run.end + OVERTIME:
            self.fail("hang", "the budget is over", self._row())

    def _row(self) -> Row | None:
        return self.left[0] if self.at == "rows" else None

    def event(self, kind: str, details: Any) -> None:
        self.heard = time.time()
        getattr(self, f"_{kind}")(details)

    def _failed(self, details: dict[str, Any]) -> None:
        if details["kind"] != "memory" and not self.failures:
            print(details["trace"], file=sys.stderr, flush=True)
        self.fail(*(details[k] for k in ("kind", "why", "row", "rank", "at")))

    def _machine(self, details: dict[str, Any]) -> None:
        self.run.record["machine"] = self.run.record["machine"] or details

    def _built(self, details: dict[str, Any]) -> None:
        self.built = True
        self._note(details)
        common.say(
            f"  built in {details['seconds']:.1f} s: {details['parameters'] / 1e9:.2f} billion parameters, "
            f"{details['weights_gib']:.2f} GiB a rank"
        )

    def _checked(self, details: dict[str, Any]) -> None:
        common.say(f"  checking took {details['step_s']:.1f} s for the step, {details['sketch_s']:.1f} s for its sketches")
        if self.job.contender != EXACT:
            self.run.compare(self.job.contender, details["routing"], details)
            self.run.save()

    def _warm(self, details: dict[str, Any]) -> None:
        common.say(
            f"  {details['row']}: warm after {details['seconds']:.1f} s, {details['step_ms']:.1f} ms a step, "
            f"{details['steps']} to come"
        )

    def _skipped(self, details: dict[str, Any]) -> None:
        self.left.remove(details["row"])
        self.run._skip(self.job.contender, [details["row"]], details["why"])

    def _row_done(self, details: dict[str, Any]) -> None:
        row = details.pop("row")
        self.left.remove(row)
        self.run.record["rows"].append({"who": self.job.contender, **asdict(row), **details})
        speed = details["tokens_per_s_per_gpu"]
        peak = "" if details["peak_gib"] is None else f", peak {details['peak_gib']:.2f} GiB"
        common.say(
            f"  {row}: {speed['mean']:.0f} tokens/s a GPU ({speed['min']:.0f} to {speed['max']:.0f}), "
            f"{details['median_ms']:.1f} ms{peak}"
        )
        self.run.save()

    def _finished(self, details: dict[str, Any]) -> None:
        self.finished = True
        self._note(details)

    def _note(self, details: dict[str, Any]) -> None:
        if details.get("transport"):
            common.say(f"  transport: {details['transport']} (DeepEP: {details['deepep_refuses'] or 'usable'})")
        self.run.record["contenders"].setdefault(self.job.contender, {}).update(details)


def _weight(rows: Sequence[Row]) -> float:
    """About how long rows take: starting, and steps of so many sequences."""
    return sum(1 + r.mbs / 2 for r in rows) + 2 if rows else 0.0


def _speed(row: dict[str, Any]) -> float:
    return row["tokens_per_s_per_gpu"]["mean"]


def _targets(row: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = [(f"times {p}", s, TARGETS[p]) for p, s in row["speedup"].items()]
    if "less_memory" in row:
        wanted.append(("less memory than hf_fsdp", row["less_memory"], MEMORY_TARGET))
    at = f"{row['routing']}, mbs {row['mbs']}"
    return [{"row": at, "what": w, "found": f, "wanted": t, "reached": f >= t} for w, f, t in wanted]


def _boot() -> str:
    """Tells this machine, since it was started, from others; says nothing about it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return hashlib.sha256(path.read_bytes() if path.exists() else socket.gethostname().encode()).hexdigest()[:12]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def show(record: dict[str, Any]) -> None:
    rows = []
    for r in sorted(record["rows"], key=lambda r: (r["routing"], r["mbs"])):
        speed, times = r["tokens_per_s_per_gpu"], r.get("speedup", {})
        rows.append(
            (
                r["routing"],
                r["mbs"],
                r["who"] + (" (recomputed)" if r["recompute"] else ""),
                f"{r['median_ms']:.1f}",
                f"{speed['mean']:.0f} ({speed['min']:.0f} to {speed['max']:.0f})",
                "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}",
                r["steps"],
                *(f"{times[p]:.2f}" if p in times else "" for p in TARGETS),
            )
        )
    s = record["settings"]
    common.show(
        f"{s['model']}, {s['layers']} layers, sequence {s['seq']}, {s['gpus']} ranks",
        ("routing", "mbs", "who", "ms", "tokens/s a GPU", "peak GiB", "steps", *(f"x {p}" for p in TARGETS)),
        rows,
    )
    if record["machine"].get("ranks_share_a_gpu"):
        print("ranks share a GPU: these times say nothing")
    for f in record["failed"]:
        print(f"failed: {f['who']}, {f['row'] or f['during']}: {f['why']}")
    for t in record.get("targets", []):
        print(
            f"{'reached' if t['reached'] else 'missed'}: moefx, {t['row']}: {t['found']:.2f} {t['what']}, {t['wanted']} wanted"
        )


def main(given: Sequence[str] | None = None) -> int:
    ranks, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks != here:
        print(f"this benchmark is for one machine: {ranks} ranks were started, {here} of them here")
        return 1
    if int(os.environ.get("RANK", 0)):
        return 0  # the first rank starts a contender's ranks, again and again
    args = arguments(given)
    common.say(
        f"{args.model}, {args.layers} layers, sequence {args.seq}, mbs {args.mbs}, {args.dtype}, {args.gpus} ranks on "
        f"{args.device}, routing {', '.join(args.routing)}"
    )
    return Run(args).go()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the ranks: see Run._launch
    sys.exit(main())
