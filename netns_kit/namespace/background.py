"""Objects that any task may open and close, and the tasks that they run in between.

`Openable` is what callers see: `open`, `close`, `wait_closed`, and an `async with` made of these.  A `Supervisor` has
its state, its background tasks, and the first error of one of them.

No cancel scope and no task group stays open between `open` and `close`.  A scope belongs to the task that entered it,
but the cells of a notebook and the two halves of a test fixture run in different tasks.  So the background tasks are
the library's own (`asyncio.create_task`, `trio.lowlevel.spawn_system_task`), and closing is one of them: its caller
may be cancelled, and it completes all the same.

An error in the background cancels nobody's task.  It is raised by the calls of the object that are under way, by
every later one, by `wait_closed` and by `close`.  A call is interrupted by a scope that is entered and left within
that call (`Supervisor.guarding`).  An object is built on others, which stand *above* it: their errors are its errors.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from enum import Enum, auto
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from typing_extensions import Self, TypeVarTuple, Unpack

from netns_kit.errors import AlreadyOpened, NetnsKitError, WrongEventLoop

if TYPE_CHECKING:
    import asyncio

__all__ = ["Openable", "Supervisor", "asyncio_loop", "beside", "finish"]

PATIENCE = (
    10.0  # seconds that closing waits for background tasks: they end sooner, but in a loop that has stopped
)

Args = TypeVarTuple("Args")
_running: set[asyncio.Task[None]] = set()  # the event loop itself holds no strong reference


class _ThisProcess:
    """This process, as a forked child tells itself from its parent."""

    forks = 0

    @classmethod
    def count(cls) -> None:
        cls.forks += 1


os.register_at_fork(after_in_child=_ThisProcess.count)


class _State(Enum):
    NEW = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()
    CLOSED = auto()


class _Task:
    """A background task: what cancels it, and whether it has ended."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()


class _Call:
    """A call under way, on any event loop: how it is interrupted."""

    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope
        self._soon = _soon()

    def interrupt(self) -> None:
        if self._soon == _soon():
            self._scope.cancel()
            return
        with suppress(RuntimeError):  # that loop has ended, and the call with it
            self._soon(self._scope.cancel)


