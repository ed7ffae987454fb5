"""The engine: one epoll descriptor, one heap of timers, one step at a time.

Facts about epoll, each held by a test in tests/laws/test_facts.py:

- An epoll descriptor is itself readable while a member is ready, so an event loop waits for the whole
  engine with one call of anyio's wait_readable.
- Edge-triggered members (EPOLLET) are reported once per change.  A stream socket that gave fewer bytes
  than asked for is drained; a hang-up that was reported is not reported again.

So: sockets are registered once, edge-triggered, and their handlers remember what is ready; what a handler
leaves for later it hands to `again`.  Whoever drives the engine waits for `fileno` to be readable or for
`deadline` to pass, and calls `step`.

Each step handles few events and takes a bounded time: a handler that does many things at once looks at `is_late`
before the next of them, and leaves the rest to the next step.  So nobody who shares the thread, the event loop or the
interpreter waits for long, however many sockets are ready and whatever a guest sends.

Everything here runs on one thread, the driver's; only `call` may be used from another.

A fork of this process has copies of all descriptors, and would keep ports bound and connections open that we have
closed.  So in the child every descriptor of an engine is replaced by one of /dev/null (`os.register_at_fork`).
"""

from __future__ import annotations

import math
import os
import select
from _thread import allocate_lock  # of `threading`, all that is wanted here
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from netns_kit.stack.timers import Timers

EVENTS_PER_STEP = 8  # more of them make a step longer, and save little: a poll costs as much as a small read
BUDGET = 0.5e-3  # seconds after which a step does not begin anything new
NEVER = -(1 << 62)  # a step that is followed by none
IN, OUT, ERROR, HANG_UP, READ_HANG_UP, URGENT = (
    select.EPOLLIN,
    select.EPOLLOUT,
    select.EPOLLERR,
    select.EPOLLHUP,
    select.EPOLLRDHUP,
    select.EPOLLPRI,
)
EDGE = select.EPOLLET

Handler = Callable[[int], None]


def is_waitable(fd: int) -> bool:
    """Return whether the kernel reports events of `fd`; of files and directories it reports none."""
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return False
    return True


class ReadBudget:
    """A bound on reads from a level-triggered descriptor in one step.  It doubles while every step finds more.

    A read that finds nothing costs as much as a small frame, and the next poll tells the same for nothing.
    """

    __slots__ = ("_engine", "_size", "_step")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._size, self._step = 1, NEVER  # how much last, and in which step

    def size(self, most: int) -> int:
        """Return the number of reads for this step, `most` at most."""
        step = self._engine.steps
        size = 1
        if step <= self._step + self._engine.around:
            size = 2 * self._size
            size = min(size, most)
        self._size, self._step = size, step
        return size

    def exhausted(self) -> None:
        """Begin again with one read: there was no more."""
        self._step = NEVER


class Engine:
    """One epoll descriptor, one heap of timers, and the handlers of both.

    Attributes:
        now: The time of the current step, for handlers to use.  It starts at 0 and never goes back.
        clock: The driver's clock, by which a step is late.  Without one, no step is.
        steps: The number of steps so far.
        newest: The number of the last descriptor that was added.
        around: The steps until every descriptor has had its turn.
        after_step: Functions called at the end of every step.
    """

    _open: ClassVar[list[Engine]] = []  # of the process

    def __init__(self) -> None:
        self.now = 0.0
        self.clock: Callable[[], float] = lambda: self.now
        self.timers = Timers()
        self.steps = 0  # so far
        self.newest = 0  # the number of the last descriptor to be added
        self.around = 1  # steps until every descriptor has had its turn
        self.after_step: list[Callable[[], None]] = []  # run at the end of every step
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._removed: set[int] = set()  # in this step: their numbers may be another's by now
        self._again: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._calling = (
            allocate_lock()
        )  # lest what `call` writes to is closed, and its number somebody else's
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add(self._wake, self._run_calls, IN)
        self._open.append(self)

    @property
    def descriptors(self) -> int:
        """Number of descriptors that are registered."""
        return len(self._handlers)

    def fileno(self) -> int:
        """Return the epoll descriptor, which is readable when `step` has something to do."""
        return self._epoll.fileno()

    @property
    def deadline(self) -> float:
        """Time at which `step` is wanted even if nothing is readable; minus infinity: at once."""
        return -math.inf if self._again else self.timers.deadline

    @property
    def is_late(self) -> bool:
        """True when the step has used up its time."""
        return self.clock() > self.now + BUDGET

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Call `handler` with the ready events of `fd` from now on."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self.newest = fd
        self.around = 1 + len(self._handlers) // EVENTS_PER_STEP

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def replace(self, fd: int, handler: Handler) -> None:
        """Call `handler` instead; what edge-triggered events have told before is not told again."""
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Forget `fd`, before it is closed.  Events of it that are already under way are dropped."""
        del self._handlers[fd]
        self.around = 1 + len(self._handlers) // EVENTS_PER_STEP
        self._removed.add(fd)
        self._epoll.unregister(fd)

    def again(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next step: there is more to do than this one had time for."""
        self._again.append(callback)

    def call(self, callback: Callable[[], None]) -> None:
        """Call `callback`, which must not raise, in the next step.  Any thread may ask; a closed engine forgets."""
        with self._calling:
            if not self._epoll.closed:
                self._calls.append(callback)
                os.eventfd_write(self._wake, 1)

    def step(self, now: float) -> None:
        """Do what is ready, a bounded amount of it, and return without blocking."""
        self.dispatch(self.poll(0), now)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Wait up to `timeout` seconds for events and return them: the half of a step that blocks."""
        return self._epoll.poll(timeout, EVENTS_PER_STEP)

    def dispatch(self, events: list[tuple[int, int]], now: float) -> None:
        """Handle `events`, then what earlier steps have left over, then timers, then the end of the step."""
        self.now = now
        self.steps += 1
        leftover = len(self._again)
        handlers, removed = self._handlers, self._removed
        if removed:
            removed.clear()
        for fd, ready in events:
            if fd not in removed:
                handlers[fd](ready)
        while leftover:
            leftover -= 1
            self._again.popleft()()
        if self.timers.deadline <= now:
            self.timers.expire(now)
        for callback in self.after_step:
            callback()

    def close(self) -> None:
        """Close the engine's own descriptors; nothing may drive it any more.  Calling it again is fine."""
        with self._calling:
            if self._epoll.closed:
                return
            self._open.remove(self)  # first: a fork may come at any moment
            self._epoll.close()
            os.close(self._wake)
        self._calls.clear()
        self._handlers.clear()

    @classmethod
    def leave_to_parent(cls) -> None:
        """Give up, in the child of a fork, the copies of all descriptors that engines of the parent have."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for engine in cls._open:
            for fd in (engine.fileno(), *engine._handlers):
                os.dup2(null, fd, inheritable=False)
        os.close(null)

    def _run_calls(self, _: int) -> None:
        os.eventfd_read(self._wake)
        for _ in range(len(self._calls)):
            self._calls.popleft()()


os.register_at_fork(after_in_child=Engine.leave_to_parent)
