"""LoopThread: the event loop of the synchronous objects, on a thread of its own, and the calls to it.

A call is one hop there and one back.  (anyio's blocking portal takes two each way, four times as long, and its caller
cannot wait for the end of what it has cancelled.)  What interrupts the thread
that waits, Ctrl-C above all, cancels the call; the thread waits for its end, and then raises.  A second interruption
ends the waiting.

What is open when the interpreter exits is closed then, the youngest first, by a thread that waits for the end of all
others but daemons.  Later, in `atexit` functions, it would be too late: from CPython 3.12 on no thread can be started
there, and closing may need one.  A forked child has no such threads; it makes its own for objects of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import anyio

from netns_kit.errors import StackClosed, WrongEventLoop

T = TypeVar("T")

__tracebackhide__ = True  # as in the facade
EXIT = "netns_kit.sync exit"  # the thread that closes; after a loop that failed there are several
PATIENCE = 5.0  # seconds for the thread to end, when all is closed
WAKING_SECONDS = 0.2
"""How long a thread waits in one piece.  CPython sees a signal only when it comes before a thread prepares to wait or
while it waits; one that comes between the two is seen when the thread wakes."""


class _Call(Generic[T]):
    """A call: what is awaited on the event loop, and its outcome."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._value: list[T] = []
        self.error: BaseException | None = None
        self.is_done = self.is_lost = False
        self.unwanted: Callable[[T], Awaitable[None]] | None = None
        """What is done with a value that comes when nobody waits any more."""
        self._ended = threading.Lock()
        self._ended.acquire()

    async def run(self) -> None:
        assert self._scope is not None
        try:
            with self._scope:
                self._value.append(await self._function())
        except anyio.get_cancelled_exc_class():  # not by `cancel`, which the scope keeps: the loop ends
            self.is_lost = True
        except BaseException as error:  # it is the caller's, whatever it is
            self.error = error
        finally:
            self._end()
        if self.unwanted is not None and self._value:
            await self.unwanted(self._value[0])

    def _end(self) -> None:
        self.is_done = True
        self._ended.release()

    def begin(self, start: Callable[[Awaitable[None]], object]) -> None:
        """Start the task; on the event loop."""
        self._scope = anyio.CancelScope()
        start(self.run())

    def cancel(self) -> None:
        """Cancel what is awaited, or have ended what has not begun; on the event loop."""
        if self._scope is not None:
            self._scope.cancel()
        elif not self.is_done:
            self._end()

    def wait(self, check: Callable[[], None]) -> None:
        while not self.is_done and not self._ended.acquire(timeout=WAKING_SECONDS):
            check()

    @property
    def value(self) -> T | None:
        """What was returned; None before that, and if nothing was."""
        return self._value[0] if self._value else None

    def outcome(self) -> T:
        try:
            if self.error is not None:
                raise self.error
            return self._value[0]
        finally:
            self.error = None  # else it and its traceback would keep each other


