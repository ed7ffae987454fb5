"""ManualClock: the time of an event loop, which stands still, and jumps when there is nothing left to do.

Whatever takes its time from the event loop follows: sleeps, timeouts, and the engines of a `TapPair`.  What has a
clock of its own does not: the kernel, other processes, and threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from netns_kit import arguments
from netns_kit.errors import ArgumentError, FeatureUnavailable, StackClosed
from netns_kit.namespace.background import asyncio_loop

if TYPE_CHECKING:
    import asyncio

IDLE = 0.005  # real seconds in which nothing happens before the clock jumps: threads may be at work


class _Time(Protocol):
    """The time of an event loop, taken over."""

    def now(self) -> float: ...

    def jump(self, seconds: float) -> None: ...

    def leave(self) -> None: ...


class ManualClock:
    """The clock of a test's event loop.  It is the fixture `manual_clock`.

    Time stands still while the test runs.  When every task waits, and `autojump` is True, it jumps to the next
    timeout: so a test of a timeout of a minute takes some milliseconds, and the minute is exact.

    Args:
        autojump: Whether the clock jumps.
    """

    def __init__(self, *, autojump: bool = True) -> None:
        self._autojump = autojump
        self._time: _Time | None = None
        self._began = 0.0

    def __repr__(self) -> str:
        return f"<ManualClock {'not set' if self._time is None else f'{self.elapsed:g} s'}>"

    def start(self) -> None:
        """Take over the time of the running event loop; for the plugin.

        Raises:
            FeatureUnavailable: It is an event loop whose clock cannot be set.
        """
        loop = asyncio_loop()
        self._time = _TrioTime(self) if loop is None else _AsyncioTime(self, loop)
        self._began = self._time.now()

    def stop(self) -> None:
        """Let time go on; for the plugin."""
        if self._time is not None:
            self._time.leave()
            self._time = None

    @property
    def autojump(self) -> bool:
        """Whether the clock jumps to the next timeout when every task waits."""
        return self._autojump

    @property
    def elapsed(self) -> float:
        """Seconds since the test began, as the test has them."""
        return self._taken().now() - self._began

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once.  Timeouts take effect when the test waits for something.

        Args:
            seconds: The seconds.

        Raises:
            ArgumentError, ArgumentTypeError: Time does not go back.
            StackClosed: The test is not running.
        """
        arguments.instance("seconds", seconds, (int, float), "a number of seconds")
        if not 0 <= seconds < math.inf:
            raise ArgumentError("expected 0 or more seconds", "seconds", arguments.shown(seconds))
        self._taken().jump(seconds)

    def _taken(self) -> _Time:
        if self._time is None:
            raise StackClosed("the clock is not set: the test is not running")
        return self._time


class _AsyncioTime:
    """The time of an event loop of asyncio: its method `time`, and the waiting of its selector."""

    def __init__(self, clock: ManualClock, loop: asyncio.AbstractEventLoop) -> None:
        self._clock = clock
        self._loop = loop
        self._now = loop.time()
        selector = getattr(loop, "_selector", None)
        if selector is None:
            raise unsettable(f"a {type(loop).__module__}.{type(loop).__name__}")
        self._selector = selector
        self._select: Callable[[float | None], list[object]] = selector.select
        vars(loop)["time"] = self.now
        selector.select = self._wait

    def now(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds

    def leave(self) -> None:
        loop = self._loop
        del self._selector.select
        offset = self._now - type(loop).time(loop)
        vars(loop)["time"] = lambda: type(loop).time(loop) + offset  # timers that are set already count by it

    def _wait(self, timeout: float | None = None) -> list[object]:
        events = self._select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None or not self._clock.autojump:
            return self._select(None)
        events = self._select(IDLE)
        if not events:
            self._now += timeout
        return events


class _TrioTime:
    """The time of a run of trio: its clock, in whose place comes one of `trio.testing`."""

    def __init__(self, clock: ManualClock) -> None:
        import trio
        from trio.testing import MockClock

        runner = getattr(getattr(trio._core._run, "GLOBAL_RUN_CONTEXT", None), "runner", None)
        if not hasattr(runner, "clock"):
            raise unsettable(f"trio {trio.__version__}")
        self._mock = MockClock()
        self._mock.jump(trio.current_time())
        cast("Any", runner).clock = self._mock
        self._mock.autojump_threshold = IDLE if clock.autojump else math.inf

    def now(self) -> float:
        return self._mock.current_time()

    def jump(self, seconds: float) -> None:
        self._mock.jump(seconds)

    def leave(self) -> None:
        self._mock.autojump_threshold = math.inf
        self._mock.rate = 1.0


def unsettable(what: str) -> FeatureUnavailable:
    """Return the error about an event loop whose clock cannot be set.

    Args:
        what: The event loop.
    """
    return FeatureUnavailable(
        f"manual_clock cannot set the clock of {what}", fix="use asyncio's own event loop, or trio"
    )
