"""Our side of a worker, whose own text (worker.py) gives the protocol.

`WorkerProcess` starts the worker, asks it, hears what it says and ends it.  It is started by a plain exec in the
calling thread, in a session of its own: what a terminal sends to all in the foreground is not for it.

The worker reads hostile packets, and may have been taken over by them.  So nothing it says is believed to be well
formed: it is JSON, bounded in size, decoded by type, in the order of the protocol; what is not is the worker's end.
What it writes on standard error, its log among it, is logged here line by line, up to a bound; the last of it goes
into the error that tells of its end.

Policies.  An `Uplink` is pickled; functions and classes travel by name, and are imported there.  So it takes
what can be imported and is the same file there, which is checked, and what else it has is copied: what is changed
here while the worker runs is not changed there.  A policy that is made to change, an object with a list of who is
blocked, would then let pass what its owner believes to be blocked: it is refused.  What cannot be seen from here are
globals, and what a subclass of `Uplink` keeps.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any, TypeVar, cast, get_type_hints

import anyio
import anyio.lowlevel

from netns_kit.child.channel import Channel
from netns_kit.child.codec import Failure, Nonsense, decode, dump, load, printable
from netns_kit.dhcp import DhcpSettings
from netns_kit.errors import NotImportable, StackClosed, StackCrashed
from netns_kit.host.environment import child_environment
from netns_kit.stack import Limits
from netns_kit.subnet import Subnet
from netns_kit.tap.frame_device import Device
from netns_kit.uplink.uplink import Uplink
from netns_kit.userstack.drivers import CLOSED

from .main import FIX, Order, Seat, Start

STOP_SECONDS = 2.0  # how long it may take to end before it is killed
MESSAGES_AT_ONCE = 64
LINES_KEPT, LINE_MAX, LINES_LOGGED = 20, 500, 1000
PIPE, READ = 1 << 20, 1 << 16
PACKAGE = Path(__file__).parents[2]
BOOT = """\
import os, sys, types
sys.modules["netns_kit"] = types.ModuleType("netns_kit")
sys.modules["netns_kit"].__path__ = [sys.argv[1]]
from netns_kit.userstack.worker.main import main
os._exit(main(int(sys.argv[2]), int(sys.argv[3])))  # what Python does at its end takes longer than all else at ours
"""

FIX_OF_MAIN = (
    "define it in a module beside the program, say policies.py, and import it from there; or use "
    'driver="thread"'
)

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkerProcess:
    """`news` is called on the event loop, with the number of a subscriber that has events to take.

    `sandbox`: what the worker has given up, layer by layer: "on", or why it is not.  Empty until it is ready.
    """

    sandbox: Mapping[str, str] = {}

    def __init__(
        self,
        tap: Device,
        uplink: Uplink,
        subnet: Subnet,
        limits: Limits | None,
        dhcp: DhcpSettings | None,
        news: Callable[[int], None],
        *,
        required: tuple[str, ...] = (),
        seat: Seat | None = None,
    ) -> None:
        """Start it, alone or at its `seat` among others, whose sockets stay the caller's.

        Raises `NotImportable`, `DeviceGone` and OSError; nothing is left then."""
        self._news = news
        self._ready = anyio.Event()
        self._pending: deque[Question] = deque()
        self._unsent = anyio.Event()
        self._ended = False
        self._last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._logged = 0
        self._line = b""
        with ExitStack() as ours, ExitStack() as passed:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._channel = Channel(mine)
            ours.callback(self._channel.close)
            passed.callback(theirs.close)
            owner = os.pidfd_open(os.getpid())
            passed.callback(os.close, owner)
            fds: list[int] = []
            sockets = () if seat is None else (seat.inbox, *seat.outboxes)
            for fd in (theirs.fileno(), owner, tap.fileno(), *(each.fileno() for each in sockets)):
                fds.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))  # 0 to 2 are free in a daemon
                passed.callback(os.close, fds[-1])
            taken = None if seat is None else (seat.number, fds[3], tuple(fds[4:]))
            start = Start(tap.at(fds[2]), uplink, subnet, limits, dhcp, required, taken)
            order = os.memfd_create("order")
            passed.callback(os.close, order)
            with io.FileIO(order, "w", closefd=False) as file:
                file.write(pack(start))
            os.lseek(order, 0, os.SEEK_SET)
            errors, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # it never waits for us
            passed.callback(os.close, writing)
            self._errors = io.FileIO(errors)
            ours.callback(self._errors.close)
            with suppress(OSError):  # a user may not have many as large as that, pipe(7)
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
            self._popen = subprocess.Popen(
                [sys.executable, "-S", "-E", "-I", "-c", BOOT, str(PACKAGE), *map(str, fds[:2])],
                stdin=order,
                stdout=subprocess.DEVNULL,
                stderr=writing,
                pass_fds=fds,
                env=child_environment(),
                start_new_session=True,
            )
            ours.callback(self._popen.wait)
            ours.callback(self._popen.kill)
            self._pidfd = io.FileIO(os.pidfd_open(self._popen.pid))
            ours.pop_all()

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._popen.pid

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
        question = Question(_result_of(operation))
        self._channel.send(dump((operation.__name__, arguments)))
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
        if self._pidfd.closed:
            return
        with anyio.CancelScope(shield=True):
            self._channel.shutdown()
            await self._until_ended()
        self._pidfd.close()
        self._channel.close()
        self._errors.close()

    def kill(self) -> None:
        """End it at once, where nothing can wait."""
        self._popen.kill()
        self._popen.wait()
        self._pidfd.close()
        self._channel.close()
        self._errors.close()

    async def _until_ended(self) -> int:
        """Its status, as `subprocess` has it."""
        with anyio.move_on_after(STOP_SECONDS) as patience:
            await anyio.wait_readable(self._pidfd)
        if patience.cancelled_caught:
            self._popen.kill()
            await anyio.wait_readable(self._pidfd)
        return self._popen.wait()  # at once: it has ended

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
            except ValueError as error:  # `Nonsense` is one
                return StackCrashed(
                    f"the worker process says what makes no sense: {error}", fix="please report it"
                )
            if self._channel.ended:
                return await self._death()

    def _take(self, message: bytes) -> Exception | None:
        """What has ended it, if it says so.  Raises `Nonsense`."""
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
            raise Nonsense(f"{what!r} was not expected")
        return None

    async def _death(self) -> StackCrashed:
        status = await self._until_ended()
        while self._take_errors():
            pass
        how = f"ended with status {status}" if status >= 0 else f"was killed by {_signal(-status)}"
        said = "\n".join(self._last_lines) or None
        return StackCrashed(
            f"the worker process {how}", value=said, fix="please report it" if status > 0 else None
        )

    async def _hear_errors(self) -> None:
        await anyio.wait_readable(self._errors)
        while self._take_errors():
            await anyio.wait_readable(self._errors)

    def _take_errors(self) -> bool:
        """Log some of what it has written on standard error; whether there was any."""
        data = self._errors.read(READ) or b""
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


@cache
def _result_of(operation: Callable[..., object]) -> Any:
    return get_type_hints(operation)["return"]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# -- what it is given ---------------------------------------------------------------------------------


def check(uplink: Uplink) -> None:
    """Raises `NotImportable` if no worker can have it."""
    for function in (uplink.policy, uplink.dns_hook):
        if function is not None:
            _check_constant(function)
    _pickled(uplink)


def _check_constant(value: object) -> None:
    """Whether it says tomorrow what it says today, as far as objects tell: a copy of what may change would let pass
    what the original has come to refuse."""
    parts: Iterable[object] = ()
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, tuple | frozenset):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type) and _is_frozen(value):
        parts = (getattr(value, each.name) for each in fields(value))
    elif type(value) not in _CONSTANTS and not isinstance(value, Enum | type):
        raise NotImportable(
            f"policy or hook has {value!r}, which may change here, and a worker process would not see it",
            fix=FIX,
        )
    for part in parts:
        _check_constant(part)


_CONSTANTS = frozenset(
    {NoneType, bool, int, float, str, bytes, FunctionType, re.Pattern}
    | {IPv4Address, IPv6Address, IPv4Network, IPv6Network, IPv4Interface, IPv6Interface}
)


def _is_frozen(record: Any) -> bool:
    frozen: bool = record.__dataclass_params__.frozen
    return frozen


def pack(start: Start) -> bytes:
    """`start` for the worker's standard input.  Raises `NotImportable`."""
    pickled, names = _pickled(start)
    path = tuple(os.path.abspath(each) for each in sys.path)
    modules = {name: getattr(sys.modules[name], "__file__", None) for name in names}
    return pickle.dumps(Order(path, modules, pickled))


def _pickled(value: object) -> tuple[bytes, set[str]]:
    """And the names of the modules it needs."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(value)
    except NotImportable:
        raise
    except Exception as error:  # pickle raises what it likes
        raise NotImportable(f"a worker process cannot have this uplink: {error}", fix=FIX) from error
    return buffer.getvalue(), pickler.modules


class _Pickler(pickle.Pickler):
    """Notes the modules that functions and classes are found in, and refuses `__main__`, which is another there."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.modules: set[str] = set()

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, type | FunctionType):
            if value.__module__ == "__main__":
                what = (
                    f"`{value.__qualname__}`, which is of the program's own file or a notebook (`__main__`)"
                )
                raise NotImportable(f"a worker process cannot import {what}", fix=FIX_OF_MAIN)
            self.modules.add(value.__module__)
        return NotImplemented