class Supervisor:
    """The state of one object that is opened and closed, its background tasks, and what has gone wrong in them.

    Args:
        what: The name of the object in errors.
        unusable: The exception for a call before `open` or after `close`.
        above: The supervisors of what the object is built on, first the one whose errors explain most.
        one_loop: The object can be used only on the event loop that it was opened on: on another one, calls would
            wait for ever.
    """

    def __init__(
        self, what: str, unusable: type[NetnsKitError], *above: Supervisor, one_loop: bool = False
    ) -> None:
        self._what = what
        self._unusable = unusable
        self._above = above
        self._one_loop = one_loop
        self._home: Callable[..., object] | None = (
            None  # calls a function on the event loop of an object of one loop
        )
        self._forks = _ThisProcess.forks
        self._state = _State.NEW
        self._failure: Exception | None = None
        self._tasks: set[_Task] = set()
        self._calls: set[_Call] = set()  # of this object, and of those built on it

    def __del__(self) -> None:
        if self._state in (_State.OPENING, _State.OPEN) and not self.is_inherited:
            warnings.warn(
                f"unclosed {self._what}: leave its `async with` block, or await its close()",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a fork of the one that has made the object: what is open is that one's."""
        return self._forks != _ThisProcess.forks

    @property
    def condition(self) -> str:
        """The state of the object in words, for a repr."""
        if self._state is not _State.NEW and self.failure is not None:
            return f"failed: {self.failure}"
        return {_State.NEW: "not open", _State.OPENING: "opening", _State.OPEN: "open"}.get(
            self._state, "closed"
        )

    @property
    def is_open(self) -> bool:
        """Whether it has been opened and not closed.  What is open may have failed."""
        return self._state is _State.OPEN

    @property
    def failure(self) -> Exception | None:
        """The first error in the background, of this object or above it."""
        for each in self._above:
            if each.failure is not None:
                return each.failure
        return self._failure

    def check(self) -> None:
        """Raise the error in the background, or `unusable` if the object or one above it is not open."""
        error = self._refusal()
        if error is not None:
            raise error

    def _refusal(self) -> Exception | None:
        if self._state is not _State.NEW and self.failure is not None:
            return _fresh(self.failure)
        if self._state is _State.NEW:
            fix = "enter it with `async with`, or await its open() first"
            return self._unusable(f"the {self._what} is not open", fix=fix)
        if self._state in (_State.CLOSING, _State.CLOSED):
            return self._unusable(f"the {self._what} has been closed", fix="make a new one")
        if self._is_elsewhere():
            fix = (
                "use it there, and close it; in tests, give what uses it the same loop scope as what opens it"
            )
            return WrongEventLoop(f"the {self._what} was opened on another event loop", fix=fix)
        refusals = (each._refusal() for each in self._above)
        return next((refusal for refusal in refusals if refusal is not None), None)

    def _is_elsewhere(self) -> bool:
        """Whether the running event loop is another one than the object's, and that has not ended."""
        if self._home is None or self._home == _soon():
            return False
        try:
            self._home(_nothing)
        except RuntimeError:  # it has ended
            return False
        return True

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Call `check`, and interrupt the block as soon as `check` would raise; then it raises.

        The block lies within one call of the object, in one task.
        """
        self.check()
        with self._interruptible() as scope:
            try:
                yield
            except self._unusable:  # the end of something, which has a reason
                if self.failure is not None:
                    raise _fresh(self.failure) from None
                raise
        if scope.cancelled_caught:
            self.check()

    @contextmanager
    def _interruptible(self) -> Iterator[anyio.CancelScope]:
        lineage = list(self._lineage())
        with anyio.CancelScope() as scope:
            call = _Call(scope)
            for each in lineage:
                each._calls.add(call)
            try:
                yield scope
            finally:
                for each in lineage:
                    each._calls.discard(call)

    def _lineage(self) -> Iterator[Supervisor]:
        yield self
        for each in self._above:
            yield from each._lineage()

    def _interrupt(self) -> None:
        for call in tuple(self._calls):
            call.interrupt()

    # -- the tasks ------------------------------------------------------------------------------------

    def start(self, function: Callable[[Unpack[Args]], Awaitable[object]], *args: Unpack[Args]) -> None:
        """Run `function` in a background task until the object is closed.  Its error is the object's error."""
        task = _Task()
        self._tasks.add(task)
        _spawn(partial(self._run, task, partial(function, *args)), f"netns_kit {self._what}")

    async def _run(self, task: _Task, function: Callable[[], Awaitable[object]]) -> None:
        try:
            with task.scope:
                await function()
        except Exception as error:
            self.fail(error)
        except anyio.get_cancelled_exc_class():
            if not task.scope.cancel_called:  # the loop ends, or somebody cancels all of its tasks
                why = f"the event loop has cancelled the background tasks of the {self._what}"
                self.fail(self._unusable(why, fix="close it before the event loop ends"))
            raise
        finally:
            self._tasks.discard(task)
            task.ended.set()

    def fail(self, error: Exception) -> None:
        """Note an error in the background, and interrupt the calls under way.  The first error counts."""
        if self._failure is None:
            self._failure = error
        self._interrupt()

    # -- opening and closing --------------------------------------------------------------------------

    async def open(
        self, opening: Callable[[], Awaitable[None]], closing: Callable[[], Awaitable[None]]
    ) -> None:
        """Await `opening`.  If it fails or is cancelled `closing` is awaited at once, else when the object is closed.

        `closing` undoes as much as `opening` has done, and may be begun anew when it was interrupted.

        Raises:
            AlreadyOpened: It was opened before.
            Exception: What `opening` raises, or the error in the background.
        """
        if self._state is not _State.NEW:
            closed = self._state in (_State.CLOSING, _State.CLOSED)
            raise AlreadyOpened(
                f"the {self._what} {'has been closed' if closed else 'is open'}: it is opened once",
                fix="make a new one" if closed else "use it as it is",
            )
        self._closing = closing
        self._home = _soon() if self._one_loop else None
        self._opened, self._closed = anyio.Event(), anyio.Event()
        self._state = _State.OPENING
        try:
            with self._interruptible() as scope:
                await opening()
            if scope.cancelled_caught:
                self.check()
        except BaseException:
            self._opened.set()
            await self.end()
            raise
        self._opened.set()
        if self._state is _State.OPENING:
            self._state = _State.OPEN
        else:  # closed so late in opening that nothing was interrupted
            self.check()

    async def close(self) -> None:
        """End the object, and raise the error in the background.  An object that has been closed is left alone."""
        first = self._state in (_State.OPENING, _State.OPEN)
        if first and self._is_elsewhere():
            self.check()
        await self.end()
        if first and self.failure is not None:
            raise _fresh(self.failure)

    async def end(self) -> None:
        """End the object, and keep its error.  An object that is not open is left alone.

        Cancellation:
            It takes effect when the object has been closed.
        """
        if self._state in (_State.OPENING, _State.OPEN):
            self._state = _State.CLOSING
            self._interrupt()
            _spawn(self._end, f"netns_kit {self._what} closing")
        if self._state is _State.CLOSING:
            await finish(self._closed.wait)

    async def _end(self) -> None:
        try:
            await finish(self._close)
        except Exception as error:
            self.fail(error)
        finally:
            self._state = _State.CLOSED
            del self._closing
            self._closed.set()

    async def _close(self) -> None:
        await self._opened.wait()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.scope.cancel()
        with anyio.move_on_after(PATIENCE):
            for task in tasks:
                await task.ended.wait()
        await self._closing()

    async def wait_closed(self) -> None:
        """Wait for the end of the object, and raise the error in the background as soon as there is one."""
        if self._state is _State.NEW:
            self.check()
        with self._interruptible():
            if self._refusal() is None:
                await anyio.sleep_forever()
        if self._state in (_State.OPENING, _State.OPEN) or self.failure is not None:
            self.check()
        await self.end()
        if self.failure is not None:
            raise _fresh(self.failure)


class Openable(ABC):
    """Base class of objects that are opened and closed; `async with` does both.

    Any task of the event loop may open one, use it, and close it.  It is opened once.  `async with` of one that is
    open closes it at the end.
    """

    supervisor: Supervisor
    """The supervisor of the object; for parts of this library."""

    async def open(self) -> Self:
        """Open the object and return it; it is ready then.  Whoever opens one closes it.

        Raises:
            AlreadyOpened: It was opened before.
            NetnsKitError, OSError: What the class says of opening.  Nothing is left then.

        Cancellation:
            It leaves nothing.
        """
        await self.supervisor.open(self._open, self._close)
        return self

    async def close(self) -> None:
        """Close the object.  Calls that are under way end, and all that it made is gone when this returns.

        It may be called at any time, and again: the second call waits for the first and returns.

        Raises:
            NetnsKitError: An error has happened in the background.  The object is closed nevertheless.

        Cancellation:
            The object is closed nevertheless; the cancellation takes effect after that.
        """
        await self.supervisor.close()

    async def wait_closed(self) -> None:
        """Wait until the object is closed, or fails.

            async with anyio.create_task_group() as tasks, Network() as net:
                tasks.start_soon(net.wait_closed)       # its failure cancels what else runs in the group

        Raises:
            NetnsKitError: The error that has happened in the background, at once.

        Cancellation:
            It changes nothing.
        """
        await self.supervisor.wait_closed()

    async def __aenter__(self) -> Self:
        if not self.supervisor.is_open:
            return await self.open()
        self.supervisor.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except Exception as failure:
            if error is None:
                raise
            if error.__context__ is None and not _is_same(error, failure):
                error.__context__ = failure

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _close(self) -> None:
        """End what `_open` has made so far.  It may be begun anew when it was interrupted."""


@asynccontextmanager
async def beside(
    function: Callable[[Unpack[Args]], Coroutine[Any, Any, object]], *args: Unpack[Args]
) -> AsyncIterator[None]:
    """Run `function` in a task while the block runs.  The block's error is raised as it is, not in a group."""
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function, *args)
        try:
            yield
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # it holds this frame


