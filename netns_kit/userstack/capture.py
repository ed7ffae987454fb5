"""Capture: the frames of a stack in a pcapng file, from its beginning to its end.

The engine puts blocks into a `FrameRing`, one for each worker, and a thread of this process writes them to the file.
So a slow file holds up nobody: what the ring has no room for is lost and counted.  A file that cannot be written ends
the capture, and not the stack.

The file ends with an interface statistics block.  If the disk is full, the file is cut after its last whole block.
Without a file the last blocks are kept in memory, for whoever asks for them.
"""

from __future__ import annotations

import errno
import io
import math
import os
import os.path
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing, suppress
from itertools import count
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TypedDict

import anyio
import anyio.to_thread

from netns_kit import arguments
from netns_kit.display.displayed import Displayed
from netns_kit.errors import (
    AlreadyOpened,
    ArgumentError,
    ArgumentTypeError,
    CaptureError,
    NetnsKitError,
    StackClosed,
)
from netns_kit.forwarder.forwarder import CLOSING_SECONDS
from netns_kit.gateway.capture_filter import CaptureFilter
from netns_kit.gateway.captures import Captures
from netns_kit.gateway.frame_capture import look
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.namespace.background import Supervisor
from netns_kit.operations import Asked
from netns_kit.policy.rules import RuleTarget
from netns_kit.tap import pcapng
from netns_kit.tap.frame_device import Device
from netns_kit.tap.frame_ring import ACCEPTED, ASLEEP, LOST, SEEN, STOPPING, FrameRing

from .capture_file import CaptureFile, KeptBlocks
from .events import Event, FlowEvent

if TYPE_CHECKING:
    from typing_extensions import Self

    from netns_kit.display.packets import Packets
    from netns_kit.display.view import View

SNAPLEN_MAX = 1 << 18
LEAST_BYTES = 4096
BLOCK_ROOM = 2 * pcapng.TEXT_MAX  # bytes of a block besides the frame
FILES_MAX = 1_000_000
_GLANCE = 0.1  # seconds after which the rings are looked at though there is not much in them
_NOTE = "TCP super-segments are whole, as the kernel has them, and their checksums are not filled in"
_numbers = count()


class Captured(Asked, Protocol):
    """What a capture needs of a stack."""

    @property
    def tap(self) -> Device: ...

    @property
    def supervisor(self) -> Supervisor: ...

    def events(self, *, processes: bool = False) -> AsyncGenerator[Event, None]: ...

    async def flows(self) -> tuple[FlowInfo, ...]: ...


class CaptureOptions(TypedDict, total=False):
    """The settings of a capture, see `UserStack.capture`."""

    where: CaptureFilter | RuleTarget | Iterable[RuleTarget] | None
    """Frames that are captured, as a `CaptureFilter`, or its targets alone; None: all."""
    snaplen: int
    """The bytes that are kept of each frame at most."""
    max_bytes: int | None
    """The size at which the file is complete, or the next one begins; None: there is none.  Without a file it is the
    memory.
    """
    max_seconds: float | None
    """The time after which the capture is complete; None: there is none."""
    files: int | None
    """Number of files; then a number is added to the path, and when the last one is full the oldest is written anew.
    None: one.
    """
    processes: bool
    """True if the next frame of a flow whose process inside was found has a comment that tells it, see
    `UserStack.events`.
    """