class LoopThread:
    """An event loop on a thread of its own, which ends when the interpreter exits."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._open: WeakValueDictionary[int, Any] = WeakValueDictionary()  # the oldest first
        self.is_closed = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="netns_kit.sync", daemon=True)
        self._thread.start()
        self._ready.wait()
        # a thread is by itself a daemon if the one that starts it is, as a prompt's may be
        threading.Thread(target=self._close_at_exit, name=EXIT, daemon=False).start()

    def _run(self) -> None:
        anyio.run(self._serve)

    async def _serve(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        tasks = set[asyncio.Task[None]]()  # the event loop itself holds no strong reference

        def start(running: Awaitable[None]) -> None:
            task = asyncio.ensure_future(running)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        self._start = start
        # by itself it would run a call in the context of whoever calls, which knows of no event loop
        self._soon: Callable[..., object] = partial(loop.call_soon_threadsafe, context=copy_context())
        self._stopped = asyncio.Event()
        self._ready.set()
        await self._stopped.wait()

    @property
    def is_there(self) -> bool:
        """Whether it runs in this process: the interpreter does not exit, and was not forked since."""
        return not self.is_closed and self.pid == os.getpid()

    def check(self, what: str) -> None:
        """Raise WrongEventLoop where a call would wait for ever, and StackClosed when the interpreter exits.

        Args:
            what: The object, in the message.
        """
        if self.pid != os.getpid():
            cause, fix = (
                f"the {what} was made before this process was forked",
                "make a new one in this process",
            )
            raise WrongEventLoop(cause, fix=fix)
        if threading.get_ident() == self._thread.ident:
            cause = f"the {what} was called on the event loop of netns_kit.sync, where the call would wait for ever"
            raise WrongEventLoop(
                cause, fix="call it in a thread, as plain functions are that serve or intercept"
            )
        if self.is_closed:
            raise StackClosed(f"the {what} was closed: the interpreter exits", fix="use it before that")
        self._check_running()

    @property
    def has_failed(self) -> bool:
        """Whether the event loop has ended too early: what it called has raised KeyboardInterrupt or SystemExit."""
        return not self.is_closed and not self._thread.is_alive()

    def _check_running(self) -> None:
        if self.has_failed:
            cause = "the event loop of netns_kit.sync has ended by an error, which its thread has written"
            raise StackClosed(cause, fix="make new objects")

    def call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        """Await a function's result on the event loop, and return it.

        A result that can be closed is closed if nobody gets it, because the waiting was interrupted too late.

        Args:
            what: The object that is called, in messages.
            function: The function.

        Raises:
            WrongEventLoop, StackClosed: See `check`.
        """
        self.check(what)
        call = _Call(function)
        try:
            self._begin(call)
            call.wait(self._check_running)
        except BaseException:
            if self.has_failed:  # there is nothing left to end
                raise
            try:
                if not call.is_done:
                    self._soon(call.cancel)
                    call.wait(self._check_running)
                if call.value is not None:
                    self.call(what, partial(self._close_unwanted, call.value))
            except BaseException:  # a second interruption, or the end of the event loop
                if not self.has_failed:
                    self._soon(self._leave, call)
                raise
            raise
        if call.is_lost:
            self._thread.join(PATIENCE)
            self._check_running()
        return call.outcome()

    def _begin(self, call: _Call[Any]) -> None:
        try:
            self._soon(call.begin, self._start)
        except RuntimeError:  # the loop is closed, and its thread about to end
            self._thread.join(PATIENCE)
            self._check_running()
            raise

    def _leave(self, call: _Call[T]) -> None:
        """Have the value of a call closed that nobody waits for any more; on the event loop."""
        if not call.is_done:
            call.unwanted = self._close_unwanted
            call.cancel()
        elif call.value is not None:
            self._start(self._close_unwanted(call.value))

    async def _close_unwanted(self, value: object) -> None:
        if id(value) in self._open and (closing := closer(value)):
            with suppress(Exception):  # the interruption is told
                await closing()

    def opened(self, thing: object) -> None:
        """Note a thing that is to be closed when the interpreter exits, if it is there still; on the event loop.

        Args:
            thing: The thing; one that cannot be closed is none.
        """
        if closer(thing) is not None:
            with suppress(TypeError):  # a device, whose descriptor ends with the process
                self._open[id(thing)] = thing

    def closed(self, thing: object) -> None:
        """Note that it was closed."""
        self._open.pop(id(thing), None)

    def _close_at_exit(self) -> None:
        # the main thread is one of them: it stops when the interpreter exits, and is listed after that too
        while others := [
            each
            for each in threading.enumerate()
            if each.name != EXIT and not each.daemon and each.is_alive()
        ]:
            for each in others:
                each.join()
        if not self.has_failed:
            self.close()

    def close(self) -> None:
        """Close what is open, the youngest first, and end the event loop; the first error is raised after that."""
        failures: list[Exception] = []
        try:
            for thing in reversed(list(self._open.values())):
                try:
                    if closing := closer(thing):
                        self.call("loop", closing)
                except Exception as error:
                    failures.append(error)
        finally:
            self.is_closed = True
            self._soon(self._stopped.set)
            self._thread.join(PATIENCE)
        if failures:
            raise failures[0]


def closer(thing: Any) -> Callable[[], Awaitable[object]] | None:
    """Return what closes a thing, or None if nothing does."""
    found = getattr(thing, "close", None) or getattr(thing, "aclose", None)
    if found is None and (leave := getattr(thing, "__aexit__", None)):
        return lambda: leave(None, None, None)
    return found if iscoroutinefunction(found) else None


class _Process:
    """What this process has: its event loop, once there is one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: LoopThread | None = None


_process = _Process()
os.register_at_fork(after_in_child=_process.__init__)  # type: ignore[misc]  # a child has none, and a lock that is free


def loop_thread() -> LoopThread:
    """Return the event loop of this process; it is made by the first call."""
    with _process.lock:
        if _process.thread is None or _process.thread.has_failed:
            _process.thread = LoopThread()
        return _process.thread
