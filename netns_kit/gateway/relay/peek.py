"""PeekingRelay: a `TcpRelay` that looks at the client's first bytes before the server gets them.

A rule that looks (sni, host) lets a connection pass only if its first bytes ask for a name of the rule.  The host's
side is dialled first, and looked at is what the guest then sends:

    dial --> accept the guest --> look --+--> it may pass: the bytes go on, and a plain TcpRelay has the connection
                                         +--> it may not: both sides are reset, or the guest is told why

The other order, to look before dialling, would tell the server nothing about a refused connection.  But then the
guest's connection would be established before the host's is.  Where nobody listens, connecting would succeed, and a
program that tries several addresses in turn (RFC 8305) would stop at one that does not answer.  This stack promises
that the guest's SYN is answered only when the dial is decided.  And the address is one that the policy allows for a
name: the server may learn that somebody has connected.

While it looks, the relay takes the guest's bytes, at most `FIRST_BYTES_MAX`, and they are acknowledged.  Without
that, a ClientHello in two writes would never be whole: a kernel holds the rest of a short message back until the
beginning is acknowledged (Nagle's algorithm).  They count as memory of the stack's connections, and when that is full
no more are taken.  An urgent byte is not taken, and nothing behind it.  What the server says waits in the host's
socket: the events of that are noted, and handed to the plain relay.  After `SECONDS` the look is over.

When the connection may pass, the bytes are sent, and then the plain relay takes the relay's place.  From then on
nothing here is called any more.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable

from netns_kit.gateway.enforcer import Look
from netns_kit.gateway.engine import IN, Engine
from netns_kit.policy.first_bytes import FIRST_BYTES_MAX, FirstBytes, Seen
from netns_kit.stack import TcpConnection
from netns_kit.uplink.dial import Refused

from .tcp import BROKEN, CLOSED, IDLE, TcpRelay

SECONDS = 30.0  # for the first bytes
COPIES = 3  # of a first byte at most: here, and two in `FirstBytes`

Judge = Callable[["PeekingRelay", Look], None]
"""Called once with what was seen.  It calls `pass_on`, `leave` or `abort`."""
NOTHING = Look()
_OVER = FirstBytes()  # which has nothing to read any more
_OVER.feed(b"\0")


class PeekingRelay(TcpRelay):
    """A connection of the guest whose first bytes decide about it.

    Args:
        engine: The engine.
        connection: The connection, whose SYN is on hold.
        failed: As for `TcpRelay`.
        judge: Called when the first bytes are known.
        waits: Whether a server that speaks first is kept waiting.  False: the connection is judged then.
    """

    __slots__ = (
        "_ended", "_events", "_first", "_found", "_held", "_judge", "_memory", "_plain", "_taken", "_waits",
        "timer_at", "timer_entry"
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        connection: TcpConnection,
        failed: Callable[[BaseException], Refused],
        judge: Judge,
        *,
        waits: bool = True,
    ) -> None:
        super().__init__(engine, connection, failed)
        self._judge = judge
        self._waits = waits
        self._first = FirstBytes()
        self._found: Look | None = None
        self._held = b""  # the first bytes
        self._taken = 0  # their number, which counts as memory
        self._memory = connection.rcv.memory
        # the relay that takes the place of this one, when all of them are sent
        self._plain: TcpRelay | None = None
        self._events = 0  # what the engine has told of the host's socket
        self._ended = False  # whether the guest has sent FIN
        self.timer_at = self.timer_entry = math.inf

    # -- the look -----------------------------------------------------------------------------------

    def _find(self, found: Look) -> None:
        """Have the connection judged, in the next step: the stack is handling a segment of it now."""
        if self._found is None:
            self._found = found
            self._engine.again(self._have_judged)

    def _have_judged(self) -> None:
        if self.connection is not None and self._found is not None:
            self.timer_at = math.inf
            self._judge(self, self._found)

    def handle_timer(self, now: float) -> None:
        """End the look."""
        self._find(NOTHING)

    # -- the judgement ------------------------------------------------------------------------------

    def pass_on(self) -> None:
        """Send the first bytes, and let a plain relay take this one's place."""
        self._plain = plain = self._made_plain()
        plain._socket = plain._sink = self._socket
        plain.state = IDLE
        self._send()

    def _made_plain(self) -> TcpRelay:
        """Return the relay that takes the place of this one."""
        return TcpRelay(self._engine, self.connection)

    def _send(self) -> None:
        """Send what the host's socket takes of the first bytes, and leave to the plain relay when it has all."""
        plain, connection, sock = self._plain, self.connection, self._socket
        assert plain is not None
        assert connection is not None
        assert sock is not None
        if self._held:
            self._held = self._held[plain.deliver(memoryview(self._held)) :]
        if plain.connection is None:  # sending has failed, and there is nothing to be read
            self._leave()
        elif not self._held or plain.state is BROKEN:
            self._leave()
            self._engine.replace(sock.fileno(), plain._on_events)
            connection.user = plain
            if self._ended:
                plain.end()
            connection.resume(self._engine.now)
            if plain.connection is not None:
                plain._on_events(self._events)

    def leave(self) -> tuple[TcpConnection, bytes]:
        """Reset the server, and return the connection, whose user is to be another, with the first bytes."""
        connection, held = self.connection, self._held
        assert connection is not None
        self.connection = None
        self._close(reset=True)
        return connection, held

    def _leave(self) -> None:
        self.connection = self._socket = self._sink = None
        self.state = CLOSED
        self._forget()

    def _close(self, *, reset: bool = False) -> None:
        self.timer_at = math.inf
        self._forget()
        super()._close(reset=reset)

    def _forget(self) -> None:
        """Let the first bytes go: the timers may know this relay for long."""
        self._memory.held -= COPIES * self._taken
        self._taken, self._held, self._first = 0, b"", _OVER

    # -- the host's side ----------------------------------------------------------------------------

    def _connected(self, sock: socket.socket) -> None:
        super()._connected(sock)
        self._engine.timers.arm(self, self._engine.now + SECONDS)

    def _on_events(self, events: int) -> None:
        self._events |= events
        if self._plain is not None and self.connection is not None:
            self._send()
        elif events & IN and not self._waits:
            self._find(NOTHING)

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def established(self) -> None:
        """Do nothing: what the server says waits."""

    def deliver(self, data: memoryview) -> int:
        if self._memory.full:
            return 0
        taken = data[: FIRST_BYTES_MAX - len(self._held)]
        self._held += taken
        self._taken += len(taken)
        self._memory.held += COPIES * len(taken)
        found = self._first.feed(taken)
        if found is not None:
            self._find(Look(found.kind, found.names) if isinstance(found, Seen) else NOTHING)
        return len(taken)

    def urgent(self, data: memoryview) -> int:
        return 0

    def end(self) -> None:
        self._ended = True
        self._find(NOTHING)

    def writable(self) -> None:
        """Do nothing: nothing is sent to the guest."""
