"""Finds the lost rank. Collectives only report a closed connection, or nothing until the group's timeout.

A thread in every rank sends heartbeats to the process group's store and watches its neighbour (a ring): three small requests
per heartbeat, for any number of ranks. The first cause that a rank finds (a rank without heartbeats, or an exception that
ended one) is written to the store; all ranks read it there, raise or print it, and exit.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from moefx.errors import MoefxError, RankLostError

_KEY = "moefx/ranks"
_GRACE = 10  #: seconds that the main thread has to end by itself, once the cause is known
_FINISHED = 1 << 40  #: added to the heartbeats of a rank that ended normally
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|process ?group|watchdog|timed out|timeout", re.I)


def watch(lost_after: float = 60.0) -> None:
    """Monitors that all ranks are alive. All ranks call it; ``moefx.parallelize`` does. A second call has no effect.

    A rank without a heartbeat for ``lost_after`` seconds is lost; on a rank whose collective has failed, after five seconds.
    The error is a ``RankLostError`` where moefx runs the collective (forward, clipping, saving), elsewhere a line after the
    traceback. A rank that still waits ten seconds after the cause is known exits with code 1 and prints its stack. An uncaught
    exception of one rank is a cause too, and ends the others.

    Raises:
        MoefxError: there is no process group.
    """
    global _watcher
    if not dist.is_available() or not dist.is_initialized():
        raise MoefxError("there is no process group to watch: call torch.distributed.init_process_group() before")
    if not lost_after > 0:
        raise MoefxError(f"lost_after={lost_after!r} is not a number of seconds")
    if dist.get_backend() == "fake" or dist.get_world_size() == 1:
        return
    if _watcher is not None and _watcher.group_is_there():
        return
    if _watcher is None:
        atexit.register(_finish)
        sys.excepthook = _on_uncaught(sys.excepthook)
    _watcher = _Watcher(lost_after)
    _watcher.start()


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Within: the error of a collective that failed because a rank is lost is a ``RankLostError`` that says which."""
    try:
        yield
    except RuntimeError as error:
        cause = _cause_of(error)
        if cause is None:
            raise
        raise RankLostError(cause) from error


def _cause_of(error: BaseException) -> str | None:
    """The lost rank, if that is the cause of ``error``; waits until it is known."""
    if _watcher is None or isinstance(error, RankLostError) or not _is_of_a_collective(error):
        return None
    return _watcher.find_cause()


def _is_of_a_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(str(error))))


