"""Reports which exchange hangs: NCCL and DeepEP end the process after their timeout, and name neither layer nor counts.

A thread checks, once a second, the exchanges that the host or the device waits for. One that takes longer than ``LIMIT`` of the
process group's timeout is written to stderr: the operation, the layer, the rank and the counts. gloo raises an error itself.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

#: Of a process group's timeout, after which an exchange is reported.
LIMIT = 0.8


class Event(Protocol):
    """A torch.cuda.Event."""

    def query(self) -> bool:
        """Has it happened?"""
        ...


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(eq=False)
class _Waiting:
    text: Callable[[], str]  #: the report
    began: float
    deadline: float
    event: Event | None = None  #: the device waits until it happens; None: the host waits
    reported: bool = False


class HangMonitor:
    """The exchanges that are waited for, oldest first."""

    def __init__(self, report: Callable[[str], None] = _to_stderr, interval: float = 1.0):
        self.report, self.interval = report, interval
        self.waiting: list[_Waiting] = []
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.stopped = threading.Event()

    def _add(self, text: Callable[[], str], timeout: float, event: Event | None) -> _Waiting:
        now = time.monotonic()
        entry = _Waiting(text, now, now + LIMIT * timeout, event)
        with self.lock:
            self.waiting.append(entry)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="moefx-hang-monitor", daemon=True)
                self.thread.start()
                # a thread that queries CUDA while the interpreter exits would abort the process
                atexit.register(self.stop)
        return entry

    @contextmanager
    def host(self, text: Callable[[], str], timeout: float) -> Iterator[None]:
        """Within: the host waits for other ranks, at most ``timeout`` seconds."""
        entry = self._add(text, timeout, None)
        try:
            yield
        finally:
            with self.lock:
                self.waiting.remove(entry)

    def device(self, text: Callable[[], str], timeout: float, event: Event) -> None:
        """The device waits for ``event``, at most ``timeout`` seconds."""
        self._add(text, timeout, event)

    def check(self) -> None:
        """Reports the oldest exchange, once, if it is late."""
        now = time.monotonic()
        with self.lock:
            self.waiting = [e for e in self.waiting if e.event is None or not e.event.query()]
            late = [e for e in self.waiting if now > e.deadline]
        if late and not late[0].reported:  # those behind it wait for it
            late[0].reported = True
            self.report(f"moefx, after {now - late[0].began:.0f} s: {late[0].text()}")

    def stop(self) -> None:
        """Ends the thread, if there is one."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join(timeout=10)

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.check()


MONITOR = HangMonitor()
