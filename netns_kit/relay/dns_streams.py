"""DNS over TCP (RFC 7766): many queries on one connection, answers as they come.

`ClientStream` is the server's end of a guest's connection, `ResolverStream` a connection to an upstream.  A guest is
accepted at once: it is us that it talks to, and its queries go where those in datagrams do.

What a client can make us hold: one query that has not come in whole, `PIPELINED` that are not answered, and answers
that it does not read, of all clients no more than `QUEUED_MAX`: then whoever is next to get one is cut off.  Who has
nothing to ask for `IDLE` seconds is hung up on.  An upstream that does not read is given up when `UNREAD_MAX` waits.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable
from typing import Protocol

from netns_kit.dns import BadMessage, Framing, framed
from netns_kit.dns.proxy import LONGEST_KEPT
from netns_kit.engine import IN, OUT, Engine
from netns_kit.stack import Closed, TcpConnection

PIPELINED = 64
QUEUED_MAX = 8 << 20  # bytes
UNREAD_MAX = 1 << 20  # bytes
UNANSWERED_MAX = 4096  # the oldest is asked again no more
IDLE = 10.0
READ = 1 << 16


class Server(Protocol):
    """Who is asked, and who counts what waits to be read."""

    queued: int

    def ask(self, query: bytes, turn: Turn, address: bytes) -> bool: ...


class Turn:
    """One query of a stream, which is a client of the server: two that are alike have an answer each."""

    __slots__ = ("is_answered", "stream")

    def __init__(self, stream: ClientStream) -> None:
        self.stream = stream
        self.is_answered = False

    def answer(self, message: bytes, now: float) -> None:
        """The answer, or a further message of one (a transfer's)."""
        first, self.is_answered = not self.is_answered, True
        self.stream.answer(message, now, first=first)


class ClientStream:
    """A guest's connection to the DNS address."""

    __slots__ = (
        "_address",
        "_blocked",
        "_closing",
        "_connection",
        "_ended",
        "_engine",
        "_framing",
        "_last",
        "_out",
        "_server",
        "_waiting",
        "timer_at",
        "timer_entry",
    )

    def __init__(self, engine: Engine, connection: TcpConnection, server: Server) -> None:
        self._engine = engine
        self._connection: TcpConnection | None = connection
        self._server = server
        self._address = connection.key[: (len(connection.key) - 4) // 2]
        self._framing = Framing(LONGEST_KEPT)
        self._out = bytearray()  # what the guest has no room for yet
        self._waiting = 0  # for so many answers
        self._blocked = False  # there is more than we take now
        self._ended = False  # the guest has no more queries
        self._closing = False  # it had none for too long
        self._last = engine.now
        self.timer_at = self.timer_entry = math.inf

    def answer(self, message: bytes, now: float, *, first: bool) -> None:
        """Hand it to the guest.  `first`: of all that answer the same query."""
        self._waiting -= first
        self._last = now
        if self._connection is not None:
            answer = framed(message)
            self._out += answer
            self._server.queued += len(answer)
            self._flush()
            if self._server.queued > QUEUED_MAX:
                self.abort()

    def abort(self) -> None:
        """RST to the guest."""
        connection = self._connection
        if connection is not None:
            self._forget()
            connection.abort(self._engine.now)

    def handle_timer(self, now: float) -> None:
        """Nothing has crossed for a while."""
        connection, due = self._connection, self._last + IDLE
        if connection is None:
            return
        if due > now:
            self._engine.timers.arm(self, due)
        elif self._ended or self._closing or self._out:
            self.abort()
        else:
            self._closing = True
            self._last = now
            self._engine.timers.arm(self, now + IDLE)
            connection.shutdown(now)

    def _flush(self) -> None:
        """Send what there is room for; then take what was left for later."""
        connection, now = self._connection, self._engine.now
        while connection is not None and self._out:
            room = connection.room()
            if not room:
                connection.wait_for_room(now)
                return
            piece = bytes(self._out[:room])
            del self._out[:room]
            self._server.queued -= len(piece)
            connection.send(piece, now)
        if connection is not None and self._blocked and self._waiting < PIPELINED:
            self._blocked = False
            connection.resume(now)
        self._finish()

    def _finish(self) -> None:
        if self._ended and self._connection is not None and not (self._waiting or self._out or self._blocked):
            self._connection.shutdown(self._engine.now)

    def _forget(self) -> None:
        self._connection = None
        self._server.queued -= len(self._out)
        self._out.clear()
        self.timer_at = math.inf

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def established(self) -> None:
        self._engine.timers.arm(self, self._engine.now + IDLE)

    def deliver(self, data: memoryview) -> int:
        if self._closing:
            return len(data)
        self._last = self._engine.now
        taken = 0
        while taken < len(data) and self._connection is not None:
            if self._waiting >= PIPELINED or self._out:
                self._blocked = True
                break
            try:
                size, query = self._framing.take(data[taken:])
            except BadMessage:
                self.abort()
                break
            taken += size
            if query is not None:
                self._waiting += 1
                if not self._server.ask(query, Turn(self), self._address):
                    self.abort()
        return taken

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def end(self) -> None:
        self._ended = True
        self._finish()

    def writable(self) -> None:
        self._flush()

    def keepalive(self, idle: float) -> None:
        pass  # the stack has answered it

    def traffic_class(self, tos: int) -> None:
        pass  # nothing of it leaves

    def closed(self, why: Closed) -> None:
        self._forget()


class ResolverStream:
    """A connection to an upstream, which may still be under way.

    `unanswered` are queries by their ids, in order; `answered` tells whether any was.  `heard` is called with each
    message, `ended` when the connection is over and the socket closed.
    """

    __slots__ = (
        "_ended",
        "_engine",
        "_events",
        "_framing",
        "_heard",
        "_out",
        "_socket",
        "answered",
        "unanswered",
    )

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        *,
        heard: Callable[[bytes], None],
        ended: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._socket = sock
        self._framing = Framing()
        self._heard, self._ended = heard, ended
        self._out = bytearray()
        self.unanswered: dict[bytes, bytes] = {}
        self.answered = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._events = IN | OUT  # it is writable when it is connected
        engine.add(sock.fileno(), self._on_events, self._events)

    def send(self, message: bytes) -> None:
        """Ask.  Again, before it is answered, is no use on a stream.  Raises OSError if nobody reads."""
        if self.unanswered.get(message[:2]) != message:
            if len(self._out) > UNREAD_MAX:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            self.unanswered[message[:2]] = message
            if len(self.unanswered) > UNANSWERED_MAX:
                del self.unanswered[next(iter(self.unanswered))]
            self._out += framed(message)
            self._watch()

    def close(self) -> None:
        """Again is fine."""
        if self._socket.fileno() >= 0:
            self._engine.remove(self._socket.fileno())
            self._socket.close()

    def _watch(self) -> None:
        events = IN | OUT if self._out else IN
        if events != self._events:
            self._events = events
            self._engine.modify(self._socket.fileno(), events)

    def _on_events(self, events: int) -> None:
        if events & OUT:
            self._write()
        if events & ~OUT:
            self._read()

    def _write(self) -> None:
        try:
            del self._out[: self._socket.send(self._out) if self._out else 0]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()  # what it said before it went is still to be read, and then its end
        self._watch()

    def _read(self) -> None:
        try:
            self._take(self._socket.recv(READ))
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self.close()
            self._ended()

    def _take(self, data: bytes) -> None:
        """Raises EOFError if that is all."""
        if not data:
            raise EOFError
        while data and self._socket.fileno() >= 0:
            size, message = self._framing.take(data)
            data = data[size:]
            if message is not None:
                self.answered = True
                self.unanswered.pop(message[:2], None)
                self._heard(message)
