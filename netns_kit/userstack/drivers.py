"""Drivers: who calls `Engine.step` in this process, and with which clock.

`LoopDriver` runs the engine on the caller's event loop: nothing to hand over, and the engine stands still while the
loop does.  `ThreadDriver` runs it on a thread of its own: the lowest latency, and the caller may block as it likes.
Both behave alike otherwise.  Start `run` as a task; it ends by raising, when the engine fails, or by cancellation.
The third way to run an engine is a process of its own: `netns_kit.userstack.worker.main`.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import anyio
import anyio.lowlevel

from netns_kit.errors import NetnsKitError, StackClosed, StackCrashed
from netns_kit.gateway.engine import Engine
from netns_kit.namespace.background import asyncio_loop

from . import blocking_loop

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
LocalDriverName = Literal["thread", "loop"]
DriverName = Literal["thread", "loop", "worker"]
"""Where a stack runs: on a thread of its own, on the caller's event loop, in a process of its own."""
TURN = 0.5e-3  # seconds of the event loop's time, at most, before others have their turn
STOP_SECONDS = 5.0  # how long a policy or hook may hold up the thread before it is left behind
CLOSED = "the stack is not running: it has been closed, or it has failed"


class Driver(Protocol):
    async def run(self) -> None:
        """Drive the engine.  Raises `StackCrashed`, or what an engine raises that is a `NetnsKitError`."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps of the engine, where it may use everything the engine owns.

        Raises what it raises, and `StackClosed` when `run` has ended.  Cancelled, it may still be run.
        """
        ...

    def post(self, callback: Callable[[], object]) -> None:
        """Call it soon on the event loop that `run` runs on.  From the engine's side only; it must not raise."""

    def finish(self, function: Callable[[], object]) -> None:
        """Call it when `run` has ended and nothing drives the engine any more: now, or as soon as a policy lets go of
        the thread that `run` has left behind.
        """