class Capture(Displayed):
    """A capture of the frames of a stack, while its block runs.

    It is made by `UserStack.capture`, and can be entered once.

    Args:
        stack: The stack.
        target: The path of a file, or a file that is open for bytes; None: memory.
        mac: Called with this on entering.  It returns the link address of the guest whose frames are captured; empty:
            those of all.
        where, snaplen, max_bytes, max_seconds, files, processes: See `CaptureOptions`.

    Raises:
        ArgumentError, ArgumentTypeError: An argument that cannot be used.
    """

    frames = 0
    """Frames that were to be captured so far, those lost included."""
    lost = 0
    """Frames of these that were lost so far, because the file was too slow."""
    ended: Literal["bytes", "seconds", "error", "member"] | None = None
    """Why the capture has ended before its block: `max_bytes` or `max_seconds` was reached, the file failed, or the
    member has ended."""

    paths: deque[str]
    """The files, oldest first; none if the target is no path."""

    _counted: Sequence[int] = (0, 0, 0)
    _is_entered = False
    _is_fresh = False  # whether nothing but its beginning is in the file
    _wake = -1
    _thread: threading.Thread | None = None
    is_over = False
    """True if no frame is captured any more."""

    def __init__(
        self,
        stack: Captured,
        target: str | os.PathLike[str] | BinaryIO | None,
        mac: Callable[[Capture], str] = lambda _: "",
        *,
        where: CaptureFilter | RuleTarget | Iterable[RuleTarget] | None = None,
        snaplen: int = SNAPLEN_MAX,
        max_bytes: int | None = None,
        max_seconds: float | None = None,
        files: int | None = None,
        processes: bool = False,
    ) -> None:
        if where is not None and not isinstance(where, CaptureFilter):
            where = CaptureFilter(where)
        arguments.whole_number("snaplen", snaplen, 16, SNAPLEN_MAX)
        if max_seconds is not None:
            expected = "seconds, more than 0, or None"
            arguments.number("max_seconds", max_seconds, expected, lambda value: value > 0)
        arguments.boolean("processes", processes)
        self._block = snaplen + BLOCK_ROOM
        _check_target(target, files, max_bytes, self._block)
        self._stack = stack
        self._target = target
        self._where = where
        self._snaplen = snaplen
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._files = files
        self._processes = processes
        self._mac = mac
        self._number = next(_numbers)
        self._error: CaptureError | None = None
        self._names: list[tuple[bytes, str]] = []
        self._stopping = False
        self._lock = threading.Lock()
        self._ending = anyio.Lock()
        self._kept: KeptBlocks | None = None
        self._file: CaptureFile | KeptBlocks
        self._rings: list[FrameRing] = []
        self._written = 0
        self.paths = deque(maxlen=files)

    @property
    def size(self) -> int:
        """The bytes of the file so far; of the last one, if there are several; without a file, all that were kept."""
        return self._file.size

    @property
    def condition(self) -> str:
        """The state of the capture in words."""
        if not self._is_entered:
            return "not open"
        if self._error is not None:
            return f"failed: {self._error}"
        if self.ended is not None:
            told = "member has ended" if self.ended == "member" else f"{self.ended} are reached"
            return f"complete: its {told}"
        return "complete" if self._stopping else "open"

    def __repr__(self) -> str:
        where = "memory" if self._target is None else arguments.shown(self._target)
        return f"<Capture to {where}: {self.condition}>"

    def _view(self) -> View:
        from .display import capture_view

        return capture_view(self)

    async def __aenter__(self) -> Self:
        self._mac(self)
        if self._is_entered:
            raise AlreadyOpened("the capture has been entered before", fix="make a new one")
        self._is_entered = True
        self._following = anyio.CancelScope()
        with ExitStack() as opened:
            try:
                await anyio.to_thread.run_sync(self._open, abandon_on_cancel=True)
            except OSError as error:
                raise self._failure(error) from error
            opened.callback(self._close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, self._wake)
            memory = []
            rings = []
            for _ in self._stack.tap.queues:
                memory.append(FrameRing.make())
                opened.callback(os.close, memory[-1])
                rings.append(FrameRing(memory[-1]))
                opened.callback(rings[-1].close)
            self._began = time.time_ns()
            try:
                if self._kept is None:
                    self._file.write([memoryview(self._beginning())])
            except OSError as error:
                raise self._failure(error) from error
            for ring in rings:
                ring.start_at(self._file.size)
            with anyio.CancelScope(shield=True):
                await self._begin(memory, self._mac(self))  # it may have ended meanwhile
                if self._processes:
                    self._stack.supervisor.start(self._follow)
            self._rings, self._owned = rings, opened.pop_all()
        self._thread = threading.Thread(target=self._run, name="netns_kit capture", daemon=True)
        self._thread.start()
        return self

    async def _begin(self, memory: Sequence[int], mac: str) -> None:
        """Have each engine capture frames, or none of them."""
        with ExitStack() as copies:
            fds = []
            for fd in memory:
                fds.append((os.dup(fd), os.dup(self._wake)))
                copies.callback(os.close, fds[-1][0])
                copies.callback(os.close, fds[-1][1])
            copies.pop_all()  # whatever happens, they are the stack's
        try:
            await self._stack.hand(fds, Captures.begin, self._number, self._snaplen, self._where, mac)
        except BaseException:
            with suppress(NetnsKitError):  # the stack has ended
                await self._stack.ask(Captures.end, self._number)
            raise

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self._stop()
        if self._error is not None and error is None:
            raise self._error

    async def end_with_member(self) -> None:
        """End the capture before its block, since the member ends whose frames it has.

        Cancellation: It has ended.
        """
        if not self.is_over:
            await self._stop()
            self.ended = self.ended or "member"

    async def _stop(self) -> None:
        self._following.cancel()
        with anyio.CancelScope(shield=True):
            async with self._ending:
                if not self.is_over:
                    # the stack may have ended
                    with anyio.move_on_after(CLOSING_SECONDS), suppress(NetnsKitError):
                        await self._find_names()
                        await self._stack.ask(Captures.end, self._number)
                    self._stopping = self.is_over = True
                    with suppress(OSError):  # the thread may have ended, and closed it
                        os.eventfd_write(self._wake, 1)
            if self._thread is not None:
                await anyio.to_thread.run_sync(self._thread.join, CLOSING_SECONDS)
                if self._thread.is_alive():
                    self._error = self._failure(TimeoutError(f"nothing is read for {CLOSING_SECONDS:g} s"))

    async def dump(self, target: str | os.PathLike[str] | BinaryIO) -> None:
        """Write what is kept in memory to a pcapng file: the last `max_bytes`, in the block or after it.

        The comment on the file's section lists the flows that are under way.

        Args:
            target: The path of a file that is made or emptied; or a file that is open for bytes, which stays open.

        Raises:
            ArgumentError: The capture is written to a file already.
            CaptureError: The file cannot be opened or written.
            StackClosed: The capture has not been entered.

        Cancellation: The file may be written.
        """
        self._check_entered()
        if self._kept is None:
            raise ArgumentError(
                "expected a capture in memory", "target", arguments.shown(self._target), "capture to None"
            )
        flows: tuple[FlowInfo, ...] = ()
        with suppress(NetnsKitError):  # the stack may have ended
            flows = await self._stack.flows()
            if not self.is_over:
                await self._find_names()
        text = "\n".join(map(_shown, flows))
        try:
            await anyio.to_thread.run_sync(self._dump, target, text)
        except OSError as error:
            raise self._failure(error, target) from error

    async def packets(self) -> Packets:
        """Return the packets that are in the file or in memory so far, for a look at them.

        Raises:
            ArgumentError: The capture is written to a file of the caller's: `read_capture` reads that.
            CaptureError: The file cannot be read.
            StackClosed: The capture has not been entered.

        Cancellation: Nothing is changed.
        """
        self._check_entered()
        from .capture_reader import packets_of, read_captures  # few need them

        if self._kept is not None:
            memory = io.BytesIO()
            await self.dump(memory)
            return await anyio.to_thread.run_sync(packets_of, [memory.getvalue()])
        if not self.paths:
            expected = "expected a path, or memory"
            fix = "read the file by `read_capture`"
            raise ArgumentError(expected, "target", arguments.shown(self._target), fix)
        return await anyio.to_thread.run_sync(read_captures, list(self.paths))

    def _check_entered(self) -> None:
        if not self._is_entered:
            raise StackClosed(
                "the capture is not open", fix="enter it with `async with`; its packets stay after that"
            )

    def _dump(self, target: str | os.PathLike[str] | BinaryIO, text: str) -> None:
        assert self._kept is not None
        with self._lock:
            self._drain()
            blocks = self._kept.blocks()
        file = CaptureFile(target)
        try:
            beginning = self._beginning(text)
            shown = {each for frame in pcapng.read(beginning + blocks)[0] for each in look(frame.data)[1]}
            names = pcapng.names(pair for pair in self._names if pair[0] in shown)
            for piece in (beginning, blocks, names, self._statistics()):
                file.write([memoryview(piece)])
        finally:
            file.close()

    async def _find_names(self) -> None:
        """Ask for the names of addresses that have none in the file; in memory any may have gone."""
        unnamed = await self._stack.ask(Captures.unnamed, self._number)
        names = await self._stack.ask(Gateway.names, unnamed)
        self._names = [(address.packed, name) for address, name in zip(unnamed, names, strict=True) if name]
        if self._kept is not None:
            named = await self._stack.ask(Captures.named, self._number)
            self._names += [(address.packed, name) for address, name in named]

    async def _follow(self) -> None:
        """Have the next frame of each new flow tell which process has opened it."""
        with self._following, suppress(NetnsKitError):  # the stack has ended, and others tell why
            async with aclosing(self._stack.events(processes=True)) as events:
                async for event in events:
                    if isinstance(event, FlowEvent) and event.kind == "opened" and event.process is not None:
                        process, flow = event.process, event.flow.id
                        text = f"process {process.inner_pid} ({process.name})"
                        await self._stack.ask(Captures.comment, self._number, flow, text)

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._owned:
            try:
                self._copy()
                self._finish()
            except Exception as error:  # the file may be the caller's own, and raise what it wants
                self._end("error")
                self._error = self._failure(error)
                traceback.clear_frames(error.__traceback__)  # which have views of the ring
                self._tell_engines()
                with suppress(Exception):
                    self._finish()
            with self._lock:  # they are unmapped now
                self._count()
                self._rings = []

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
            with self._lock:
                self._drain()
            if time.monotonic() >= until:
                self._end("seconds")
        self._tell_engines()
        if self.ended is None:
            with self._lock:
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
            while size:
                room = self._room()
                part = size if size <= room else pcapng.whole_blocks(pieces, int(room))
                if part is None or (not part and self._is_fresh):
                    raise ValueError("the worker process has put in what are no blocks")
                if part:
                    self._file.write(_beginning(pieces, part), ring.at)
                    self._is_fresh = False
                    ring.take(part)
                    size -= part
                    pieces = ring.waiting() if size else []
                elif not self._next_file():
                    self._end("bytes")
                    ring.take(size)
                    break
        self._count()

    def _room(self) -> float:
        """Return how many bytes can be written at once."""
        if self._kept is not None:
            return self._kept.piece
        return (
            math.inf
            if self._max_bytes is None
            else self._max_bytes - len(self._statistics()) - self._file.size
        )

    def _open(self) -> None:
        """Open the file, or the next one.  This blocks if it is a pipe that nobody reads."""
        target = self._target
        if target is None:
            assert self._max_bytes is not None
            room = self._max_bytes
            self._file = self._kept = KeptBlocks(room, max(room // 4, self._block))
            return
        if isinstance(target, str | os.PathLike):
            if self._files is not None:
                target = _numbered(os.fspath(target), self._written, self._files)
            self.paths.append(os.fspath(target))
        self._file = CaptureFile(target)
        self._written = (self._written + 1) % (self._files or 1)

    def _next_file(self) -> bool:
        """Go on in another file, if there is to be one."""
        if self._files is None:
            return False
        self._file.write([memoryview(self._statistics())])
        self._file.close()
        self._open()
        self._file.write([memoryview(self._beginning())])
        self._is_fresh = True
        return True

    def _close(self) -> None:
        with suppress(OSError):
            self._file.close()

    def _count(self) -> None:
        if self._rings:
            counted = [ring.count((SEEN, ACCEPTED, LOST)) for ring in self._rings]
            self._counted = [sum(each) for each in zip(*counted, strict=True)]
        _, self.frames, self.lost = self._counted

    def _finish(self) -> None:
        """Write names and statistics."""
        self._count()
        if self._kept is None:
            last = memoryview(self._statistics())
            names = memoryview(self._last_names())
            if names and (
                self._max_bytes is None or self._file.size + len(names) + len(last) <= self._max_bytes
            ):
                self._file.write([names])
            self._file.write([last])
            self._file.close()

    def _last_names(self) -> bytes:
        return pcapng.names(self._names) if self._names else b""

    def _statistics(self) -> bytes:
        self._count()
        seen, accepted, lost = self._counted
        return pcapng.statistics(time.time_ns(), self._began, received=seen, accepted=accepted, dropped=lost)

    def _beginning(self, text: str = "") -> bytes:
        tap, host = self._stack.tap, os.uname()
        system = f"{host.sysname} {host.release}"
        return pcapng.section(host.machine, system, "netns-kit", text) + pcapng.interface(
            tap.name, self._snaplen, mac=tap.mac, system=system, hardware="netns_kit", comment=_NOTE
        )

    def _failure(self, error: Exception, target: object = None) -> CaptureError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        target = self._target if target is None else target
        name = os.fspath(target) if isinstance(target, str | os.PathLike) else getattr(target, "name", None)
        number = getattr(error, "errno", None)
        return CaptureError(
            f"the capture cannot be written: {reason}",
            None if name is None else "the file",
            None if name is None else str(name),
            None if number is None else _FIXES.get(number, "write to another file"),
            number,
        )


def _check_target(target: object, files: int | None, max_bytes: int | None, block: int) -> None:
    """Check where frames are written, and how much.  Raises `ArgumentError`.

    Args:
        target, files, max_bytes: As for `Capture`.
        block: The bytes of the largest block.
    """
    is_path = isinstance(target, str | os.PathLike)
    is_binary = callable(getattr(target, "write", None)) and not isinstance(target, io.TextIOBase)
    if target is not None and not is_path and not is_binary:
        raise ArgumentTypeError(
            "expected a path, a file that is open for bytes, or None", "target", arguments.shown(target)
        )
    if files is not None:
        arguments.whole_number("files", files, 2, FILES_MAX)
        if not is_path:
            fix = "give a path, or leave it out"
            raise ArgumentError("expected one file: the target is no path", "files", str(files), fix)
    if max_bytes is not None:
        least = LEAST_BYTES + (block if files else 2 * block if target is None else 0)
        arguments.whole_number("max_bytes", max_bytes, least)
    elif files is not None or target is None:
        expected = "a size: without one the first file has all" if files else "a size of the memory"
        raise ArgumentError(f"expected {expected}", "max_bytes", "None", "give a number of bytes")


_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or write to another file"),
    errno.ENOENT: "make its directory, or write to another file",
}


def _numbered(path: str, number: int, of: int) -> str:
    """Return the path of one of several files: capture.pcapng is capture_0.pcapng and so on."""
    root, extension = os.path.splitext(path)
    return f"{root}_{number:0{len(str(of - 1))}}{extension}"


def _shown(flow: FlowInfo) -> str:
    name, rule = f" {flow.name}" if flow.name else "", f", rule {flow.rule}" if flow.rule else ""
    carried = f"{flow.bytes_from_guest} bytes from the guest, {flow.bytes_to_guest} to it"
    ends = f"{flow.protocol} {flow.guest} {flow.remote}{name}"
    return f"flow {flow.id}: {ends} {flow.state}, {flow.age:.1f} s, {carried}{rule}"


def _beginning(pieces: Sequence[memoryview], size: int) -> list[memoryview]:
    """Return the first bytes of some pieces."""
    found = []
    for piece in pieces:
        found.append(piece[:size])
        size -= len(found[-1])
    return [piece for piece in found if len(piece)]
