"""DNS over TCP (RFC 7766): many queries on one connection, answered in any order.

`ClientStream` is our end of a guest's connection to the DNS address.  `ResolverStream` is a connection to an
upstream.  A guest's connection is accepted at once, because we are its peer.  Its queries go the same way as those in
datagrams.

A client can make us hold: one incomplete query, `PIPELINED` unanswered queries, and answers that it does not read.
All clients together can have `QUEUED_MAX` bytes of unread answers; beyond that, the client with most of them is
reset.  A zone transfer is not read from the upstream while the client has `FULL` bytes unread.  A connection is ended
if the client asks nothing, or reads nothing, for `IDLE` seconds.

An upstream is given up if it leaves `UNREAD_MAX` bytes unread, or if it sends more than `NONSENSE_MAX` messages in a
row that answer nothing.
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
from netns_kit.stack import Closed, IcmpError, Refusal, TcpConnection
from netns_kit.stack.user import PassiveUser
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.sockets import prepare_stream

from .dialled import Dialled

PIPELINED = 64
QUEUED_MAX = 8 << 20  # bytes
FULL = 1 << 18  # bytes
UNREAD_MAX = 1 << 20  # bytes
NONSENSE_MAX = 64  # messages since the last answer
UNANSWERED_MAX = 4096  # queries that can be sent again if the connection ends; beyond that the oldest is not
IDLE = 10.0
LONGEST_WAIT = 60.0  # seconds that a client is kept while its queries are pending
HEADER = 12  # bytes of the shortest message
READ = 1 << 16


class Server(Protocol):
    """The server that the clients' connections ask.  `queued` is the number of bytes that clients have not read."""

    queued: int

    def ask(self, query: bytes, turn: Turn, key: bytes) -> bool: ...

    def opened(self, stream: ClientStream) -> None: ...

    def gone(self, stream: ClientStream) -> None: ...

    def relieve(self) -> None: ...


class Turn:
    """One query on a client's connection.  It is the server's client, so that equal queries get an answer each."""

    __slots__ = ("is_answered", "stream")

    def __init__(self, stream: ClientStream) -> None:
        self.stream = stream
        self.is_answered = False

    def answer(self, message: bytes, now: float) -> None:
        """Send the answer; of a zone transfer, the next message of the answer."""
        first, self.is_answered = not self.is_answered, True
        self.stream.answer(message, now, first=first)


class ClientStream(PassiveUser):
    """A guest's connection to the DNS address."""

    __slots__ = (
        "_blocked", "_closing", "_connection", "_ended", "_engine", "_framing", "_key", "_last", "_out",
        "_server", "_waiting", "timer_at", "timer_entry", "when_read"
    )  # fmt: skip

    def __init__(self, engine: Engine, connection: TcpConnection, server: Server) -> None:
        self._engine = engine
        self._connection: TcpConnection | None = connection
        self._server = server
        self._key = connection.key
        self._framing = Framing(LONGEST_KEPT)
        self._out = bytearray()  # answers that do not fit into the guest's window yet
        self._waiting = 0  # number of pending queries
        self._blocked = False  # whether the guest has sent more than we take now
        self._ended = False  # whether the guest has sent FIN
        self._closing = False  # whether we have, since it asked nothing for too long
        self._last = engine.now
        self.when_read: list[Callable[[], None]] = []  # called once when it is no longer full, or over
        self.timer_at = self.timer_entry = math.inf

    @property
    def is_open(self) -> bool:
        """True as long as an answer can reach the client."""
        return self._connection is not None

    @property
    def unread(self) -> int:
        """Bytes of answers that do not fit into the guest's window."""
        return len(self._out)

    @property
    def is_full(self) -> bool:
        """True if no more of a zone transfer should be read for this client."""
        return len(self._out) >= FULL

    def answer(self, message: bytes, now: float, *, first: bool) -> None:
        """Send a message to the guest.  `first` tells whether it is the first answer to its query."""
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
        """Reset the connection."""
        connection = self._connection
        if connection is not None:
            self._forget()
            connection.abort(self._engine.now)

    def handle_timer(self, now: float) -> None:
        """Close the connection if nothing has crossed for a while; reset it if it has been closed before."""
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
        """Send as much as fits into the guest's window, and then take further queries."""
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

    def closed(self, why: Closed) -> None:
        self._forget()