class LoopDriver:
    """On the event loop.  Under asyncio the engine is one persistent reader; elsewhere each step waits anew."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ended = False

    async def run(self) -> None:
        try:
            if (loop := asyncio_loop()) is not None:
                await self._run_on_asyncio(loop)
            else:
                await self._run_anywhere()
        finally:
            self._ended = True

    async def call(self, function: Callable[[], T]) -> T:
        await anyio.lowlevel.checkpoint()
        if self._ended:
            raise StackClosed(CLOSED)
        self._engine.now = anyio.current_time()
        try:
            return function()
        finally:
            self._engine.call(_nothing)  # a step: what waits for its end should not wait for the next frame

    def post(self, callback: Callable[[], object]) -> None:
        callback()

    def finish(self, function: Callable[[], object]) -> None:
        function()

    async def _run_anywhere(self) -> None:
        engine = self._engine
        while True:
            with anyio.CancelScope(deadline=engine.deadline):
                await anyio.wait_readable(engine.fileno())
            await anyio.lowlevel.checkpoint()
            _take_turn_or_crash(engine, anyio.current_time)

    async def _run_on_asyncio(self, loop: asyncio.AbstractEventLoop) -> None:
        engine = self._engine
        failed: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle | None = None
        timer_at = math.inf

        def step() -> None:
            nonlocal timer, timer_at
            try:
                _take_turn_or_crash(engine, loop.time)
            except Exception as error:
                loop.remove_reader(engine.fileno())
                if not failed.done():
                    failed.set_exception(error)
                return
            deadline = engine.deadline
            if deadline < timer_at:
                if timer is not None:
                    timer.cancel()
                timer_at = deadline
                timer = loop.call_at(max(deadline, 0.0), expire)

        def expire() -> None:
            nonlocal timer, timer_at
            timer, timer_at = None, math.inf
            step()

        loop.add_reader(engine.fileno(), step)
        try:
            step()
            await failed
        finally:
            loop.remove_reader(engine.fileno())
            if timer is not None:
                timer.cancel()


class ThreadDriver:
    """On a thread of its own, blocking in epoll."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stopping = False
        self._ended = False
        self._failure: BaseException | None = None
        self._notify = -1
        self._handing = threading.Lock()  # of the engine, from the thread to whoever finishes it
        self._driving = False
        self._left: list[Callable[[], object]] | None = None  # for a thread that was left behind to call
        self._asked: deque[_Call] = deque()
        self._posted: deque[Callable[[], object]] = deque()

    async def run(self) -> None:
        thread = threading.Thread(target=self._drive, name="netns_kit engine", daemon=True)
        try:
            self._notify = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._driving = True
            try:
                thread.start()
            except BaseException:  # the host has no room for one more thread
                self._driving = False
                raise
            while self._failure is None:
                await anyio.wait_readable(self._notify)
                os.eventfd_read(self._notify)
                self._hand_over()
            if isinstance(self._failure, NetnsKitError):
                raise self._failure
            raise _crashed(self._failure) from self._failure
        finally:
            self._stopping = True
            self._engine.call(_nothing)
            try:
                await self._until_stopped(thread)
            finally:
                self._ended = True
                while self._asked:
                    call = self._asked.popleft()
                    call.error = StackClosed(CLOSED)
                    self._posted.append(call.finished.set)
                self._hand_over()

    async def _until_stopped(self, thread: threading.Thread) -> None:
        """Wait for the thread's end, without blocking the event loop.  Raises `StackCrashed` if it is held up."""
        try:
            with anyio.move_on_after(STOP_SECONDS, shield=True):
                while self._driving:
                    await anyio.wait_readable(self._notify)
                    os.eventfd_read(self._notify)
        finally:
            with self._handing:
                held_up = self._driving
                if held_up:
                    self._left = []
            if not held_up:
                if thread.ident is not None:
                    thread.join()  # at once: it has said its last word
                if self._notify >= 0:
                    os.close(self._notify)
        if held_up:
            raise StackCrashed(
                f"a policy or a hook has held up the stack's thread for {STOP_SECONDS:g} s: what is open stays so "
                "until it returns",
                fix='have policies and hooks return at once, or use driver="worker", which is killed then',
            )

    def finish(self, function: Callable[[], object]) -> None:
        with self._handing:
            if self._left is not None and self._driving:
                self._left.append(function)
                return
        function()

    async def call(self, function: Callable[[], T]) -> T:
        if self._ended:
            raise StackClosed(CLOSED)
        call = _Call(function)
        self._asked.append(call)
        self._engine.call(self._serve)
        await call.finished.wait()
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result

    def post(self, callback: Callable[[], object]) -> None:
        self._posted.append(callback)
        os.eventfd_write(self._notify, 1)

    def _hand_over(self) -> None:
        while self._posted:
            self._posted.popleft()()

    def _serve(self) -> None:
        call = self._asked.popleft()
        try:
            call.result = call.function()
        except Exception as error:
            call.error = error
        self.post(call.finished.set)

    def _drive(self) -> None:
        try:
            blocking_loop.run(self._engine, lambda: self._stopping)
        except BaseException as error:  # whoever waits is to be told of any
            self._failure = error
        with self._handing:
            self._driving = False
            left = self._left
            if left is None:
                os.eventfd_write(self._notify, 1)
        if left is not None:
            for function in left:
                function()
            os.close(self._notify)


class _Call:
    __slots__ = ("error", "finished", "function", "result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.finished = anyio.Event()
        self.error: Exception | None = None
        self.result: Any = None


def driver_named(name: LocalDriverName) -> Callable[[Engine], Driver]:
    """What makes that driver."""
    return ThreadDriver if name == "thread" else LoopDriver


def _take_turn(engine: Engine, clock: Callable[[], float]) -> None:
    """One step after another while there is something to do, for a bounded time."""
    engine.clock = clock
    now = clock()
    until = now + TURN
    events = engine.poll(0)
    while True:
        engine.dispatch(events, now)
        now = clock()
        if now > until:
            break
        events = engine.poll(0)
        if not events and engine.deadline > now:
            break


def _take_turn_or_crash(engine: Engine, clock: Callable[[], float]) -> None:
    """The same.  Whatever is raised leaves a step half done, and then nothing is driven any more: asyncio would
    report what is no `Exception`, and call again.

    Raises `StackCrashed`, an engine's own `NetnsKitError`, and Ctrl-C and `SystemExit`, which mean the program.
    """
    try:
        _take_turn(engine, clock)
    except (NetnsKitError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _crashed(error) from error


def _crashed(error: BaseException) -> StackCrashed:
    return StackCrashed(f"the stack stopped on {type(error).__name__}: {error}", fix="please report it")


def _nothing() -> None:
    pass
