"""Our side of a worker, whose own text (main.py) gives the protocol.

`WorkerProcess` starts the worker, asks it, hears what it says and ends it.  It is started by a plain exec in the
calling thread, in a session of its own: what a terminal sends to all in the foreground is not for it.

The worker reads hostile packets, and may have been taken over by them.  So nothing it says is believed to be well
formed: it is JSON, bounded in size, decoded by type, in the order of the protocol; what is not is the worker's end.
What it writes on standard error, its log among it, is logged here line by line, up to a bound; the last of it goes
into the error that tells of its end.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import anyio
import anyio.lowlevel

from netns_kit.child.child import Child
from netns_kit.child.codec import DecodeError, Failure, decode, dump, load, printable
from netns_kit.errors import StackClosed, StackCrashed
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import WorkerLinks
from netns_kit.operations import types_of
from netns_kit.userstack.drivers import CLOSED

from .input import encode

MESSAGES_AT_ONCE = 64
LINES_KEPT, LINE_MAX, LINES_LOGGED = 20, 500, 1000
READ = 1 << 16

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkerProcess:
    """`news` is called on the event loop, with the number of a subscriber that has events to take.

    `sandbox`: what the worker has given up, layer by layer: "on", or why it is not.  Empty until it is ready.
    """

    sandbox: Mapping[str, str] = {}

    def __init__(self, setup: Setup, news: Callable[[int], None], peers: WorkerLinks | None = None) -> None:
        """Start it, alone or with its links to others, whose sockets stay the caller's.

        Raises `NotImportable`, `DeviceGone` and OSError; nothing is left then."""
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
        self._child = Child(f"{__package__}.main", given, errors=True, new_session=True)
        try:
            self._channel = self._child.channel
            self._channel.send(encode(setup, peers, dict(zip(given, self._child.fds, strict=True))))
        except BaseException:
            self._child.close()
            raise
        if self._channel.backlog:
            self._unsent.set()

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._child.pid

    async def run(self) -> None:
        """Hear it.  Raises what has ended it: a `NetnsKitError` of its own, else `StackCrashed`."""
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
        """Wait until it has entered its sandbox and reads frames.  `run` raises what keeps it."""
        await self._ready.wait()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the worker's `Control` do it, also when cancelled.  Raises what it raises, and `StackClosed`."""
        return cast("T", await self.put(operation, *arguments).answer())

    def put(self, operation: Callable[..., object], *arguments: object) -> Question:
        """Ask it, and let the caller wait for the answer later, or never.  Raises `StackClosed`."""
        if self._ended:
            raise StackClosed(CLOSED)
        _, answer = types_of(operation)
        question = Question(answer)
        self._channel.send(dump((operation.__qualname__, arguments)))
        self._pending.append(question)
        if self._channel.backlog:
            self._unsent.set()
        return question

    async def _send_rest(self) -> None:
        """Send what the channel did not take at once, whatever has become of who asked."""
        while True:
            await self._unsent.wait()
            self._unsent = anyio.Event()
            while self._channel.backlog:
                await anyio.wait_writable(self._channel.fileno())
                self._channel.flush()

    async def close(self) -> None:
        """End the worker, and wait until it has reset what was open; kill it if that takes too long.  Not to be
        cancelled.  Again is fine.
        """
        if self._channel.fileno() < 0:
            return
        with anyio.CancelScope(shield=True):
            await self._child.stop()
        self._child.close()

    def kill(self) -> None:
        """End it at once, where nothing can wait."""
        self._child.close()

    # -- what it says ---------------------------------------------------------------------------------

    async def _hear(self) -> Exception:
        """What has ended it."""
        while True:
            await anyio.wait_readable(self._channel.fileno())
            await anyio.lowlevel.checkpoint()  # however much it says
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
        """What has ended it, if it says so.  Raises `DecodeError`."""
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
        """Log some of what it has written on standard error; whether there was any."""
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
        """Wait for the answer.  Raises the error that it is, and `StackClosed` if the worker ends before."""
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
