"""Served flows: what the engine has of a flow whose other end is a handler in the caller's process.

`netns_kit.gateway.serving` has all of them, and the records that its caller's side is told.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from typing import Literal, Protocol

from netns_kit.frozen import frozen
from netns_kit.stack import Closed, IcmpError, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import Ending
from netns_kit.uplink.dial import Connected
from netns_kit.uplink.flow import Endpoint

from .engine import IN, Engine
from .relay import TcpRelay

KEPT_MOST = 8  # datagrams of a flow that waits for its socket
DATAGRAM = b"\0"  # what stands before a datagram in a record, so that none is empty, as the end is
LONGEST = 65536
DATAGRAMS_PER_STEP = 64

EndingSeen = Literal["finished", "reset", "refused", "unreachable", "timed out", "closed here"]
"""How a flow has ended, for its handler: "finished" means that all that the guest has sent was there before."""


@frozen
class Opened:
    """A flow that waits for its socket; or one that was opened to the guest, and is established."""

    id: int
    """Number of this flow, see `FlowInfo.id`."""
    service: int
    """The number under which it was asked for."""
    transport: Literal["tcp", "udp"]
    """Its transport."""
    guest: Endpoint
    """The guest's end."""
    remote: Endpoint
    """The other end, as the guest sees it."""
    target: Endpoint
    """Where it leads: `remote`, unless whoever was asked about it has sent it elsewhere."""
    name: str | None
    """The name of that, if it is known."""
    within: int = 0
    """Number of the intercepted flow whose way out this is, without a packet; 0: it is a flow of the guest."""


@frozen
class Ended:
    """A flow that has ended, of those that `Opened` has told of; or a connection that the guest has not taken."""

    id: int
    """Number of the flow; 0 if there never was one."""
    service: int
    """The number under which it was asked for."""
    why: EndingSeen
    """How it has ended."""


@frozen
class Question:
    """A query for a name, of a stack whose uplink is in memory."""

    id: int
    """Number of this query, for `Serving.resolved`."""
    message: str
    """The query, in hexadecimal digits."""


@frozen
class Echo:
    """An echo request of a flow of pings, of a stack whose uplink is in memory."""

    id: int
    """Number of the flow."""
    sequence: int
    """The sequence number of the request."""
    target: Endpoint
    """The address where it leads, and the identifier of the flow."""
    guest: Endpoint
    """The guest's address, and the identifier."""


News = Opened | Ended | Question | Echo
"""What the caller's side is told."""


class Waits(Protocol):
    """A flow that the caller's side decides about, or has."""

    service: int

    def join(self, sock: socket.socket) -> None:
        """Go on with the socket that the caller's side has made."""

    def turn_away(self, why: Refusal) -> None:
        """Refuse the flow, which has waited for a socket."""

    def cut(self) -> None:
        """End the flow."""


class Teller(Protocol):
    """What has the flows, and tells the caller's side of them."""

    flows: dict[int, Waits]

    @property
    def engine(self) -> Engine: ...

    @property
    def dropped(self) -> MutableMapping[str, int]: ...

    @property
    def has_room_for_news(self) -> bool: ...

    def next_id(self) -> int: ...

    def opened(self, service: int, flow: TcpConnection | UdpFlow, target: Endpoint | None = None) -> None: ...

    def wait_udp(self, service: int, flow: UdpFlow, target: Endpoint | None = None) -> Refusal | None: ...

    def ended(self, flow: int, service: int, why: EndingSeen) -> None: ...

    def note(self, news: News) -> None: ...


_TOLD: dict[Closed, EndingSeen] = {Closed.TIMED_OUT: "timed out", Closed.UNREACHABLE: "unreachable"}


class DecidedRelay(TcpRelay):
    """A connection that the caller's side decides about."""

    __slots__ = ()

    def join(self, sock: socket.socket) -> None:
        """Go on with the socket that the caller's side has made."""
        self.begin(Connected(sock))

    def turn_away(self, why: Refusal) -> None:
        """Refuse the connection, which has waited for a socket."""
        if self.connection is not None:
            self._refused(why)

    def cut(self) -> None:
        """End the connection."""
        self.abort(ending="ended")