class ResolverStream(Dialled):
    """A connection to an upstream, which begins with `Dialled.begin`.

    Args:
        engine: The engine that polls the connection.
        failed: Called with the exception of a dial that raises.
        heard: Called with each message; it returns whether the message was an answer.
        ended: Called when the connection is over, and closed, while queries were not answered.

    Attributes:
        unanswered: The queries without an answer by their ids, in order.
        has_answered: Whether any query has been answered.
        is_paused: Whether nothing is read now.
    """

    __slots__ = (
        "_ended", "_events", "_framing", "_heard", "_nonsense", "_out", "_socket", "has_answered",
        "is_paused", "unanswered"
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        failed: Callable[[BaseException], Refused],
        *,
        heard: Callable[[bytes], bool],
        ended: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._failed = failed
        self._pending = None
        self._socket: socket.socket | None = None
        self._framing = Framing()
        self._heard, self._ended = heard, ended
        self._out = bytearray()
        self.unanswered: dict[bytes, bytes] = {}
        self.has_answered = False
        self.is_paused = False
        self._nonsense = 0  # messages since the last answer
        self._events = IN

    def _connected(self, sock: socket.socket) -> None:
        self._socket = sock
        prepare_stream(sock)
        self._events = 0  # those of the dial
        self._watch()

    def _refused(self, why: Refusal | IcmpError) -> None:
        if self.unanswered:
            self._ended()

    def send(self, message: bytes) -> None:
        """Send a query.  If the same query is pending here it is not sent again: a stream loses nothing.

        Raises:
            OSError: The upstream does not read, or there is no connection to it.
        """
        if self._socket is None and self._pending is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if self.unanswered.get(message[:2]) != message:
            if len(self._out) > UNREAD_MAX:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            self.unanswered[message[:2]] = message
            if len(self.unanswered) > UNANSWERED_MAX:
                del self.unanswered[next(iter(self.unanswered))]
            self._out += framed(message)
            self._watch()

    def close(self) -> None:
        """Close the connection.  Calling it again is allowed."""
        self._give_up()
        sock, self._socket = self._socket, None
        if sock is not None:
            if not self.is_paused:
                self._engine.remove(sock.fileno())
            sock.close()

    def pause(self) -> None:
        """Stop reading until `resume`.  Not even the end is noticed then.  Calling it again is allowed."""
        if not self.is_paused and self._socket is not None:
            self.is_paused = True
            self._engine.remove(self._socket.fileno())

    def resume(self) -> None:
        """Read again after `pause`.  Calling it again is allowed."""
        if self.is_paused and self._socket is not None:
            self.is_paused = False
            self._engine.add(self._socket.fileno(), self._on_events, self._events)

    def _watch(self) -> None:
        events = IN | OUT if self._out else IN
        if events != self._events and self._socket is not None:
            self._events = events
            self._engine.modify(self._socket.fileno(), events)

    def _on_events(self, events: int) -> None:
        if events & OUT:
            self._write()
        if events & ~OUT:
            self._read()

    def _write(self) -> None:
        sock = self._socket
        try:
            if sock is not None and self._out:
                del self._out[: sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()  # what the upstream has sent before is still read, and then the end
        self._watch()

    def _read(self) -> None:
        sock = self._socket
        try:
            if sock is not None:
                self._take(sock.recv(READ))
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self.close()
            self._ended()

    def _take(self, data: bytes) -> None:
        """Handle bytes that were received.

        Raises:
            EOFError: The connection has ended, or its peer sends only nonsense.
        """
        if not data:
            raise EOFError
        rest = memoryview(data)
        while rest and self._socket is not None:
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
