"""Engine: one epoll descriptor, one heap of timers, one step at a time.

Facts about epoll, each held by a test in tests/laws/test_facts.py:

- An epoll descriptor is itself readable while one of its members is ready.  So an event loop can wait for the whole
  engine with one call of anyio's wait_readable.
- An edge-triggered member (EPOLLET) is reported once per change.  A stream socket that returned fewer bytes than were
  asked for is drained.  A hang-up that was reported is not reported again.

Therefore stream sockets are registered once, edge-triggered, and their handlers remember what is ready.  A handler
that has more to do than one step has time for passes the rest to `Engine.again`.  The driver waits until
`Engine.fileno` is readable or `Engine.deadline` has passed, and then calls `Engine.step`.

A step handles few events and takes a bounded time.  A handler that does many things checks `Engine.is_late` before
each of them, and leaves the rest to the next step.  So other users of the thread, the event loop or the interpreter
never wait for long, however many sockets are ready and whatever a guest sends.

Everything here runs on the driver's thread.  Only `Engine.call` may be called from another thread.

A forked child of this process has copies of all descriptors.  They would keep ports bound, and connections open, that
we have closed.  So in the child each descriptor of an engine is replaced by one of /dev/null (`os.register_at_fork`).
Whoever has others that peers wait for adds to `unregistered`.
"""

from __future__ import annotations

import math
import os
import select
from _thread import allocate_lock  # importing `threading` costs more
from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar

from netns_kit.stack.timers import Timers

EVENTS_PER_STEP = 8  # more would make steps longer and save little: a poll costs as much as a small read
BUDGET = 0.5e-3  # seconds after which a step begins nothing new
NEVER = -(1 << 62)  # the number of a step long ago
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
    """Return whether the kernel reports events of `fd`.  For files and directories it does not."""
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return False
    return True


class ReadBudget:
    """A bound on the reads from a level-triggered descriptor in one step.

    It begins with one read, and doubles as long as each step finds as much to read.  A read that finds nothing costs
    as much as a small frame, and the next poll would tell the same at no extra cost.
    """

    __slots__ = ("_engine", "_size", "_step")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._size, self._step = 1, NEVER  # the last size, and its step

    def size(self, most: int) -> int:
        """Return the number of reads for this step, at most `most`."""
        step = self._engine.steps
        size = min(2 * self._size, most) if step <= self._step + self._engine.around else 1
        self._size, self._step = size, step
        return size

    def exhausted(self) -> None:
        """Begin again with one read, since the last one found nothing."""
        self._step = NEVER


class Engine:
    """One epoll descriptor, one heap of timers, and the handlers of both.

    Attributes:
        now: The time of the current step, for handlers.  It begins at 0 and never goes back.
        clock: The driver's clock, which tells whether a step is late.  By default no step is ever late.
        steps: The number of steps so far.
        newest: The number of the descriptor that was added last.
        around: The number of steps within which every ready descriptor is handled.
        after_step: Functions that are called at the end of every step.
        unregistered: Functions that return descriptors which are the engine's, and are not registered with it.
    """

    _open: ClassVar[list[Engine]] = []  # all that are open in this process

    def __init__(self) -> None:
        self.now = 0.0
        self.clock: Callable[[], float] = lambda: self.now
        self.timers = Timers()
        self.steps = 0
        self.newest = 0
        self.around = 1
        self.after_step: list[Callable[[], None]] = []
        self.unregistered: list[Callable[[], Iterable[int]]] = []
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._removed: set[int] = set()  # in this step; other descriptors may have got their numbers
        self._again: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._calling = allocate_lock()  # held while `call` writes to `_wake`, which must not be closed then
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add(self._wake, self._run_calls, IN)
        self._open.append(self)

    @property
    def descriptors(self) -> int:
        """Number of registered descriptors."""
        return len(self._handlers)

    def fileno(self) -> int:
        """Return the epoll descriptor, which is readable when `step` has something to do."""
        return self._epoll.fileno()

    @property
    def deadline(self) -> float:
        """Time at which `step` is due even if nothing is readable; minus infinity: at once."""
        return -math.inf if self._again else self.timers.deadline

    @property
    def is_late(self) -> bool:
        """True if the current step has used up its time."""
        return self.clock() > self.now + BUDGET

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Register a descriptor: `handler` is called with the events of it that are ready."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self.newest = fd
        self.around = 1 + len(self._handlers) // EVENTS_PER_STEP

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def replace(self, fd: int, handler: Handler) -> None:
        """Replace the handler of a descriptor.  Edge-triggered events that were reported before are not reported
        again.
        """
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Forget a descriptor, before it is closed.  Its events of this step that are not handled yet are dropped."""
        del self._handlers[fd]
        self.around = 1 + len(self._handlers) // EVENTS_PER_STEP
        self._removed.add(fd)
        self._epoll.unregister(fd)

    def again(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next step, which then begins at once."""
        self._again.append(callback)

    def call(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next step.  It must not raise.  Any thread may call this; a closed engine ignores
        it.
        """
        with self._calling:
            if not self._epoll.closed:
                self._calls.append(callback)
                os.eventfd_write(self._wake, 1)

    def step(self, now: float) -> None:
        """Do a bounded amount of what is ready, without blocking."""
        self.dispatch(self.poll(0), now)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Return the ready events, after up to `timeout` seconds.  This is the half of a step that blocks."""
        return self._epoll.poll(timeout, EVENTS_PER_STEP)

    def dispatch(self, events: list[tuple[int, int]], now: float) -> None:
        """Do the rest of a step: handle `events`, then callbacks of `again`, then timers, then `after_step`."""
        self.now = now
        self.steps += 1
        leftover = len(again) if (again := self._again) else 0
        handlers, removed = self._handlers, self._removed
        if removed:
            removed.clear()
        for fd, ready in events:
            if fd not in removed:
                handlers[fd](ready)
        while leftover:
            leftover -= 1
            again.popleft()()
        if self.timers.deadline <= now:
            self.timers.expire(now)
        for callback in self.after_step:
            callback()

    def close(self) -> None:
        """Close the engine's own descriptors, once no driver uses it any more.  Calling it again is allowed."""
        with self._calling:
            if self._epoll.closed:
                return
            self._open.remove(self)  # first, because the process may be forked at any moment
            self._epoll.close()
            os.close(self._wake)
        self._calls.clear()
        self._handlers.clear()
        self.unregistered.clear()

    @classmethod
    def leave_to_parent(cls) -> None:
        """Replace the copies of all engines' descriptors by /dev/null, in the child of a fork."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for engine in cls._open:
            others = [fd for tell in engine.unregistered for fd in tell()]
            for fd in (engine.fileno(), *engine._handlers, *others):
                os.dup2(null, fd, inheritable=False)
        os.close(null)

    def _run_calls(self, _: int) -> None:
        os.eventfd_read(self._wake)
        for _ in range(len(self._calls)):
            self._calls.popleft()()


os.register_at_fork(after_in_child=Engine.leave_to_parent)
