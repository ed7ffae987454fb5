"""DNS over TCP (RFC 7766): many queries on one connection, answers as they come.

`ClientStream` is the server's end of a guest's connection, `ResolverStream` a connection to an upstream.  A guest is
accepted at once: it is us that it talks to, and its queries go where those in datagrams do.

What a client can make us hold: one query that has not come in whole, `PIPELINED` that are not answered, and answers
that it does not read, of all clients no more than `QUEUED_MAX`: then whoever leaves most is cut off.  Of a zone
transfer no more is read from the upstream while `FULL` bytes wait.  Who has nothing to ask for `IDLE` seconds, or
reads nothing for so long, is hung up on.  An upstream that does not read is given up when `UNREAD_MAX` waits, and one
that talks nonsense when it has said `NONSENSE_MAX` messages that answer nothing.
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
from netns_kit.gateway.engine import IN, OUT, Engine
from netns_kit.stack import Closed, TcpConnection

PIPELINED = 64
QUEUED_MAX = 8 << 20  # bytes
FULL = 1 << 18  # bytes
UNREAD_MAX = 1 << 20  # bytes
NONSENSE_MAX = 64  # messages since the last that was an answer
UNANSWERED_MAX = 4096  # the oldest is asked again no more
IDLE = 10.0
LONGEST_WAIT = 60.0  # seconds that a client with nothing but queries under way is kept
HEADER = 12  # bytes that no message is shorter than
READ = 1 << 16


class Server(Protocol):
    """The server that streams ask, and that counts what waits to be read."""

    queued: int

    def ask(self, query: bytes, turn: Turn, key: bytes) -> bool: ...

    def opened(self, stream: ClientStream) -> None: ...

    def gone(self, stream: ClientStream) -> None: ...

    def relieve(self) -> None: ...


class Turn:
    """One query of a stream, which is a client of the server: two that are alike have an answer each."""

    __slots__ = ("is_answered", "stream")

    def __init__(self, stream: ClientStream) -> None:
        self.stream = stream
        self.is_answered = False

    def answer(self, message: bytes, now: float) -> None:
        """Hand over the answer, or a further message of one (a transfer's)."""
        first, self.is_answered = not self.is_answered, True
        self.stream.answer(message, now, first=first)


class ClientStream:
    """A guest's connection to the DNS address."""

    __slots__ = (
        "_blocked",
        "_closing",
        "_connection",
        "_ended",
        "_engine",
        "_framing",
        "_key",
        "_last",
        "_out",
        "_server",
        "_waiting",
        "timer_at",
        "timer_entry",
        "when_read",
    )

    def __init__(self, engine: Engine, connection: TcpConnection, server: Server) -> None:
        self._engine = engine
        self._connection: TcpConnection | None = connection
        self._server = server
        self._key = connection.key
        self._framing = Framing(LONGEST_KEPT)
        self._out = bytearray()  # what the guest has no room for yet
        self._waiting = 0  # for so many answers
        self._blocked = False  # there is more than we take now
        self._ended = False  # the guest has no more queries
        self._closing = False  # it had none for too long
        self._last = engine.now
        self.when_read: list[Callable[[], None]] = []  # called once when it is full no more, or over
        self.timer_at = self.timer_entry = math.inf

    @property
    def is_open(self) -> bool:
        """True as long as an answer still reaches the client."""
        return self._connection is not None

    @property
    def unread(self) -> int:
        """Bytes of answers that the guest has no room for."""
        return len(self._out)

    @property
    def is_full(self) -> bool:
        """True when no more of a transfer should be read for it."""
        return len(self._out) >= FULL

    def answer(self, message: bytes, now: float, *, first: bool) -> None:
        """Hand a message to the guest.  `first`: it is the first that answers its query."""
        self._waiting -= first
        self._last = now
        if self._connection is not None:
            answer = framed(message)
            self._out += answer
            self._server.queued += len(answer)
            self._flush()
            if self._server.queued > QUEUED_MAX:
                self._server.relieve()

    def abort(self) -> None:
        """End the connection: RST to the guest."""
        connection = self._connection
        if connection is not None:
            self._forget()
            connection.abort(self._engine.now)

    def handle_timer(self, now: float) -> None:
        """Hang up, or reset, when nothing has crossed for a while."""
        connection, due = self._connection, self._last + IDLE
        if self._waiting and not self._out:
            due = self._last + LONGEST_WAIT
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
            self._last = now
        if len(self._out) <= FULL // 2:
            self._wake()
        if connection is not None and self._blocked and self._waiting < PIPELINED:
            self._blocked = False
            connection.resume(now)
        self._finish()

    def _finish(self) -> None:
        if self._ended and self._connection is not None and not (self._waiting or self._out or self._blocked):
            self._connection.shutdown(self._engine.now)

    def _wake(self) -> None:
        waiting, self.when_read = self.when_read, []
        for wake in waiting:
            wake()

    def _forget(self) -> None:
        self._connection = None
        self._server.queued -= len(self._out)
        self._server.gone(self)
        self._out.clear()
        self.timer_at = math.inf
        self._wake()

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def established(self) -> None:
        self._server.opened(self)
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
                if not self._server.ask(query, Turn(self), self._key):
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

    `unanswered` are queries by their ids, in order; `has_answered` tells whether any was.  `heard` is called with
    each message, and tells whether it was an answer; `ended` is called when all is over and the socket closed.
    """

    __slots__ = (
        "_ended",
        "_engine",
        "_events",
        "_framing",
        "_heard",
        "_nonsense",
        "_out",
        "_socket",
        "has_answered",
        "is_paused",
        "unanswered",
    )

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        *,
        heard: Callable[[bytes], bool],
        ended: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._socket = sock
        self._framing = Framing()
        self._heard, self._ended = heard, ended
        self._out = bytearray()
        self.unanswered: dict[bytes, bytes] = {}
        self.has_answered = False
        self.is_paused = False
        self._nonsense = 0  # messages since the last answer
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._events = IN | OUT  # it is writable when it is connected
        engine.add(sock.fileno(), self._on_events, self._events)

    def send(self, message: bytes) -> None:
        """Ask.  A query that is not answered yet is not asked again: on a stream that is no use.

        Raises:
            OSError: The upstream does not read.
        """
        if self.unanswered.get(message[:2]) != message:
            if len(self._out) > UNREAD_MAX:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            self.unanswered[message[:2]] = message
            if len(self.unanswered) > UNANSWERED_MAX:
                del self.unanswered[next(iter(self.unanswered))]
            self._out += framed(message)
            self._watch()

    def close(self) -> None:
        """Close the socket.  Calling it again is fine."""
        if self._socket.fileno() >= 0:
            if not self.is_paused:
                self._engine.remove(self._socket.fileno())
            self._socket.close()

    def pause(self) -> None:
        """Read no more until `resume`, not even that it is over.  Calling it again is fine."""
        if not self.is_paused and self._socket.fileno() >= 0:
            self.is_paused = True
            self._engine.remove(self._socket.fileno())

    def resume(self) -> None:
        """Read on after `pause`.  Calling it again is fine."""
        if self.is_paused and self._socket.fileno() >= 0:
            self.is_paused = False
            self._engine.add(self._socket.fileno(), self._on_events, self._events)

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
        """Take what the stream has brought.

        Raises:
            EOFError: That is all, or the rest is not worth hearing.
        """
        if not data:
            raise EOFError
        rest = memoryview(data)
        while rest and self._socket.fileno() >= 0:
            size, message = self._framing.take(rest)
            rest = rest[size:]
            if message is None:
                continue
            asked = self.unanswered.get(message[:2])
            if len(message) >= HEADER and self._heard(message):
                self._nonsense = 0
                self.has_answered = True
                if self.unanswered.get(message[:2]) is asked:
                    self.unanswered.pop(message[:2], None)
            else:
                self._nonsense += 1
                if self._nonsense > NONSENSE_MAX:
                    raise EOFError
