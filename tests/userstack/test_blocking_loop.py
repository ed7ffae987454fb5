"""The blocking loop: it polls while events come in quick succession, and sleeps when they do not."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from netns_kit.gateway.engine import Engine
from netns_kit.userstack import blocking_loop

GLANCE = 1e-6
"""What a poll that does not wait takes."""


class Paced:
    """An engine whose events come one after another, each so long after the one before has been handled."""

    def __init__(self, pauses: Iterator[float]) -> None:
        self.now = 0.0
        self.deadline = math.inf
        self.slept: list[float] = []
        """Before each event: the timeout that was slept with, 0 if none."""
        self.glances: list[int] = []
        """Before each event: how often there was nothing."""
        self.handled: list[float] = []
        self.then: dict[int, Callable[[], None]] = {}
        self.ways_given = 0
        self.insisted = 0
        """How often another thread has taken the interpreter away from a poll."""
        self.insist = False
        self._pauses = pauses
        self._next = next(pauses)
        self._timeout, self._count = 0.0, 0

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        if timeout:
            self._timeout = timeout
            self.now = max(self.now, min(self._next, self.now + timeout))
        else:
            self._count += 1
            self.now += GLANCE
            if self.insist:
                self.now += 100 * GLANCE
                self.insisted += 1
                self.insist = False
        return [(0, 1)] if self.now >= self._next else []

    def dispatch(self, events: list[tuple[int, int]], now: float) -> None:
        self.handled.append(now)
        self.slept.append(self._timeout)
        self.glances.append(self._count)
        self._timeout, self._count = 0.0, 0
        self._next = self.now + next(self._pauses, math.inf)
        self.deadline = math.inf
        self.then.get(len(self.handled), lambda: None)()

    def give_way(self) -> None:
        self.ways_given += 1

    def run(self, events: int) -> None:
        blocking_loop.run(cast("Engine", self), lambda: len(self.handled) >= events)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Paced]:
    def make(*pauses: float, processors: int = 2) -> Paced:
        engine = Paced(iter(pauses))
        monkeypatch.setattr(time, "monotonic", lambda: engine.now)
        monkeypatch.setattr(blocking_loop, "_times_slept", lambda: engine.insisted)
        monkeypatch.setattr(os, "sched_yield", engine.give_way)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
        return engine

    return make


QUICK = [blocking_loop.SPIN / 2] * 30
SLOW = [blocking_loop.SPIN * 20] * 30


def test_quick_events_are_polled_for(paced: Callable[..., Paced]) -> None:
    engine = paced(*QUICK, *QUICK)
    engine.run(60)
    assert any(engine.slept[:30])  # at first it does not know
    assert not any(engine.slept[30:])
    assert engine.ways_given >= sum(engine.glances) - 60


def test_slow_ones_are_slept_for(paced: Callable[..., Paced]) -> None:
    engine = paced(*SLOW)
    engine.run(30)
    assert engine.slept == [blocking_loop.LONGEST_WAIT] * 30
    assert engine.glances == [0] * 30


def test_one_long_pause_ends_the_polling(paced: Callable[..., Paced]) -> None:
    engine = paced(*QUICK, *SLOW)
    engine.run(60)
    assert engine.glances[30] * GLANCE == pytest.approx(blocking_loop.SPIN, rel=0.1)
    assert engine.slept[30] == blocking_loop.LONGEST_WAIT
    assert engine.glances[31:] == [0] * 29


def test_alone_it_never_polls(paced: Callable[..., Paced]) -> None:
    """Who is to send the next event needs the processor."""
    engine = paced(*QUICK, *QUICK, processors=1)
    engine.run(60)
    assert all(engine.slept)


@pytest.mark.parametrize("seconds", [blocking_loop.SPIN / 3, 5.0])
def test_a_deadline_ends_the_polling_and_the_sleep(paced: Callable[..., Paced], seconds: float) -> None:
    engine = paced(*QUICK, math.inf)

    def due() -> None:
        engine.deadline = engine.now + seconds

    engine.then[30] = due
    engine.run(31)
    assert engine.handled[30] - engine.handled[29] == pytest.approx(seconds, abs=3 * GLANCE)


def test_other_threads_have_their_way(paced: Callable[..., Paced]) -> None:
    """Another thread had to insist on having the interpreter: no more polling, for a while."""
    engine = paced(*QUICK, *QUICK, blocking_loop.CALM, *QUICK, *QUICK)
    engine.then[30] = lambda: setattr(engine, "insist", True)
    engine.run(120)
    assert engine.slept[29] == 0
    assert all(engine.slept[31:60])
    assert not any(engine.slept[100:])