class _Watcher(threading.Thread):
    """The thread of a process group: sends heartbeats, watches a neighbour, and keeps the cause once there is one."""

    def __init__(self, lost_after: float):
        super().__init__(name="moefx-ranks", daemon=True)
        self.group, self.rank, self.world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        default: Any = _get_default_store()
        self.store = default.clone()  # a connection of its own: the main thread may block in the other
        self.store.set_timeout(timedelta(seconds=10))
        self.lost_after, self.interval = lost_after, min(1.0, lost_after / 10)
        self.cause: str | None = None
        self.known, self.failed, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.kept: Any = None  #: in rank 0, once there is a cause: the store, which ends with its last reference
        self.seen: dict[int, tuple[int, float]] = {}  #: heartbeats of a rank, and when that number was first seen
        self.store.set(f"{_KEY}/who/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._beat()

    # --- in the thread ---

    def run(self) -> None:
        answered = time.monotonic()
        while not self.ended.wait(self.interval) and self.group_is_there():
            try:
                self._beat()
                self._read_cause()
                for rank in self._lost():
                    silence = f"no sign of life for {self._silence(rank):.0f} s"
                    self._is_done(rank)
                    self._write_cause(f"rank {rank} is lost: {silence} ({self._who(rank)})")
                answered = time.monotonic()
            except RuntimeError:  # the store is the first rank's, or torchrun's on its machine
                if time.monotonic() - answered > self._patience() and self.group_is_there():
                    # or it ended normally while others go on: this alone ends no rank
                    self._know("rank 0 is lost, or its machine: the process group's store there does not answer")
                    return
            if self.known.is_set():
                return self._end_if_stuck()
        self.finish()

    def group_is_there(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self.group

    def _beat(self) -> None:
        self.store.add(f"{_KEY}/beats/{self.rank}", 1)

    def _patience(self) -> float:
        return min(self.lost_after, 5.0) if self.failed.is_set() else self.lost_after

    def _lost(self) -> list[int]:
        """The neighbour and those after it, as long as they are silent; all silent ranks, once a collective has failed here."""
        found = []
        for step in range(1, self.world):
            rank = (self.rank + step) % self.world
            beats, now = self.store.add(f"{_KEY}/beats/{rank}", 0), time.monotonic()
            if beats != self.seen.get(rank, (-1, 0.0))[0]:
                self.seen[rank] = (beats, now)
            lives = beats == 0 or beats >= _FINISHED or self._silence(rank) <= self._patience()
            if not lives:
                found.append(rank)
            elif beats < _FINISHED and not self.failed.is_set():
                break
        return found

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self.seen[rank][1]

    def _who(self, rank: int) -> str:
        return self.store.get(f"{_KEY}/who/{rank}").decode()

    def _read_cause(self) -> None:
        if self.store.check([f"{_KEY}/cause"]):
            self._know(self.store.get(f"{_KEY}/cause").decode())
            self._is_done(self.rank)

    def _is_done(self, rank: int) -> None:
        """``rank`` knows the cause, is lost or has ended, and will not read the store again. Several ranks may report it."""
        if self.store.add(f"{_KEY}/done/{rank}", 1) == 1:
            self.store.add(f"{_KEY}/done", 1)

    def _write_cause(self, text: str) -> None:
        """The first cause is kept: later ones are mostly its consequences."""
        if self.store.add(f"{_KEY}/causes", 1) == 1:
            self.store.set(f"{_KEY}/cause", text)
        self._read_cause()

    def _know(self, text: str) -> None:
        if self.rank == 0 and self.group_is_there():
            self.kept = _get_default_store()  # even if the process group is destroyed at exit
        self.cause = text
        self.known.set()

    def _end_if_stuck(self) -> None:
        """Collectives that wait for a lost rank do not return before the group's timeout: the process exits earlier."""
        sys.stderr.write(f"moefx: {self.cause}; rank {self.rank} ends too, in {_GRACE} s at the latest\n")
        faulthandler.dump_traceback_later(_GRACE, exit=True, file=2)  # works while the main thread holds the GIL

    # --- in the main thread ---

    def find_cause(self) -> str | None:
        """The cause of a failed collective, or None; waits as long as it takes to find a lost rank."""
        self.failed.set()
        self.known.wait(self._patience() + 3 * self.interval + 1.0)
        return self.cause

    def fail(self, error: BaseException) -> None:
        """Reports to the other ranks that this one ends by an exception."""
        with contextlib.suppress(RuntimeError):
            text = str(error).strip().split("\n")[0]
            self._write_cause(f"rank {self.rank} failed: {type(error).__name__}: {text} ({self._who(self.rank)})")

    def wait_for_readers(self) -> None:
        """Rank 0 hosts the store: it waits until the others have read the cause, or they would only lose their connection."""
        until = time.monotonic() + _GRACE / 2
        with contextlib.suppress(RuntimeError):
            while self.store.add(f"{_KEY}/done", 0) < self.world and time.monotonic() < until:
                time.sleep(0.05)

    def finish(self) -> None:
        """Reports to the other ranks that this one ends normally."""
        if not self.known.is_set() and not self.ended.is_set():
            self.ended.set()
            with contextlib.suppress(RuntimeError):
                self.store.add(f"{_KEY}/beats/{self.rank}", _FINISHED)
                self._is_done(self.rank)


_watcher: _Watcher | None = None


def _finish() -> None:
    if _watcher is None:
        return
    if _watcher.rank == 0 and _watcher.known.is_set():
        _watcher.wait_for_readers()
    _watcher.finish()


def _on_uncaught(before: Callable) -> Callable:
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        cause = error.args[0] if isinstance(error, RankLostError) else _cause_of(error)
        before(kind, error, trace)
        if _watcher is None or isinstance(error, KeyboardInterrupt):
            return
        if cause is not None and not isinstance(error, RankLostError):
            sys.stderr.write(f"moefx: {cause}; rank {_watcher.rank} ends because of that\n")
        elif cause is None:
            _watcher.fail(error)

    return hook
