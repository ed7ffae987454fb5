"""Serving: flows of the guest that end in the caller's process, at a handler there.

    the guest opens a flow --claimed--> waits --Opened--> the caller's event loop: a socket pair
                                          |                    |
          a relay with its other end <----+----- accept -------+      the handler has the near end

The two ends are joined by a pair of unix sockets, which the caller's side makes: a worker may make none.  So what is
sent waits in the kernel, and the halves are closed there, in the same way with every driver.  A connection's SYN is
on hold until the socket has come.  Of UDP the first `KEPT_MOST` datagrams are kept until then.

A unix socket cannot tell a reset from an end.  So the caller's side is told how each flow has ended (`Ended`).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from netns_kit.arguments import Address
from netns_kit.errors import AddressError
from netns_kit.frozen import frozen
from netns_kit.operations import chained, operation, same
from netns_kit.stack import Closed, IcmpError, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import Ending
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.uplink.dial import Connected
from netns_kit.uplink.flow import Endpoint, Target

from .endpoints import TcpHandler, UdpHandler
from .engine import IN
from .flow_router import EPHEMERAL, NO_DESCRIPTORS, endpoints_of
from .gateway import Gateway
from .relay import TcpRelay

WAITING_MOST = 256  # UDP flows that wait for their socket
KEPT_MOST = 8  # datagrams of each of these
DATAGRAM = b"\0"  # what stands before a datagram in a record, so that none is empty, as the end is
LONGEST = 65536
DATAGRAMS_PER_STEP = 64

EndingSeen = Literal["finished", "reset", "refused", "timed out", "closed here"]
"""How a flow has ended, for its handler: "finished" means that all that the guest has sent was there before."""


@frozen
class Opened:
    """A flow that waits for its socket; or one that was opened to the guest, and is established."""

    id: int
    """Number of this flow, see `FlowInfo.id`."""
    service: int
    """The number under which it was asked for."""
    guest: Endpoint
    """The guest's end."""
    remote: Endpoint
    """The other end, as the guest sees it."""
    name: str | None
    """The name of that, if it is known."""


@frozen
class Ended:
    """A flow that has ended, of those that `Opened` has told of; or a connection that the guest has not taken."""

    id: int
    """Number of the flow; 0 if there never was one."""
    service: int
    """The number under which it was asked for."""
    why: EndingSeen
    """How it has ended."""


