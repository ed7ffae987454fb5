"""WorkerProcess: the owner's side of a worker.  The text of main.py describes the protocol.

`WorkerProcess` starts the worker, asks it, receives its messages, and ends it.  The worker is executed from the
calling thread, in a session of its own, so that it does not get the signals that a terminal sends to its foreground.

The worker reads hostile packets, and they may have taken it over.  So none of its messages is trusted to be well
formed.  A message is JSON of bounded size, decoded by type, in the order of the protocol; any other ends the worker.
What the worker writes to standard error, including its log, is logged here line by line, up to a bound.  The last
lines become part of the error that reports its end.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import anyio
import anyio.lowlevel

from netns_kit.child.child import Child
from netns_kit.child.codec import DecodeError, Failure, decode, dump, load, printable
from netns_kit.errors import StackClosed, StackCrashed
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import WorkerLinks
from netns_kit.host.undo import on_error
from netns_kit.operations import types_of
from netns_kit.userstack.drivers import CLOSED

from .input import encode

MESSAGES_AT_ONCE = 64
LINES_KEPT, LINE_MAX, LINES_LOGGED = 20, 500, 1000
READ = 1 << 16

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkerProcess:
    """A worker, as its owner sees it.

    Args:
        setup: The settings of the stack.
        news: Called on the event loop, with the number of a subscriber that has events to take.
        peers: The worker's links to the others; None: there are none.  The sockets stay the caller's.

    Attributes:
        sandbox: For each layer of the sandbox "on", or the reason why it is not.  Empty until the worker is ready.

    Raises:
        NotImportable: A worker cannot have a part of the settings.
        DeviceGone: The device is not open.
        OSError: The worker cannot be started.  Nothing is left open.
    """

    sandbox: Mapping[str, str] = {}

    def __init__(self, setup: Setup, news: Callable[[int], None], peers: WorkerLinks | None = None) -> None:
        """Start the worker."""
        self._news = news
        self._ready = anyio.Event()
        self._pending: deque[Question] = deque()
        self._unsent = anyio.Event()
        self._ended = False
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._logged = 0
        self._line = b""
        given = [setup.tap.fileno(), *(() if peers is None else peers.filenos())]
        if setup.supply is not None:
            given.append(setup.supply.fileno())
        given += [each.fileno() for supplies in setup.supplies for each in supplies]
        self._child = Child(f"{__package__}.main", given, errors=True, new_session=True)
        with on_error(self._child.close):
            self._channel = self._child.channel
            self._channel.send(encode(setup, peers, dict(zip(given, self._child.fds, strict=True))))
        if self._channel.backlog:
            self._unsent.set()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._child.pid

    async def run(self) -> None:
        """Receive the worker's messages until it ends.

        Raises:
            StackCrashed: The worker has ended.  If it has reported a `NetnsKitError`, that is raised instead.
        """
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._hear_errors)
                tasks.start_soon(self._send_rest)
                failure = await self._hear()
                tasks.cancel_scope.cancel()
        finally:
            self._ended = True
            while self._pending:
                self._pending.popleft().fail(StackClosed(CLOSED))
        if failure is not None:
            raise failure

    async def ready(self) -> None:
        """Wait until the worker is in its sandbox and reads frames.  If it fails to be, `run` raises the reason."""
        await self._ready.wait()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the worker's `Control` do an operation, and return its result.  If cancelled, it is done all the same.

        Raises:
            StackClosed: The worker has ended.  Other errors are those of the operation.
        """
        return cast("T", await self.put(operation, *arguments).answer())

    def put(self, operation: Callable[..., object], *arguments: object, fds: Sequence[int] = ()) -> Question:
        """Send a question, and return it, so that the caller may wait for its answer later.

        Args:
            operation: The operation.
            arguments: Its arguments.
            fds: Descriptors for the operation, which are this object's from now on.

        Raises:
            StackClosed: The worker has ended.
        """
        try:
            if self._ended:
                raise StackClosed(CLOSED)
            _, answer = types_of(operation)
            question, message = Question(answer), dump((operation.__qualname__, arguments))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._channel.send(message, fds)
        self._pending.append(question)
        if self._channel.backlog:
            self._unsent.set()
        return question

    async def _send_rest(self) -> None:
        """Send what the channel did not take at once, even if the task that has asked is cancelled."""
        while True:
            await self._unsent.wait()
            self._unsent = anyio.Event()
            while self._channel.backlog:
                await anyio.wait_writable(self._channel.fileno())
                self._channel.flush()

    async def close(self) -> None:
        """End the worker, and wait until it has reset its connections; if that takes too long, kill it.

        This must not be cancelled.  Calling it again is allowed.
        """
        if self._channel.fileno() < 0:
            return
        with anyio.CancelScope(shield=True):
            await self._child.stop()
        self._child.close()

    def kill(self) -> None:
        """Kill the worker, where nothing can wait."""
        self._child.close()

    # -- what it says ---------------------------------------------------------------------------------

    async def _hear(self) -> Exception:
        """Receive messages, and return the error that has ended the worker."""
        while True:
            await anyio.wait_readable(self._channel.fileno())
            await anyio.lowlevel.checkpoint()  # so that a worker which sends much does not block the loop
            try:
                for _ in range(MESSAGES_AT_ONCE):
                    message = self._channel.receive()
                    if message is None:
                        break
                    failure = self._take(message)
                    if failure is not None:
                        return failure
            except ValueError as error:  # `DecodeError` is one
                return StackCrashed(
                    f"the worker process says what makes no sense: {error}", fix="please report it"
                )
            if self._channel.ended:
                return await self._death()

    def _take(self, message: bytes) -> Exception | None:
        """Handle a message.  Return the error that ends the worker, if the message reports one.

        Raises:
            DecodeError: The message does not follow the protocol.
        """
        what, content = load(tuple[str, Any], message)
        if what == "failed":
            return _failure(content)
        if what == "ready" and not self._ready.is_set():
            self.sandbox = decode(dict[str, str], content)
            self._ready.set()
        elif what == "news":
            self._news(decode(int, content))
        elif what == "result" and self._pending:
            result = decode(self._pending[0].kind, content)
            self._pending.popleft().succeed(result)
        elif what == "error" and self._pending:
            error = _failure(content)
            self._pending.popleft().fail(error)
        else:
            raise DecodeError(f"{what!r} was not expected")
        return None

    async def _death(self) -> StackCrashed:
        status = await self._child.stop()
        while self._take_errors():
            pass
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_signal(-status)}"
        said = "\n".join(self._last_lines) or None
        return StackCrashed(
            f"the worker process {how}", value=said, fix="please report it" if status > 0 else None
        )

    async def _hear_errors(self) -> None:
        await anyio.wait_readable(self._child.errors)
        while self._take_errors():
            await anyio.wait_readable(self._child.errors)

    def _take_errors(self) -> bool:
        """Log some lines of the worker's standard error.  Return whether there were any."""
        data = self._child.errors.read(READ) or b""
        *lines, self._line = (self._line + data).split(b"\n")
        if not data or len(self._line) > LINE_MAX:
            lines.append(self._line)
            self._line = b""
        for line in lines:
            self._take_line(line)
        return bool(data)

    def _take_line(self, line: bytes) -> None:
        text = printable(line[:LINE_MAX].decode(errors="replace").rstrip())
        if text:
            self._last_lines.append(text)
            self._logged += 1
            if self._logged <= LINES_LOGGED:
                logger.warning("%s", text)
            elif self._logged == LINES_LOGGED + 1:
                logger.warning("the worker process says so much that the rest is not logged")


class Question:
    """A question to a worker, whose answer is of the type `kind`."""

    __slots__ = ("error", "finished", "kind", "result")

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.finished = anyio.Event()
        self.result: Any = None
        self.error: Exception | None = None

    async def answer(self) -> Any:
        """Wait for the answer, and return it.

        Raises:
            StackClosed: The worker ends before.  If the answer is an error, that is raised.
        """
        await self.finished.wait()
        if self.error is not None:
            raise self.error
        return self.result

    def succeed(self, result: Any) -> None:
        self.result = result
        self.finished.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finished.set()


def _failure(content: object) -> Exception:
    failure: Failure = decode(Failure, content)
    return failure.exception()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
