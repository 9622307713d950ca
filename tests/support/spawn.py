"""Runs a function on several gloo ranks of this machine: ``run(fn, world_size, *args)``; loopback only, no GPU.

    from tests.support.spawn import run

    def cases(rank, world_size, seed):
        ...                        # the default process group is initialized; returns anything torch.save takes

    results = run(cases, 2, 0)     # [what rank 0 returned, what rank 1 returned]

Ranks are forked from a server that has imported torch, Transformers and moefx and has captured a model, which takes a new process
15 seconds. Each job has its own processes, so no state of one job is left in the next: no process group, no global, no hung rank.
The first job starts the server; the processes of one pytest share it (they find its socket by ``ADDRESS``, which
tests/conftest.py sets), and it ends when the last of them has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
#: Timeout in seconds of the server's imports, on a loaded machine.
START = 300.0
#: The environment variable with the path of the server's socket.
ADDRESS = "MOEFX_TESTS_RANKS"


def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, all_calls: bool = False) -> list[Any]:
    """Runs ``fn(rank, world_size, *args)``, a module-level function of any file, and returns the result of each rank.

    Families named in ``args`` are captured once, for all ranks: see :func:`capture_cache.prepare` for ``all_calls``.

    Raises:
        RuntimeError: with the traceback of the rank that failed first (the others usually fail as a consequence).
        TimeoutError: some rank did not return within ``timeout`` seconds; all were stopped.
    """
    return _run(fn, world_size, args, timeout, group=True, known=set(_strings(args)), all_calls=all_calls)


def run_script(
    path: Path, args: list[str], world_size: int = 1, *, folder: Path, torchrun: bool | None = None, timeout: float = 300.0
) -> str:
    """Runs a script as the main program in ``folder``; returns what it printed.

    ``torchrun``: with the environment that torchrun gives its ranks; by default if there are several.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _run(
        _script,
        world_size,
        (str(path), args, str(folder), port, torchrun),
        timeout,
        group=False,
        known={"examples"},
        all_calls=True,
    )
    return "".join((folder / f".printed-{rank}").read_text() for rank in range(world_size))


