"""The thread that reports hanging exchanges: what it reports, once, and what it does not."""

from __future__ import annotations

import time

from moefx.transports.hang_monitor import HangMonitor


class Event:
    def __init__(self):
        self.happened = False

    def query(self):
        return self.happened


def monitor():
    said: list[str] = []
    made = HangMonitor(said.append, interval=3600)  # checked by hand
    return made, said


def test_what_the_device_waits_for_too_long_is_named_once():
    w, said = monitor()
    first, second = Event(), Event()
    w.device(lambda: "dispatch of layer 3", 0.0, first)
    w.device(lambda: "combine of layer 3", 0.0, second)
    time.sleep(0.01)
    w.check(), w.check()
    assert len(said) == 1 and "after 0 s: dispatch of layer 3" in said[0]  # what waits behind it is no news
    first.happened = True
    w.check()
    assert "combine of layer 3" in said[1]
    second.happened = True
    w.check()
    assert w.waiting == [] and len(said) == 2


def test_what_arrives_in_time_is_not_mentioned():
    w, said = monitor()
    w.device(lambda: "dispatch", 100.0, Event())
    w.check()
    assert said == [] and len(w.waiting) == 1


def test_the_host_waits_within_the_block_only():
    w, said = monitor()
    with w.host(lambda: "dispatch", 0.0):
        time.sleep(0.01)
        w.check()
    w.check()
    assert len(said) == 1 and w.waiting == []


def test_its_thread_ends_before_the_interpreter_does():
    w, _ = monitor()
    w.stop()  # nothing was watched
    w, _ = monitor()
    w.device(lambda: "dispatch", 100.0, Event())
    assert w.thread is not None and w.thread.is_alive()
    w.stop()
    assert not w.thread.is_alive()
