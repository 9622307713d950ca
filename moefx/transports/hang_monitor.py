"""Says which exchange hangs: NCCL and DeepEP end the process after their timeout, and name neither layer nor counts.

A thread looks, once a second, at the exchanges that the host or the device waits for. One that takes longer than ``LIMIT`` of
the process group's timeout is written to stderr: the operation, the layer, the rank and the counts. gloo raises by itself.
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

LIMIT = 0.8


class Event(Protocol):
    """A torch.cuda.Event."""

    def query(self) -> bool: ...


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(eq=False)
class _Waiting:
    text: Callable[[], str]  #: what to say of it
    began: float
    deadline: float
    event: Event | None = None  #: the device waits until it happens; None: the host waits
    said: bool = False


class Watch:
    """What is waited for, oldest first."""

    def __init__(self, say: Callable[[str], None] = _complain, every: float = 1.0):
        self.say, self.every = say, every
        self.waiting: list[_Waiting] = []
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.over = threading.Event()

    def _add(self, text: Callable[[], str], timeout: float, event: Event | None) -> _Waiting:
        now = time.monotonic()
        entry = _Waiting(text, now, now + LIMIT * timeout, event)
        with self.lock:
            self.waiting.append(entry)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="moefx-watch", daemon=True)
                self.thread.start()
                # a thread that is asking CUDA while the interpreter ends would abort the process
                atexit.register(self.stop)
        return entry

    @contextmanager
    def host(self, text: Callable[[], str], timeout: float) -> Iterator[None]:
        """Within: the host waits for the others, at most ``timeout`` seconds."""
        entry = self._add(text, timeout, None)
        try:
            yield
        finally:
            with self.lock:
                self.waiting.remove(entry)

    def device(self, text: Callable[[], str], timeout: float, event: Event) -> None:
        """The device waits until ``event``."""
        self._add(text, timeout, event)

    def look(self) -> None:
        now = time.monotonic()
        with self.lock:
            self.waiting = [e for e in self.waiting if e.event is None or not e.event.query()]
            late = [e for e in self.waiting if now > e.deadline]
        if late and not late[0].said:  # those behind it wait for it
            late[0].said = True
            self.say(f"moefx, after {now - late[0].began:.0f} s: {late[0].text()}")

    def stop(self) -> None:
        """Ends the thread, if there is one."""
        self.over.set()
        if self.thread is not None:
            self.thread.join(timeout=10)

    def _run(self) -> None:
        while not self.over.wait(self.every):
            self.look()


WATCH = Watch()
