"""The thread that names hanging exchanges: what it says, once, and what it keeps quiet about."""

from __future__ import annotations

import time

from moefx.transports.hang_monitor import Watch


class Event:
    def __init__(self):
        self.happened = False

    def query(self):
        return self.happened


def watch():
    said: list[str] = []
    made = Watch(said.append, every=3600)  # looked at by hand
    return made, said


def test_what_the_device_waits_for_too_long_is_named_once():
    w, said = watch()
    first, second = Event(), Event()
    w.device(lambda: "dispatch of layer 3", 0.0, first)
    w.device(lambda: "combine of layer 3", 0.0, second)
    time.sleep(0.01)
    w.look(), w.look()
    assert len(said) == 1 and "after 0 s: dispatch of layer 3" in said[0]  # what waits behind it is no news
    first.happened = True
    w.look()
    assert "combine of layer 3" in said[1]
    second.happened = True
    w.look()
    assert w.waiting == [] and len(said) == 2


def test_what_arrives_in_time_is_not_mentioned():
    w, said = watch()
    w.device(lambda: "dispatch", 100.0, Event())
    w.look()
    assert said == [] and len(w.waiting) == 1


def test_the_host_waits_within_the_block_only():
    w, said = watch()
    with w.host(lambda: "dispatch", 0.0):
        time.sleep(0.01)
        w.look()
    w.look()
    assert len(said) == 1 and w.waiting == []


def test_its_thread_ends_before_the_interpreter_does():
    w, _ = watch()
    w.stop()  # nothing was watched
    w, _ = watch()
    w.device(lambda: "dispatch", 100.0, Event())
    assert w.thread is not None and w.thread.is_alive()
    w.stop()
    assert not w.thread.is_alive()
