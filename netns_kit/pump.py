"""The blocking loop: how a thread, or a process, that has nothing else to do drives an engine.

Sleeping and being woken costs more than most of what is waited for: 5 to 50 microseconds, by machine and mood.  So
while events come in quick succession the loop polls for the next one instead of sleeping, for `SPIN` at most, and
sleeps as soon as they come less often than that.  A conversation of one question at a time is then about as fast
as through the host's own loopback; what is idle or slow costs nothing.  With one processor only, whoever the next
event is to come from needs it: there is no polling then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from .engine import Engine

LONGEST_WAIT = 86400.0  # seconds; epoll takes no more than 24 days
SPIN = 100e-6  # seconds
_SELDOM = 1e-3  # seconds: longer waits count as this
_WEIGHT = 1 / 8  # of the last wait in the average


def run(engine: Engine, stopping: Callable[[], bool]) -> None:
    """Drive `engine` until `stopping` says so, with the monotonic clock.  Raises what the engine raises."""
    clock, poll, dispatch = time.monotonic, engine.poll, engine.dispatch
    alone = len(os.sched_getaffinity(0)) == 1
    usual = _SELDOM  # how long a wait takes lately
    while not stopping():
        busy = usual < SPIN
        events = poll(0) if busy else []
        now = clock()
        if events or engine.deadline <= now:
            dispatch(events, now)
            continue
        began = now
        if busy and not alone:
            until = min(now + SPIN, engine.deadline)
            while not events and now < until:
                events = poll(0)
                now = clock()
        if not events:
            events = poll(min(max(engine.deadline - now, 0.0), LONGEST_WAIT))
            now = clock()
        usual += (min(now - began, _SELDOM) - usual) * _WEIGHT
        dispatch(events, now)