class Serving:
    """The flows of one stack that handlers of the caller's have.

    Args:
        gateway: The gateway of the stack.
        tell: Called with the number of the subscriber, when there is something to `take`.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self.gateway = gateway
        self._tell = tell
        self._subscriber: int | None = None
        self._services: dict[int, tuple[Literal["tcp", "udp"], bytes, int]] = {}
        self._flows: dict[int, ServedConnection | ServedDatagrams] = {}
        self._news: list[Opened | Ended] = []
        self._port = EPHEMERAL[int.from_bytes(os.urandom(2), "big") % len(EPHEMERAL)]

    # -- what the caller's side asks ------------------------------------------------------------------

    @operation(same)
    def listen(self, number: int) -> None:
        """Tell the subscriber `number` whenever there is something to `take`."""
        self._subscriber = number

    @operation(same)
    def serve(
        self, service: int, transport: Literal["tcp", "udp"], address: Address | None, port: int
    ) -> None:
        """Claim the flows to an address and port from now on.

        Args:
            service: The number under which they are told of.
            transport: The transport.
            address: The address; None: any.
            port: The port.

        Raises:
            AddressError: The guest sends nothing to that address.
            PortInUseError: The address and port are served already.
        """
        gateway = self.gateway
        if address is not None:
            local = gateway.subnet.of(address)
            if local is None or address == local.guest or address.is_multicast or address.is_unspecified:
                fix = "turn IPv6 on: ipv6=True" if local is None else "choose an address of the gateway's"
                expected = "expected an address that the namespace sends packets to"
                raise AddressError(expected, "address", str(address), fix)
        packed = b"" if address is None else address.packed
        opened: TcpHandler | UdpHandler = (
            partial(self._tcp_opened, service) if transport == "tcp" else partial(self._udp_opened, service)
        )
        gateway.endpoints.add(transport, packed, port, opened)
        self._services[service] = transport, packed, port
        gateway.stack.link.served = gateway.endpoints.addresses()

    @operation(same)
    def stop(self, service: int) -> None:
        """Claim no more flows, and end those that there are: connections are reset."""
        if service in self._services:
            self.gateway.endpoints.discard(*self._services.pop(service))
            self.gateway.stack.link.served = self.gateway.endpoints.addresses()
        for flow in [each for each in self._flows.values() if each.service == service]:
            flow.cut()

    @operation(chained)
    def take(self) -> tuple[Opened | Ended, ...]:
        """Return what has happened since the last call, in its order."""
        taken = tuple(self._news)
        self._news.clear()
        return taken

    @operation()
    def accept(self, number: int, *, fds: Sequence[int]) -> bool:
        """Carry a flow that waits over a socket.  Return whether it was still there.

        Raises:
            OSError: The socket has not come.
        """
        sock = _come(fds)
        flow = self._flows.get(number)
        if flow is None:
            sock.close()
            return False
        flow.join(sock)
        return True

    @operation()
    def connect(
        self,
        service: int,
        address: Address,
        port: int,
        source: Address | None,
        *,
        fds: Sequence[int],
    ) -> int:
        """Open a connection to the guest, and return its number.  `Opened` follows, or `Ended`.

        Args:
            service: The number under which it is told of.
            address: The address of the guest.
            port: The port of the guest.
            source: The address that the guest sees as the client's; None: the gateway's.
            fds: The socket that the connection is carried over.

        Raises:
            AddressError: A guest cannot have the address.
            OSError: There is no room for the connection.
        """
        sock = _come(fds)
        gateway = self.gateway
        router, stack = gateway.router, gateway.stack
        local = gateway.subnet.of(address)
        is_no_host = address.is_multicast or address.is_unspecified or address.packed in stack.addresses
        if local is None or is_no_host:
            sock.close()
            raise AddressError("expected an address that the namespace can have", "address", str(address))
        client = local.gateway if source is None else source
        if not router.make_room():
            sock.close()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        relay = ServedConnection(self, service, None)
        names = FlowKey(address.packed, client.packed, port, 0)
        try:
            key = self._free_key(names)
            relay.run(sock)
            relay.connection = connection = stack.connect_tcp(key, relay, gateway.engine.now)
        except (KeyError, OSError) as error:
            relay.forget()
            sock.close()
            number = errno.EADDRNOTAVAIL if isinstance(error, KeyError) else error.errno or errno.EIO
            raise OSError(number, os.strerror(number)) from None
        relay.flow = connection.id
        self._flows[connection.id] = relay
        return connection.id

    def _free_key(self, names: FlowKey) -> bytes:
        """Return the key of a flow with the client's next port.

        Raises:
            KeyError: There is no port left.
        """
        stack = self.gateway.stack
        for _ in EPHEMERAL:
            self._port = EPHEMERAL[(self._port + 1 - EPHEMERAL[0]) % len(EPHEMERAL)]
            key = names._replace(remote_port=self._port).pack()
            if key not in stack.tcp and stack.steering.owner(key) == stack.steering.index:
                return key
        raise KeyError(names)

    # -- flows of the guest ---------------------------------------------------------------------------

    def _tcp_opened(self, service: int, connection: TcpConnection, _: Target) -> None:
        if not self._has_room(connection.key):
            connection.refuse(Refusal.NET_UNREACHABLE)
            return
        connection.user = relay = ServedConnection(self, service, connection)
        self._flows[connection.id] = relay
        self.opened(service, connection)

    def _udp_opened(self, service: int, flow: UdpFlow, _: Target) -> Refusal | None:
        waiting = sum(isinstance(each, ServedDatagrams) and each.waits for each in self._flows.values())
        if waiting >= WAITING_MOST or not self._has_room(flow.key):
            return Refusal.NET_UNREACHABLE
        flow.user = self._flows[flow.id] = ServedDatagrams(self, service, flow)
        self.opened(service, flow)
        return None

    def _has_room(self, key: bytes) -> bool:
        router = self.gateway.router
        if router.make_room(key):
            return True
        router.notice(NO_DESCRIPTORS)
        router.refused += 1
        return False

    # -- what is told ---------------------------------------------------------------------------------

    def opened(self, service: int, flow: TcpConnection | UdpFlow) -> None:
        """Tell of a flow."""
        guest, remote = endpoints_of(flow.key)
        self._note(Opened(flow.id, service, guest, remote, self.gateway.name_of(remote.address)))

    def ended(self, flow: int, service: int, why: EndingSeen) -> None:
        """Forget a flow, and tell how it has ended."""
        self._flows.pop(flow, None)
        self._note(Ended(flow, service, why))

    def _note(self, news: Opened | Ended) -> None:
        self._news.append(news)
        if len(self._news) == 1 and self._subscriber is not None:
            self._tell(self._subscriber)

    def close(self) -> None:
        """Tell nobody any more, since the engine is being closed."""
        self._subscriber = None


class ServedConnection(TcpRelay):
    """A connection, and the unix socket whose other end the caller has.

    Args:
        serving: What is told how it ends.
        service: The number under which it was asked for.
        connection: The guest's connection; None: it is opened to the guest.
    """

    __slots__ = ("_heard_all", "_serving", "_to_guest", "flow", "service")

    def __init__(self, serving: Serving, service: int, connection: TcpConnection | None) -> None:
        super().__init__(serving.gateway.engine, connection)
        self._serving = serving
        self._heard_all = False
        self._to_guest = connection is None  # and not established yet
        self.service = service
        self.flow = 0 if connection is None else connection.id

    def join(self, sock: socket.socket) -> None:
        """Go on with the socket that the caller's side has made."""
        self.begin(Connected(sock))

    def cut(self) -> None:
        """Reset the connection."""
        self.abort(ending="ended")

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
        self._told("timed out" if why is Closed.TIMED_OUT else refused)

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

    def __init__(self, serving: Serving, service: int, flow: UdpFlow) -> None:
        self._serving = serving
        self._engine = serving.gateway.engine
        self._flow = flow
        self._kept: list[bytes] = []
        self._socket: socket.socket | None = None
        self.service = service

    @property
    def waits(self) -> bool:
        """Whether it has no socket yet."""
        return self._socket is None

    def join(self, sock: socket.socket) -> None:
        """Go on with the socket that the caller's side has made."""
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

    def cut(self) -> None:
        """End the flow."""
        self._flow.ending = "ended"
        self._flow.close()

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
        self._serving.gateway.stack.dropped["limit-served-datagrams"] += 1

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
                flow.ending = "ended"
                flow.close()
                return
            flow.send(memoryview(record)[len(DATAGRAM) :], self._engine.now)

    def expired(self, flow: UdpFlow) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._engine.remove(sock.fileno())
            sock.close()
        self._serving.ended(flow.id, self.service, "finished")


def _come(fds: Sequence[int]) -> socket.socket:
    """Return a socket that has come.

    Raises:
        OSError: It has not: too many descriptors were on their way.
    """
    if not fds:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    sock = socket.socket(fileno=fds[0])
    sock.setblocking(False)
    return sock
