"""Forbidden connections: they are accepted here, without a dial, so that a client can be told why they are refused.

    what the client says first        what it is told
    ----------------------------      --------------------------------------------------------
    an HTTP/1 request                 a complete 403 response with the rule, and then FIN
    a TLS ClientHello                 the alert access_denied (RFC 8446 section 6), and then FIN
    something else, or nothing        RST

Nothing of such a connection leaves this process, and it has no descriptor.  A program inside can open many and say
nothing.  So a connection has `SECONDS` for its first bytes, and `LINGER` more to read what it is told, and beyond
`FORBIDDEN_MAX` of them the oldest is reset, as half-open connections are.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

from netns_kit.gateway.engine import Engine
from netns_kit.policy.first_bytes import FirstBytes, Nothing, Seen
from netns_kit.stack import Closed, TcpConnection
from netns_kit.stack.user import PassiveUser

FORBIDDEN_MAX = 256
SECONDS = 10.0  # for the first bytes
LINGER = 5.0  # seconds for the client to end the connection once it has been told
ACCESS_DENIED = bytes((21, 3, 3, 0, 2, 2, 49))  # a record of TLS with one fatal alert
_OVER = FirstBytes()  # which has nothing to read any more
_OVER.feed(b"\0")
_TEXT = """\
The network policy of this sandbox does not allow {what}.
Rule: {rule}

The request has not left the sandbox: it was answered by netns_kit, not by the server. Trying again, or trying another
way, gives the same answer. If you need this connection, ask whoever runs the sandbox to allow it.
"""


class Forbidden:
    """The forbidden connections of one gateway.

    Args:
        engine: The engine of the gateway.
        dropped: Counts those that were reset because there were too many.
    """

    def __init__(self, engine: Engine, dropped: Counter[str]) -> None:
        self._engine = engine
        self._dropped = dropped
        self._streams: dict[ForbiddenStream, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._streams)

    def take(self, connection: TcpConnection, what: str, rule: str, said: bytes = b"") -> None:
        """Take a connection, and tell its client why it is refused.

        Args:
            connection: The connection: its SYN is on hold, or it has been accepted and its user has left it.
            what: The destination, for the text.
            rule: The rule, for the text.
            said: What the client has said already.
        """
        if len(self._streams) >= FORBIDDEN_MAX:
            self._dropped["limit-forbidden"] += 1
            next(iter(self._streams)).abort()
        response = _response(what, rule)
        connection.user = stream = ForbiddenStream(self._engine, connection, response, self._streams)
        now = self._engine.now
        self._engine.timers.arm(stream, now + SECONDS)
        if connection.is_on_hold:
            connection.accept(now)
        else:
            stream.deliver(memoryview(said))
            connection.resume(now)


class ForbiddenStream(PassiveUser):
    """One forbidden connection: a `TcpUser` that takes what the client says, and tells it no."""

    __slots__ = (
        "_connection", "_engine", "_first", "_is_told", "_out", "_response", "_streams", "timer_at", "timer_entry"
    )  # fmt: skip

    def __init__(
        self, engine: Engine, connection: TcpConnection, response: bytes, streams: dict[ForbiddenStream, None]
    ) -> None:
        self._engine = engine
        self._connection: TcpConnection | None = connection
        self._response = response
        self._first = FirstBytes()
        self._out = b""  # what the guest's window has had no room for
        self._is_told = False
        self._streams = streams
        self.timer_at = self.timer_entry = math.inf
        streams[self] = None

    def abort(self) -> None:
        """Reset the connection."""
        connection = self._connection
        if connection is not None:
            self._forget()
            connection.abort(self._engine.now)

    def handle_timer(self, now: float) -> None:
        """Reset a connection that has said nothing, or that does not end."""
        self.abort()

    def _forget(self) -> None:
        self._connection = None
        self._first, self._out = _OVER, b""  # the timers may know this for long
        self._streams.pop(self, None)
        self.timer_at = math.inf

    def _tell(self, found: Seen | Nothing) -> None:
        """Tell the client, in the protocol that it speaks."""
        if self._connection is None:
            return
        if isinstance(found, Nothing):
            self.abort()
        else:
            self._out = self._response if found.kind == "http" else ACCESS_DENIED
            self._engine.timers.arm(self, self._engine.now + LINGER)
            self.writable()

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def deliver(self, data: memoryview) -> int:
        if not self._is_told:
            found = self._first.feed(data)
            if found is not None:
                self._is_told = True
                self._engine.again(partial(self._tell, found))
        return len(data)

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def end(self) -> None:
        if not self._is_told:
            self._is_told = True
            self._engine.again(self.abort)

    def writable(self) -> None:
        connection, now = self._connection, self._engine.now
        while connection is not None and self._out:
            room = connection.room()
            if not room:
                connection.wait_for_room(now)
                return
            connection.send(self._out[:room], now)
            self._out = self._out[room:]
            if not self._out:
                connection.shutdown(now)

    def closed(self, why: Closed) -> None:
        self._forget()


def _response(what: str, rule: str) -> bytes:
    """Return the response to an HTTP/1 request."""
    body = _TEXT.format(what=what, rule=rule).encode()
    fields = (
        "HTTP/1.1 403 Forbidden",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        f"X-Netns-Kit-Rule: {_field(rule)}",
    )
    return "".join(f"{each}\r\n" for each in (*fields, "")).encode() + body


def _field(text: str) -> str:
    """Return a text as the value of a header field (RFC 9110 5.5): printable ASCII, and one line."""
    return "".join(each if " " <= each <= "~" else "?" for each in text)
