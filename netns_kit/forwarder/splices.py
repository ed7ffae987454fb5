"""Splices: two stream sockets joined, without the stack.

What one side says the other hears: bytes, the end of one direction, and a reset.  A little is read and sent.  Where a
read fills its buffer, what follows moves from socket to socket through a pipe (splice(2)) and is never copied to this
process, until little comes again.  What the other side has no room for stays where it is, but for one read or pipe.

Fact: a pipe has room for 16 pages, and so would a splice; with a mebibyte it moves 600 kB at once.  Copying by reads
as large is as fast, costs a fifth more, and would keep as much for each connection that does not take it.

Both sockets are registered once, edge-triggered: a read that brings less than was asked for has emptied the socket,
unless urgent data is in line, at which each read stops.  One that has been full is registered again, for events of
room, too.  Urgent data is carried as any other.  A splice never passes it, and says that there is nothing, or that
this was the end: only a read can tell.

The last bytes of a direction and its end go in one segment (MSG_MORE), where the source has said both.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from fcntl import fcntl

from netns_kit.gateway.engine import EDGE, ERROR, HANG_UP, IN, OUT, READ_HANG_UP, URGENT, Engine
from netns_kit.host.abi import F_SETPIPE_SZ
from netns_kit.uplink.sockets import RESET_ON_CLOSE

SMALL = 65536  # bytes that are read at once; a read of as many is followed by splices
# bytes that a splice may move at once, and that a pipe has room for, where the user may have that
LARGE = 1 << 20
SPLICES_PER_STEP = 8
PIPES_KEPT = 16
EVENTS = IN | READ_HANG_UP | URGENT | EDGE
_UNUSUAL = READ_HANG_UP | HANG_UP | ERROR | URGENT
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pipes:
    """The buffer and the pipes that all flows of one engine share; a pipe is taken while it holds bytes.

    Args:
        is_free: Returns whether a descriptor may be taken.
    """

    def __init__(self, is_free: Callable[[], bool] = lambda: True) -> None:
        self._is_free = is_free
        self._kept = PIPES_KEPT
        self.buffer = memoryview(bytearray(SMALL))
        self._free: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """Return a pipe that is empty: the end to read from, and the end to write to.  Raises OSError."""
        if self._free:
            return self._free.pop()
        if not self._is_free():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with suppress(OSError):  # the user's pipes have as many pages as they may (pipe(7))
            fcntl(pipe[1], F_SETPIPE_SZ, LARGE)
        return pipe

    def give(self, pipe: tuple[int, int]) -> None:
        """Take an empty pipe back."""
        if len(self._free) < self._kept:
            self._free.append(pipe)
        else:
            drop(pipe)

    def close(self) -> None:
        """Close the pipes that nobody has, and those that come back."""
        self._kept = 0
        while self._free:
            drop(self._free.pop())


def drop(pipe: tuple[int, int]) -> None:
    """Close a pipe, with what it holds."""
    for fd in pipe:
        os.close(fd)


class Splice:
    """Two connected stream sockets, which are this object's from now on.

    Args:
        engine: Waits for the sockets.
        pipes: Whose buffer and pipes to use.
        outer: The client's connection.
        inner: The one that leads to what the client wants.
        ended: Called when both are closed.

    Raises:
        OSError: A socket cannot be watched; both are the caller's then.
    """

    __slots__ = ("_ended", "engine", "inner", "inward", "outer", "outward", "pipes", "reset_by")

    reset_by: socket.socket | None  # once it is closed

    def __init__(
        self,
        engine: Engine,
        pipes: Pipes,
        outer: socket.socket,
        inner: socket.socket,
        ended: Callable[[Splice], None],
    ) -> None:
        self.engine, self.pipes = engine, pipes
        self._ended = ended
        self.outer, self.inner = outer, inner
        self.inward = inward = _Direction(self, outer, inner)
        self.outward = outward = _Direction(self, inner, outer)
        engine.add(inner.fileno(), outward.on_events, EVENTS)
        try:  # the newest descriptor is the last, by which `Admission` goes: the other one may be of the stock
            engine.add(outer.fileno(), inward.on_events, EVENTS)
        except BaseException:
            engine.remove(inner.fileno())
            raise

    def broken(self, by: _Direction) -> None:
        """Reset both sides, since what `by` sends to is gone; what that side has said before is delivered first."""
        other = self.outward if by is self.inward else self.inward
        by.ended = other.is_broken = True
        if other.ended:
            self.close(reset=True, by=self.inner if by is self.inward else self.outer)
        else:
            other.read_on()

    def close(self, *, reset: bool = False, by: socket.socket | None = None) -> None:
        """Close both; with `reset`, both peers are told so: `by` is the one that has been reset.  Again is fine."""
        inner, outer, engine = self.inner, self.outer, self.engine
        if outer.fileno() < 0:
            return
        self.reset_by = by
        inward, outward = self.inward, self.outward
        inward.ended = outward.ended = True
        if inward.pipe is not None or outward.pipe is not None:  # with what has not been sent
            for pipe in filter(None, (inward.pipe, outward.pipe)):
                drop(pipe)
            inward.pipe = outward.pipe = None
        engine.remove(outer.fileno())
        engine.remove(inner.fileno())
        if reset:
            outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        outer.close()
        inner.close()
        self._ended(self)


class _Direction:
    """What goes from one socket to the other."""

    # What most connections keep to their end: theirs alone are set.
    carried = 0
    blocked = False  # the sink has no room
    ended = False
    is_broken = False  # the source has been reset, as sending to it has told
    _held: bytes = b""  # read, and not sent yet
    pipe: tuple[int, int] | None = None  # which holds `_waiting` bytes
    _waiting = 0
    _is_bulk = False  # the last read has filled its buffer
    _reads_on = False  # until there is no more
    _more = 0  # flag of what is sent: the end comes next, and goes with it
    _is_told = False  # of room in the sink

    def __init__(self, splice: Splice, source: socket.socket, sink: socket.socket) -> None:
        self._splice = splice
        self._source, self._sink = source, sink

    def on_events(self, events: int) -> None:
        """Handle the events of the source."""
        if events == IN:
            self.pump()
            return
        if events & OUT:
            splice = self._splice
            back = splice.outward if self is splice.inward else splice.inward
            if back.blocked:
                back.unblock()
        if events & _UNUSUAL:
            if self.ended:
                if events & ERROR and self._has_failed():  # after its end
                    self._splice.close(reset=True, by=self._source)
                return
            if events & READ_HANG_UP and not events & ERROR:
                self._more = socket.MSG_MORE
            self.read_on()
        elif events & IN:
            self.pump()

    def read_on(self) -> None:
        """Carry what there is, and the end behind it: the source will say no more, or urgent data is in line."""
        self._reads_on = True
        self.pump()

    def _has_failed(self) -> bool:
        sock = self._source
        return sock.fileno() >= 0 and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def pump(self) -> None:
        """Carry what there is."""
        if self.blocked or self.ended:
            return
        if self._is_bulk:
            self._move()
            return
        buffer = self._splice.pipes.buffer
        while True:
            try:
                size = self._source.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError:
                self._fail()
                return
            if not size:
                self._end()
                return
            try:
                sent = self._sink.send(buffer[:size], self._more)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._splice.broken(self)
                return
            self.carried += sent
            if sent < size:
                self._held = bytes(buffer[sent:size])
                self._wait()
                return
            if size == SMALL:
                self._is_bulk = True
                self._move()
                return
            if not self._reads_on:
                return
            if self._splice.engine.is_late:
                self._splice.engine.again(self.pump)
                return

    def _fail(self) -> None:
        """Reset both sides, since the source has been; what has been sent is delivered first."""
        if self._more:
            with suppress(OSError):  # a unix socket has nothing that waits
                self._sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._splice.close(reset=True, by=self._source)

    def _wait(self) -> None:
        """Wait until the sink has room.  Events of that are asked for once this has happened: few ever need them."""
        self.blocked = True
        if not self._is_told:
            self._is_told = True
            self._splice.engine.modify(self._sink.fileno(), EVENTS | OUT)

    def unblock(self) -> None:
        """Go on: the sink has room again."""
        self.blocked = False
        try:
            if self._held:
                sent = self._sink.send(self._held)
                self.carried += sent
                self._held = self._held[sent:]
            elif self.pipe is not None:
                self._drain(self.pipe)
        except BlockingIOError:
            pass
        except OSError:
            self._splice.broken(self)
            return
        if self._held or self._waiting:
            self.blocked = True  # events of room are told by now
            return
        if self.pipe is not None:
            self._give_back(self.pipe)
        self._move()

    def _move(self) -> None:
        """Carry much, through a pipe."""
        if self.blocked or self.ended:
            return
        source, pipes, before = self._source, self._splice.pipes, self.carried
        try:
            pipe = self.pipe = pipes.take()
        except OSError:  # there is no descriptor for one
            self._is_bulk = False
            self._splice.engine.again(self.pump)
            return
        try:
            for _ in range(SPLICES_PER_STEP):
                try:
                    size = os.splice(source.fileno(), pipe[1], LARGE, flags=_FLAGS)
                except BlockingIOError:
                    self._give_back(pipe)
                    if self._reads_on:
                        self._read_on()
                    else:
                        self._is_bulk = self.carried - before >= SMALL
                    return
                if not size:
                    self._give_back(pipe)
                    self._read_on()
                    return
                self._waiting = size
                try:
                    self._drain(pipe)
                except BlockingIOError:
                    pass
                except OSError:
                    self._splice.broken(self)
                    return
                if self._waiting:
                    self._wait()
                    return
                if self._splice.engine.is_late:
                    break
        except OSError:
            self._fail()
            return
        self._give_back(pipe)
        self._splice.engine.again(self._move)

    def _read_on(self) -> None:
        """Read, where a splice finds nothing: the end, or urgent data."""
        self._reads_on, self._is_bulk = True, False
        self._splice.engine.again(self.pump)

    def _drain(self, pipe: tuple[int, int]) -> None:
        while self._waiting:
            sent = os.splice(pipe[0], self._sink.fileno(), self._waiting, flags=_FLAGS)
            self._waiting -= sent
            self.carried += sent

    def _give_back(self, pipe: tuple[int, int]) -> None:
        self.pipe = None
        self._splice.pipes.give(pipe)

    def _end(self) -> None:
        """Tell the sink that the source has ended."""
        if self.is_broken:
            self._splice.close(reset=True, by=self._source)
            return
        self.ended = True
        splice = self._splice
        if splice.inward.ended and splice.outward.ended:
            splice.close()  # which tells the sink, too
            return
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            splice.close(reset=True, by=self._sink)
