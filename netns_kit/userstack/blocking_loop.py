"""The blocking loop: drives an engine from a thread or process that does nothing else.

To sleep and be woken costs 5 to 50 microseconds, more than most events.  So while events come in quick succession,
the loop polls for the next one instead of sleeping, for at most `SPIN` seconds.  It sleeps as soon as events come
less often than that.  Exchanges of one question at a time are then about as fast as over the host's own loopback, and
an idle stack costs nothing.

The loop does not poll when others need what polling takes.  With only one processor, that is the process that causes
the next event.  With several, that process may still wait for this one, so before each poll the processor is offered
to others (sched_yield(2)).  The other threads of this process need the interpreter.  A poll releases it for too short
a time to wake them, so they only get it by insisting, after `sys.getswitchinterval`.  If one has insisted, which
shows as a poll in which this thread had to sleep, the loop does not poll for `CALM` seconds.
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
TURN = 1e-3  # seconds of work without a wait, after which other threads that insist get the interpreter
REST = 50e-6  # seconds of sleep, in which a thread that waits for the interpreter is woken
_INTERRUPTED = 20e-6  # seconds; a poll without interruption takes less
_SELDOM = 1e-3  # seconds; a longer wait counts as this in the average
_WEIGHT = 1 / 8  # weight of the last wait in the average


def run(engine: Engine, stopping: Callable[[], bool]) -> None:
    """Drive `engine` by the monotonic clock until `stopping` returns True.  Raises what the engine raises."""
    clock, poll, dispatch = time.monotonic, engine.poll, engine.dispatch
    alone = len(os.sched_getaffinity(0)) == 1
    usual = _SELDOM  # the average length of a wait
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
    """Return how often this thread has given up its processor to wait (getrusage(2), ru_nvcsw)."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
