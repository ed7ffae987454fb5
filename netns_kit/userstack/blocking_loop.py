"""The blocking loop: how a thread, or a process, that has nothing else to do drives an engine.

Sleeping and being woken costs more than most of what is waited for: 5 to 50 microseconds, by machine and mood.  So
while events come in quick succession the loop polls for the next one instead of sleeping, for `SPIN` at most, and
sleeps as soon as they come less often than that.  A conversation of one question at a time is then about as fast
as through the host's own loopback; what is idle or slow costs nothing.

There is no polling where another is in need of what it takes.  With one processor only, that is whoever the next
event is to come from; with several it may be waiting for just this one, so before each poll it is offered
(sched_yield(2)).  And the other threads of the process need the interpreter: a poll gives it back for too short
a time for them to be woken, so they would get it only when they insist, after `sys.getswitchinterval`.  Where one
has insisted, which shows as a poll for which this thread had to sleep, there is none for `CALM` seconds.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

from netns_kit.gateway.engine import Engine

LONGEST_WAIT = 86400.0  # seconds; epoll takes no more than 24 days
SPIN = 100e-6  # seconds
CALM = 1.0  # seconds
TURN = 1e-3  # seconds of work without a wait, after which others have their turn, if they insist
REST = 50e-6  # seconds: a thread that waits for the interpreter is woken within that
_INTERRUPTED = 20e-6  # seconds: a poll takes less than one
_SELDOM = 1e-3  # seconds: longer waits count as this
_WEIGHT = 1 / 8  # of the last wait in the average


def run(engine: Engine, stopping: Callable[[], bool]) -> None:
    """Drive `engine` until `stopping` says so, with the monotonic clock.  Raises what the engine raises."""
    clock, poll, dispatch = time.monotonic, engine.poll, engine.dispatch
    alone = len(os.sched_getaffinity(0)) == 1
    usual = _SELDOM  # how long a wait takes lately
    now = calm_until = resting_at = clock()
    engine.clock = clock
    slept = _times_slept()
    while not stopping():
        events: list[tuple[int, int]] = []
        began, deadline = now, engine.deadline
        if not alone and usual < SPIN and now >= calm_until:
            until = min(now + SPIN, deadline)
            while True:
                before, events = now, poll(0)
                now = clock()
                if now - before > _INTERRUPTED and _times_slept() != slept:
                    calm_until = now + CALM
                    break
                if events or now >= until:
                    break
                os.sched_yield()
                now = clock()
        if not events:
            events = poll(min(max(deadline - now, 0.0), LONGEST_WAIT))
            now, slept = clock(), _times_slept()
            resting_at = now
        elif now - resting_at > TURN:
            if _times_slept() != slept:
                slept, calm_until = _times_slept(), now + CALM
            if now < calm_until:
                time.sleep(REST)
                now = clock()
            resting_at = now
        usual += (min(now - began, _SELDOM) - usual) * _WEIGHT
        dispatch(events, now)
        now = clock()


def _times_slept() -> int:
    """How often this thread has given up its processor to wait (getrusage(2), ru_nvcsw)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
