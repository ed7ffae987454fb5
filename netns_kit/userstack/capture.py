"""Capture: the frames of a stack in a pcapng file, from its beginning to its end.

The engine puts blocks into a `FrameRing`, one for each worker, and a thread of this process writes them to the file.
So a slow file holds up nobody: what the ring has no room for is lost and counted.  A file that cannot be written ends
the capture, and not the stack.

The file ends with an interface statistics block.  If the disk is full, the file is cut after its last whole block.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, TypeVar

import anyio
import anyio.to_thread

from netns_kit import arguments
from netns_kit.errors import ArgumentError, ArgumentTypeError, CaptureError, NetnsKitError
from netns_kit.forwarder.forwarder import CLOSING_SECONDS
from netns_kit.gateway.capture_filter import CaptureFilter
from netns_kit.gateway.captures import Captures
from netns_kit.gateway.gateway import Gateway
from netns_kit.tap import pcapng
from netns_kit.tap.frame_device import Device
from netns_kit.tap.frame_ring import ACCEPTED, ASLEEP, LOST, SEEN, STOPPING, FrameRing

if TYPE_CHECKING:
    from typing_extensions import Self

SNAPLEN_MAX = 1 << 18
LEAST_BYTES = 4096
_GLANCE = 0.1  # seconds after which the rings are looked at though there is not much in them
_NOTE = "TCP super-segments are whole, as the kernel has them, and their checksums are not filled in"
_numbers = count()
T = TypeVar("T")


class Captured(Protocol):
    """What a capture needs of a stack."""

    @property
    def tap(self) -> Device: ...

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T: ...

    async def hand(
        self, fds: Sequence[Sequence[int]], operation: Callable[..., T], *arguments: object
    ) -> T: ...


class Capture:
    """A capture of the frames of a stack, while its block runs.  It is made by `UserStack.capture`.

    Args:
        stack: The stack.
        target: The path of a file, or a file that is open for bytes.
        where: The frames that are captured; None: all.
        snaplen: The bytes that are kept of each frame at most.
        max_bytes: The size at which the file is complete; None: there is none.
        max_seconds: The time after which it is; None: there is none.

    Raises:
        ArgumentError, ArgumentTypeError: An argument that cannot be used.
    """

    size = 0
    """Bytes of the file so far."""
    frames = 0
    """Frames that were to be captured so far, those lost included."""
    lost = 0
    """Frames of these that were lost so far, because the file was too slow."""
    ended: Literal["bytes", "seconds", "error"] | None = None
    """Why the capture has ended before its block: `max_bytes` or `max_seconds` was reached, or the file failed."""

    def __init__(
        self,
        stack: Captured,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        where: CaptureFilter | None,
        snaplen: int,
        max_bytes: int | None,
        max_seconds: float | None,
    ) -> None:
        arguments.instance(
            "where", where, (CaptureFilter, type(None)), "a CaptureFilter, or None for all frames"
        )
        arguments.whole_number("snaplen", snaplen, 16, SNAPLEN_MAX)
        if max_bytes is not None:
            arguments.whole_number("max_bytes", max_bytes, LEAST_BYTES)
        if max_seconds is not None:
            arguments.instance("max_seconds", max_seconds, (int, float), "a number of seconds, or None")
            if not max_seconds > 0:
                raise ArgumentError(
                    "expected more than 0 seconds", "max_seconds", arguments.shown(max_seconds)
                )
        if where is not None and where.name is not None and len(stack.tap.queues) > 1:
            raise ArgumentError(
                "expected no name: of several workers one alone knows names",
                "where",
                arguments.shown(where),
                "give the network, or open the device with one queue",
            )
        if not isinstance(target, str | os.PathLike) and not callable(getattr(target, "write", None)):
            raise ArgumentTypeError(
                "expected a path, or a file that is open for bytes", "target", arguments.shown(target)
            )
        self._stack = stack
        self._target = target
        self._where = where
        self._snaplen = snaplen
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._number = next(_numbers)
        self._error: CaptureError | None = None
        self._names: list[tuple[bytes, str]] = []
        self._stopping = False

    async def __aenter__(self) -> Self:
        with ExitStack() as opened:
            self._file: Any = self._target
            if isinstance(self._target, str | os.PathLike):
                try:
                    self._file = await anyio.to_thread.run_sync(_opened, self._target, abandon_on_cancel=True)
                except OSError as error:
                    raise self._failure(error) from error
                opened.callback(self._file.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, self._wake)
            memory = []
            rings = []
            for _ in self._stack.tap.queues:
                memory.append(FrameRing.make())
                opened.callback(os.close, memory[-1])
                rings.append(FrameRing(memory[-1]))
                opened.callback(rings[-1].close)
            self._rings = rings
            self._began = time.time_ns()
            try:
                self._write([memoryview(self._beginning())])
            except OSError as error:
                raise self._failure(error) from error
            with anyio.CancelScope(shield=True):
                await self._stack.hand(
                    [(os.dup(fd), os.dup(self._wake)) for fd in memory],
                    Captures.begin,
                    self._number,
                    self._snaplen,
                    self._where,
                )
            self._owned = opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="netns_kit capture", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(CLOSING_SECONDS), suppress(NetnsKitError):  # the stack may have ended
                unnamed = await self._stack.ask(Captures.end, self._number)
                names = await self._stack.ask(Gateway.names, unnamed)
                self._names = [
                    (address.packed, name) for address, name in zip(unnamed, names, strict=True) if name
                ]
            self._stopping = True
            with suppress(OSError):  # the thread may have ended, and closed it
                os.eventfd_write(self._wake, 1)
            await anyio.to_thread.run_sync(self._thread.join, CLOSING_SECONDS)
            if self._thread.is_alive():
                self._error = self._failure(TimeoutError(f"nothing is read for {CLOSING_SECONDS:g} s"))
        if self._error is not None and error is None:
            raise self._error

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._owned:
            try:
                self._copy()
                self._finish()
            except (OSError, ValueError) as error:
                self._end("error")
                self._error = self._failure(error)
                self._tell_engines()
                with suppress(OSError, ValueError):
                    self._finish()

    def _copy(self) -> None:
        """Write what is captured, until the end of the block or a bound is reached."""
        until = math.inf if self._max_seconds is None else time.monotonic() + self._max_seconds
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._stopping and self.ended is None:
            for ring in self._rings:
                ring.counters[ASLEEP] = 1
            left = min(_GLANCE, until - time.monotonic())
            if poll.poll(max(left, 0.0) * 1000):
                os.eventfd_read(self._wake)
            self._drain()
            if time.monotonic() >= until:
                self._end("seconds")
        self._tell_engines()
        if self.ended is None:
            self._drain()

    def _end(self, why: Literal["bytes", "seconds", "error"]) -> None:
        if self.ended is None or why == "error":
            self.ended = why

    def _tell_engines(self) -> None:
        for ring in self._rings:
            ring.counters[STOPPING] = 1

    def _drain(self) -> None:
        """Write what the rings have, up to `max_bytes`."""
        for ring in self._rings:
            pieces = ring.waiting()
            size = sum(map(len, pieces))
            room = math.inf if self._max_bytes is None else self._max_bytes - self._last_size() - self.size
            if size > room:
                found = pcapng.whole_blocks(pieces, int(room))
                if found is None:
                    raise ValueError("the worker process has put in what are no blocks")
                pieces = _beginning(pieces, found)
                self._end("bytes")
            if pieces:
                self._write(pieces)
            ring.take(size)
        self._count()

    def _count(self) -> None:
        counted = [ring.count((ACCEPTED, LOST)) for ring in self._rings]
        self.frames, self.lost = (sum(each) for each in zip(*counted, strict=True))

    def _finish(self) -> None:
        """Write names and statistics."""
        self._count()
        last = self._statistics()
        if self._names:
            block = pcapng.names(self._names)
            if self._max_bytes is None or self.size + len(block) + len(last) <= self._max_bytes:
                self._write([memoryview(block)])
        self._write([memoryview(last)])
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()

    def _statistics(self) -> bytes:
        counted = [ring.count((SEEN, ACCEPTED, LOST)) for ring in self._rings]
        seen, accepted, lost = (sum(each) for each in zip(*counted, strict=True))
        return pcapng.statistics(time.time_ns(), self._began, received=seen, accepted=accepted, dropped=lost)

    def _last_size(self) -> int:
        return len(self._statistics())

    def _beginning(self) -> bytes:
        tap, host = self._stack.tap, os.uname()
        system = f"{host.sysname} {host.release}"
        return pcapng.section(host.machine, system, "netns-kit") + pcapng.interface(
            tap.name, self._snaplen, mac=tap.mac, system=system, hardware="netns_kit", comment=_NOTE
        )

    def _write(self, pieces: Sequence[memoryview]) -> None:
        """Write whole blocks.  If that fails, cut what is written of a block, where that is possible."""
        written = 0
        try:
            for piece in pieces:
                view = piece
                while len(view):
                    taken = self._file.write(view)
                    if taken is None:  # it does not block, and is full
                        raise BlockingIOError("the file takes nothing")
                    written += taken
                    view = view[taken:]
        except OSError:
            whole = pcapng.whole_blocks(pieces, written)
            with suppress(OSError, AttributeError, ValueError):
                self._file.seek((whole or 0) - written, os.SEEK_CUR)
                self._file.truncate()
                self.size += whole or 0
            raise
        self.size += written

    def _failure(self, error: Exception) -> CaptureError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        target = self._target
        name = os.fspath(target) if isinstance(target, str | os.PathLike) else getattr(target, "name", None)
        number = getattr(error, "errno", None)
        return CaptureError(
            f"the capture cannot be written: {reason}",
            None if name is None else "the file",
            None if name is None else str(name),
            None if number is None else "make room, or write to another file",
            number,
        )


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to be written.  This blocks if it is a pipe that nobody reads."""
    return open(path, "wb", buffering=0)


def _beginning(pieces: Sequence[memoryview], size: int) -> list[memoryview]:
    """Return the first bytes of some pieces."""
    found = []
    for piece in pieces:
        found.append(piece[:size])
        size -= len(found[-1])
    return [piece for piece in found if len(piece)]
