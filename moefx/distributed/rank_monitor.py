"""Which rank is lost? Collectives only say that somebody closed a connection, or nothing until the group's timeout.

A thread in every rank beats in the process group's store and watches its neighbour, a ring: three small requests a beat,
whatever the number of ranks. The first cause that anybody finds (a rank without a beat, or an exception that ended one) goes
into the store; all ranks read it there, raise or print it, and end.
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
_GRACE = 10  #: seconds, from the cause being known, for the main thread to end by itself
_LEFT = 1 << 40  #: added to the beats of a rank that ended as it should
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|process ?group|watchdog|timed out|timeout", re.I)


def watch(lost_after: float = 60.0) -> None:
    """Watches, from now on, that all ranks live. All ranks call it; ``moefx.parallelize`` does. A second call changes nothing.

    A rank that gives no sign of life for ``lost_after`` seconds is lost; for a rank whose collective has failed already, five
    seconds are enough to say who it was. The error is a ``RankLostError`` where moefx runs the collective (forward, clipping,
    saving), else a line after the traceback. A rank that still waits ten seconds after the cause is known ends with exit code 1
    and its stack. An uncaught exception of one rank is a cause too, and ends the others.

    Raises:
        MoefxError: there is no process group.
    """
    global _watcher
    if not dist.is_available() or not dist.is_initialized():
        raise MoefxError("there are no ranks to watch: call torch.distributed.init_process_group() before")
    if not lost_after > 0:
        raise MoefxError(f"lost_after={lost_after!r} is not a number of seconds")
    if dist.get_backend() == "fake" or dist.get_world_size() == 1:
        return
    if _watcher is not None and _watcher.group_is_there():
        return
    if _watcher is None:
        atexit.register(_leave)
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
    """Who was lost, if that is why ``error`` happened; waits until somebody knows."""
    if _watcher is None or isinstance(error, RankLostError) or not _is_collectives(error):
        return None
    return _watcher.find_cause()


def _is_collectives(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(str(error))))


class _Watcher(threading.Thread):
    """One for a process group: beats, looks at others, and knows the cause once there is one."""

    def __init__(self, lost_after: float):
        super().__init__(name="moefx-ranks", daemon=True)
        self.group, self.rank, self.world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        default: Any = _get_default_store()
        self.store = default.clone()  # a connection of its own: the main thread may wait long in the other
        self.store.set_timeout(timedelta(seconds=10))
        self.lost_after, self.interval = lost_after, min(1.0, lost_after / 10)
        self.cause: str | None = None
        self.known, self.failed, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.kept: Any = None  #: in rank 0, once there is a cause: the store, which goes with its last reference
        self.seen: dict[int, tuple[int, float]] = {}  #: beats of a rank, and when it had that many first
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
                    self._needs_no_more(rank)
                    self._write_cause(f"rank {rank} is lost: {silence} ({self._who(rank)})")
                answered = time.monotonic()
            except RuntimeError:  # the store is the first rank's, or torchrun's on its machine
                if time.monotonic() - answered > self._patience() and self.group_is_there():
                    # or it has ended as it should and others work on: this alone ends nobody
                    self._know("rank 0 is lost, or its machine: the store that is kept there does not answer")
                    return
            if self.known.is_set():
                return self._end_if_stuck()
        self.leave()

    def group_is_there(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self.group

    def _beat(self) -> None:
        self.store.add(f"{_KEY}/beats/{self.rank}", 1)

    def _patience(self) -> float:
        return min(self.lost_after, 5.0) if self.failed.is_set() else self.lost_after

    def _lost(self) -> list[int]:
        """The neighbour, and who comes after it, as long as they are silent; everybody, once a collective failed here."""
        found = []
        for step in range(1, self.world):
            rank = (self.rank + step) % self.world
            beats, now = self.store.add(f"{_KEY}/beats/{rank}", 0), time.monotonic()
            if beats != self.seen.get(rank, (-1, 0.0))[0]:
                self.seen[rank] = (beats, now)
            lives = beats == 0 or beats >= _LEFT or self._silence(rank) <= self._patience()
            if not lives:
                found.append(rank)
            elif beats < _LEFT and not self.failed.is_set():
                break
        return found

    def _silence(self, rank: int) -> float:
        return time.monotonic() - self.seen[rank][1]

    def _who(self, rank: int) -> str:
        return self.store.get(f"{_KEY}/who/{rank}").decode()

    def _read_cause(self) -> None:
        if self.store.check([f"{_KEY}/cause"]):
            self._know(self.store.get(f"{_KEY}/cause").decode())
            self._needs_no_more(self.rank)

    def _needs_no_more(self, rank: int) -> None:
        """It knows the cause, is lost or has ended: of the store it reads nothing any more. Several may say so of one rank."""
        if self.store.add(f"{_KEY}/done/{rank}", 1) == 1:
            self.store.add(f"{_KEY}/done", 1)

    def _write_cause(self, text: str) -> None:
        """The first to write it wins: what others see are mostly consequences."""
        if self.store.add(f"{_KEY}/causes", 1) == 1:
            self.store.set(f"{_KEY}/cause", text)
        self._read_cause()

    def _know(self, text: str) -> None:
        if self.rank == 0 and self.group_is_there():
            self.kept = _get_default_store()  # whatever destroys the group on the way out
        self.cause = text
        self.known.set()

    def _end_if_stuck(self) -> None:
        """Collectives that wait for a lost rank do not come back before the group's timeout: nobody should wait for it."""
        sys.stderr.write(f"moefx: {self.cause}; rank {self.rank} ends too, in {_GRACE} s at the latest\n")
        faulthandler.dump_traceback_later(_GRACE, exit=True, file=2)  # needs no Python: the main thread may hold its lock

    # --- in the main thread ---

    def find_cause(self) -> str | None:
        """Waits as long as it takes to find a lost rank after a collective failed."""
        self.failed.set()
        self.known.wait(self._patience() + 3 * self.interval + 1.0)
        return self.cause

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank ends by an exception of its own."""
        with contextlib.suppress(RuntimeError):
            text = str(error).strip().split("\n")[0]
            self._write_cause(f"rank {self.rank} failed: {type(error).__name__}: {text} ({self._who(self.rank)})")

    def wait_for_readers(self) -> None:
        """Rank 0 ends after the others have read the cause, which is in a store of its own: else they only see that go."""
        until = time.monotonic() + _GRACE / 2
        with contextlib.suppress(RuntimeError):
            while self.store.add(f"{_KEY}/done", 0) < self.world and time.monotonic() < until:
                time.sleep(0.05)

    def leave(self) -> None:
        """Tells the others that this rank ends as it should."""
        if not self.known.is_set() and not self.ended.is_set():
            self.ended.set()
            with contextlib.suppress(RuntimeError):
                self.store.add(f"{_KEY}/beats/{self.rank}", _LEFT)
                self._needs_no_more(self.rank)


_watcher: _Watcher | None = None


def _leave() -> None:
    if _watcher is None:
        return
    if _watcher.rank == 0 and _watcher.known.is_set():
        _watcher.wait_for_readers()
    _watcher.leave()


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