async def finish(function: Callable[[], Awaitable[None]]) -> None:
    """Await `function()` to its end.  If it is interrupted it begins anew; the interruption is raised in the end."""
    interruption: BaseException | None = None
    while True:
        try:
            with anyio.CancelScope(shield=True):
                await function()
            break
        except (
            anyio.get_cancelled_exc_class(),
            KeyboardInterrupt,
        ) as error:  # no shield holds up asyncio's own
            interruption = error
    try:
        if interruption is not None:
            raise interruption
    finally:
        del interruption  # it holds this frame


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if it is asyncio's, and None if it is trio's."""
    if "asyncio" in sys.modules:
        import asyncio

        with suppress(RuntimeError):
            return asyncio.get_running_loop()
    return None


def _nothing() -> None:
    """Do nothing: an event loop that calls it has not ended."""


def _soon() -> Callable[..., object]:
    """Return the function by which any thread has the running event loop call a function."""
    loop = asyncio_loop()
    if loop is not None:
        return loop.call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


def _spawn(function: Callable[[], Awaitable[None]], name: str) -> None:
    """Run a function in a task that belongs to no task group."""
    loop = asyncio_loop()
    if loop is not None:

        async def run() -> None:
            await function()

        task = loop.create_task(run(), name=name)
        _running.add(task)
        task.add_done_callback(_running.discard)
    else:
        import trio

        trio.lowlevel.spawn_system_task(function, name=name, context=copy_context())


def _fresh(error: Exception) -> Exception:
    """Return a copy, to be raised: one exception raised in several tasks would have the tracebacks of all."""
    fresh = copy.copy(error)
    fresh.__cause__ = error.__cause__
    return fresh


def _is_same(error: BaseException, other: BaseException) -> bool:
    return type(error) is type(other) and error.args == other.args
