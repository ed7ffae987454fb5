"""Drivers: the ways to call `Engine.step` in this process.

`LoopDriver` runs the engine on the caller's event loop.  Nothing crosses between threads, but the engine stands still
while the loop is blocked.  `ThreadDriver` runs it on a thread of its own.  It has the lowest latency, and the caller
may block.  In all other respects both behave alike.  Start `Driver.run` as a task.  It ends by an exception when the
engine fails, or by cancellation.  The third way is a process of its own: `netns_kit.userstack.worker.main`.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.lowlevel

from netns_kit.errors import NetnsKitError, StackClosed, StackCrashed
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.setup import DriverName
from netns_kit.namespace.background import asyncio_loop

from . import blocking_loop

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
TURN = 0.5e-3  # seconds on the event loop after which others have their turn
STOP_SECONDS = 5.0  # seconds that a policy or hook may hold up the thread before it is left behind
CLOSED = "the stack is not running: it has been closed, or it has failed"


class Driver(Protocol):
    async def run(self) -> None:
        """Drive the engine.

        Raises:
            StackCrashed: The engine has raised anything but a `NetnsKitError`; such an error is raised as it is.
        """

    async def call(self, function: Callable[[], T]) -> T:
        """Call `function` between two steps of the engine, where it may use everything of the engine's.  Return its
        result.

        Functions are called in the order in which they come.  If this is cancelled, the function is called all the
        same, unless `run` ends before.

        Raises:
            StackClosed: `run` has ended.  Other errors are those of the function.
        """

    def post(self, callback: Callable[[], object]) -> None:
        """Call `callback` soon, on the event loop of `run`.  It must not raise.  To be called on the engine's side
        only.
        """

    def finish(self, function: Callable[[], object]) -> None:
        """Call `function` when nothing drives the engine any more, after the end of `run`.

        That is now, or when the thread ends that `run` has left behind because a policy held it up.
        """


class LoopDriver:
    """A driver on the event loop.  Under asyncio the engine is one permanent reader; else each step waits anew."""

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
        if self._ended:
            raise StackClosed(CLOSED)
        self._engine.now = anyio.current_time()
        try:
            result = function()
        finally:
            self._engine.call(_nothing)  # what waits for the end of a step need not wait for a frame
        await anyio.lowlevel.checkpoint()
        return result

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
    """A driver on a thread of its own, which blocks in epoll."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stopping = False
        self._ended = False
        self._failure: BaseException | None = None
        self._notify = -1
        self._handing = threading.Lock()  # held while the engine passes from the thread to `finish`
        self._driving = False
        self._left: list[Callable[[], object]] | None = None  # functions for a thread that was left behind
        self._asked: deque[_Call] = deque()
        self._posted: deque[Callable[[], object]] = deque()

    async def run(self) -> None:
        thread = threading.Thread(target=self._drive, name="netns_kit engine", daemon=True)
        try:
            self._notify = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._driving = True
            try:
                thread.start()
            except BaseException:  # the host allows no more threads
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
        """Wait for the end of the thread without blocking the event loop.

        Raises:
            StackCrashed: A policy or hook holds the thread up.
        """
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
                    thread.join()  # without waiting, because it is about to end
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
        except BaseException as error:  # the waiting task is told of any
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


def driver_named(name: DriverName) -> Callable[[Engine], Driver]:
    """Return the class of a driver."""
    return ThreadDriver if name == "thread" else LoopDriver


def _take_turn(engine: Engine, clock: Callable[[], float]) -> None:
    """Do steps while there is something to do, for a bounded time."""
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
    """Do as `_take_turn`, and make other exceptions a `StackCrashed`.

    An exception leaves a step half done, so that the engine must not be driven any more.  asyncio would report an
    exception that is not an `Exception`, and call again.

    Raises:
        StackCrashed: The engine has raised anything but a `NetnsKitError`, which is raised as it is; so are
            KeyboardInterrupt and SystemExit, which are meant for the program.
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