class ServedConnection(DecidedRelay):
    """A connection, and the unix socket whose other end the caller has.

    Args:
        serving: What is told how it ends.
        service: The number under which it was asked for.
        connection: The guest's connection; None: it is opened to the guest.
    """

    __slots__ = ("_heard_all", "_serving", "_to_guest", "flow", "service")

    def __init__(self, serving: Teller, service: int, connection: TcpConnection | None) -> None:
        super().__init__(serving.engine, connection)
        self._serving = serving
        self._heard_all = False
        self._to_guest = connection is None  # and not established yet
        self.service = service
        self.flow = 0 if connection is None else connection.id

    def forget(self) -> None:
        """Close the socket of a connection that could not be opened."""
        self._close()

    def established(self) -> None:
        if self._to_guest and self.connection is not None:
            self._to_guest = False
            self._serving.opened(self.service, self.connection)
        super().established()

    def end(self) -> None:
        self._heard_all = True
        super().end()

    def abort(self, *, reset: bool = False, ending: Ending = "reset by peer") -> None:
        is_news = self.connection is not None
        super().abort(reset=reset, ending=ending)
        if is_news:
            self._told("closed here")

    def closed(self, why: Closed) -> None:
        super().closed(why)
        refused: EndingSeen = "refused" if self._to_guest else "reset"
        self._told(_TOLD.get(why, refused))

    def _refused(self, why: Refusal | IcmpError) -> None:
        super()._refused(why)
        self._told("closed here")

    def _told(self, why: EndingSeen) -> None:
        self._serving.ended(self.flow, self.service, "finished" if self._heard_all else why)


class ServedDatagrams:
    """A UDP flow, and the unix socket whose other end the caller has.  Each record has one datagram.

    Args:
        serving: What is told how it ends.
        service: The number under which it was asked for.
        flow: The flow.
    """

    __slots__ = ("_engine", "_flow", "_kept", "_serving", "_socket", "service")

    def __init__(self, serving: Teller, service: int, flow: UdpFlow) -> None:
        self._serving = serving
        self._engine = serving.engine
        self._flow = flow
        self._kept: list[bytes] = []
        self._socket: socket.socket | None = None
        self.service = service

    @property
    def waits(self) -> bool:
        """Whether it has no socket yet."""
        return self._socket is None

    def join(self, sock: socket.socket) -> None:
        try:
            self._engine.add(sock.fileno(), self._on_events, IN)
        except OSError:
            sock.close()
            self._flow.close()
            return
        self._socket = sock
        for payload in self._kept:
            self._pass_on(payload)
        self._kept.clear()

    def turn_away(self, why: Refusal) -> None:
        flow, kept = self._flow, self._kept
        flow.turn_away(why)
        if kept:
            flow.refuse(why, kept[0])

    def cut(self) -> None:
        self._flow.end()

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        size = segment_size or max(len(payload), 1)
        for start in range(0, max(len(payload), 1), size):
            self._pass_on(payload[start : start + size])

    def _pass_on(self, payload: bytes | memoryview) -> None:
        """Pass a datagram on; what the other end has no room for is lost, as on any way."""
        sock = self._socket
        if sock is None:
            if len(self._kept) < KEPT_MOST:
                self._kept.append(bytes(payload))
                return
        else:
            try:
                sock.sendmsg((DATAGRAM, payload), (), socket.MSG_NOSIGNAL)
                return
            except OSError:  # that the other end has gone, an event tells
                pass
        self._serving.dropped["limit-served-datagrams"] += 1

    def _on_events(self, _: int) -> None:
        flow = self._flow
        for _ in range(DATAGRAMS_PER_STEP):
            sock = self._socket
            if sock is None:
                return
            try:
                record = sock.recv(LONGEST)
            except BlockingIOError:
                return
            except OSError:
                record = b""
            if not record:
                flow.end()
                return
            flow.send(memoryview(record)[len(DATAGRAM) :], self._engine.now)

    def expired(self, flow: UdpFlow) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._engine.remove(sock.fileno())
            sock.close()
        self._serving.ended(flow.id, self.service, "finished")