def _script(rank: int, world_size: int, path: str, args: list[str], folder: str, port: int, torchrun: bool | None) -> None:
    os.chdir(folder)
    os.dup2(os.open(f".printed-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    if world_size > 1 if torchrun is None else torchrun:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({k: str(v) for k, v in where.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [path, *args]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{path} ended with exit code {end.code}") from end


def _strings(args: Any) -> Iterator[str]:
    """All strings in a test's arguments, among them the families that its ranks will build."""
    for arg in args.values() if isinstance(args, dict) else args:
        if isinstance(arg, str):
            yield arg
        elif isinstance(arg, (list, tuple, dict)):
            yield from _strings(arg)


def _run(
    fn: Callable[..., Any], world_size: int, args: tuple, timeout: float, *, group: bool, known: set[str], all_calls: bool
) -> list[Any]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        job = (fn.__code__.co_filename, fn.__qualname__, world_size, folder, args, group)
        ended = _Server.current().ask(job, timeout, known, all_calls)
        if ended not in ("", "late"):
            raise RuntimeError(f"{ended} of {world_size} ended without an error message")
        failures = sorted(Path(folder).glob("error-*"), key=lambda p: float(p.read_text().split("\n", 1)[0]))
        if failures:
            rank, text = failures[0].name.removeprefix("error-"), failures[0].read_text().split("\n", 1)[1]
            raise RuntimeError(f"rank {rank} of {world_size} failed first:\n{text}")
        if ended == "late":
            raise TimeoutError(f"{fn.__qualname__} did not return on all {world_size} ranks within {timeout:.0f} s")
        return [torch.load(Path(folder, f"result-{r}"), weights_only=False) for r in range(world_size)]


class _Server:
    """The connection to the server, this file as a process of its own; starts it if it does not run."""

    _one: _Server | None = None

    @classmethod
    def current(cls) -> _Server:
        if cls._one is None:
            cls._one = cls()
        return cls._one

    def __init__(self) -> None:
        path = Path(os.environ.setdefault(ADDRESS, str(Path(tempfile.mkdtemp(prefix="moefx-ranks-"), "socket"))))
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self.connection = Client(str(path))
            except OSError:  # there is none yet, or it has ended
                path.unlink(missing_ok=True)
                self.connection = self._start(path)
        self._read(START, "import what the ranks need")

    @staticmethod
    def _start(path: Path) -> Connection:
        # one thread, so that it may fork; no GPU, for a process that has seen one may not
        one = {n: "1" for n in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **one, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen([sys.executable, __file__, str(path)], env=environment, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(OSError):
                return Client(str(path))
            time.sleep(0.05)
        raise RuntimeError(f"the ranks' server ended at once (exit code {process.returncode})")

    def ask(self, job: tuple, timeout: float, known: set[str], all_calls: bool) -> str:
        """Empty when all ranks have ended, "late" when some had to be stopped, else the rank that ended without an error message."""
        self.connection.send((job, timeout, known, all_calls))
        return self._read(START + timeout, "answer")  # it may have to prepare families first

    def _read(self, seconds: float, what: str) -> Any:
        with contextlib.suppress(EOFError, ConnectionError):
            if self.connection.poll(seconds):
                return self.connection.recv()
        type(self)._one = None
        raise RuntimeError(f"the ranks' server did not {what} within {seconds:.0f} s, or it ended")


# --- in the server ---------------------------------------------------------------------------------------------------


def _serve(path: str) -> None:
    from tests.support import capture_cache

    os.dup2(2, 1)  # what ranks print is captured with the test's output
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        _warm_up()
        gc.freeze()  # memory that the collector does not touch stays shared with the ranks
        clients: list[Any] = []
        while True:
            for ready in wait([listener, *clients], timeout=1.0):
                if ready is listener:
                    clients.append(Connection(listener.accept()[0].detach()))
                    clients[-1].send("ready")
                    continue
                try:
                    job, timeout, known, all_calls = ready.recv()
                except (EOFError, ConnectionError):
                    clients.remove(ready)
                    if not clients:
                        return
                else:
                    capture_cache.prepare(known, all_calls=all_calls)
                    gc.freeze()
                    _in_a_process(lambda: ready.send(_run_ranks(job, timeout, [listener, *clients])))  # noqa: B023
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _in_a_process(do: Callable[[], None]) -> None:
    """Forks a process that waits for the ranks of a job, while the server takes other jobs."""
    if os.fork() == 0:
        try:
            do()
        finally:
            os._exit(0)


def _warm_up() -> None:
    """Imports and traces what every rank would."""
    import torch

    import moefx.trainer  # noqa: F401 (with peft, datasets and more)
    from tests.support import capture_cache

    torch.set_num_threads(1)
    capture_cache.start()
    capture_cache.prepare({"qwen3_moe"}, all_calls=True)


def _run_ranks(job: tuple, timeout: float, inherited: list[Any]) -> str:
    ranks: dict[int, int] = {}
    for rank in range(job[2]):
        pid = os.fork()
        if pid == 0:
            _rank(rank, inherited, *job)
        ranks[pid] = rank
    deadline, running, codes = time.monotonic() + timeout, dict(ranks), {}
    try:
        while running and time.monotonic() < deadline:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                rank = running.pop(pid)
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:  # the others will fail too: let the first error be written
                    deadline = min(deadline, time.monotonic() + 0.2)
            else:
                time.sleep(0.005)
    finally:
        for pid in ranks:  # a rank leads a process group: its children end with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in running:
            os.waitpid(pid, 0)
    reported = {int(p.name.removeprefix("error-")) for p in Path(job[3]).glob("error-*")}
    silent = [f"rank {rank} (exit code {code})" for rank, code in codes.items() if code and rank not in reported]
    return silent[0] if silent else "late" if running else ""


def _rank(
    rank: int, inherited: list[Any], file: str, name: str, world_size: int, folder: str, args: tuple, group: bool
) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        for stream in inherited:
            os.close(stream.fileno())
        import torch
        import torch.distributed as dist

        # The first call after a fork replaces torch's thread pool without a lock: it must not come from two autograd threads.
        torch.set_num_threads(1)
        # by file, not by module name: in pytest's importlib mode test modules are not importable by name
        spec = importlib.util.spec_from_file_location("ranks_of_" + Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if group:
            store, limit = f"file://{folder}/store", timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
        torch.save(getattr(module, name)(rank, world_size, *args), Path(folder, f"result-{rank}"))
        if group:
            dist.barrier()  # no rank closes a connection that a slower rank still reads
            dist.destroy_process_group()
        code = 0
    except BaseException:
        now = time.time()
        Path(folder, f"part-{rank}").write_text(f"{now}\n{traceback.format_exc()}")
        Path(folder, f"part-{rank}").rename(Path(folder, f"error-{rank}"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips the server's exit handlers


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder
    _serve(sys.argv[1])
