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
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

from netns_kit.arguments import Address
from netns_kit.errors import AddressError
from netns_kit.operations import chained, operation, same
from netns_kit.stack import Refusal, TcpConnection, UdpFlow
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.uplink.flow import Endpoint, Target

from .endpoints import TcpHandler, UdpHandler
from .engine import Engine
from .flow_router import EPHEMERAL, endpoints_of
from .gateway import Gateway
from .served import Ended, EndingSeen, News, Opened, ServedConnection, ServedDatagrams, Teller, Waits

WAITING_MOST = 256  # UDP flows that wait for their socket
NEWS_MOST = 4096  # things untold; beyond that queries and pings are lost


class Carrier(Protocol):
    """A router whose flows, queries and pings the caller's side has."""

    def carry(self, serving: Teller, service: int) -> None: ...

    def resolved(self, number: int, message: bytes) -> None: ...

    def echoed(self, number: int, sequence: int, why: Refusal | None) -> None: ...


class Rules(Protocol):
    """What is intercepted: see `Interception`."""

    def add(self, service: int, text: str) -> None: ...

    def discard(self, service: int) -> None: ...


class Serving:
    """The flows of one stack that handlers of the caller's have.

    Args:
        gateway: The gateway of the stack.
        tell: Called with the number of the subscriber, when there is something to `take`.
        intercepting: Makes what intercepts flows, when there is a first rule.
    """

    def __init__(
        self, gateway: Gateway, tell: Callable[[int], None], intercepting: Callable[[Serving], Rules]
    ) -> None:
        self.gateway = gateway
        self._tell = tell
        self._subscriber: int | None = None
        self._services: dict[int, tuple[Literal["tcp", "udp"], bytes, int]] = {}
        self._intercepting = intercepting
        self._interception: Rules | None = None  # few have one
        self._intercepted: set[int] = set()
        self.flows: dict[int, Waits] = {}
        self._news: dict[int, News] = {}  # what is untold, by numbers that increase
        self._noted = 0
        # the number of what is untold of the beginning of a flow, by its id
        self._untold: dict[int, int] = {}
        self._carrier: Carrier | None = None
        self.world = 0  # the number under which what it carries is told of; 0: there is none
        self._port = EPHEMERAL[int.from_bytes(os.urandom(2), "big") % len(EPHEMERAL)]

    @property
    def engine(self) -> Engine:
        """The engine of the gateway."""
        return self.gateway.engine

    @property
    def dropped(self) -> MutableMapping[str, int]:
        """The counters of what is dropped."""
        return self.gateway.stack.dropped

    def next_id(self) -> int:
        """Return a number that no flow has."""
        return self.gateway.next_flow_id()

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
    def intercept(self, service: int, text: str) -> None:
        """Claim the flows that a rule is about from now on, if uplink and policy let them pass.

        Args:
            service: The number under which they are told of.
            text: The rule, see `Interception.add`.
        """
        if self._interception is None:
            self._interception = self._intercepting(self)
        self._interception.add(service, text)
        self._intercepted.add(service)

    @operation(same)
    def stop(self, service: int) -> None:
        """Claim no more flows, and end those that there are: connections are reset."""
        if service in self._services:
            self.gateway.endpoints.discard(*self._services.pop(service))
            self.gateway.stack.link.served = self.gateway.endpoints.addresses()
        if service in self._intercepted and self._interception is not None:
            self._intercepted.discard(service)
            self._interception.discard(service)
        for flow in [each for each in self.flows.values() if each.service == service]:
            flow.cut()

    @operation(same)
    def carry(self, service: int) -> None:
        """Tell of the flows and queries that an uplink in memory has, from now on.

        Args:
            service: The number under which they are told of.
        """
        self._carrier = cast("Carrier", self.gateway.router)  # the uplink is in memory
        self._carrier.carry(self, service)
        self.world = service

    @operation()
    def refuse(self, number: int, why: Refusal) -> None:
        """Refuse a flow that waits, if it is still there."""
        flow = self.flows.get(number)
        if flow is not None:
            flow.turn_away(why)

    @operation()
    def resolved(self, number: int, message: str) -> None:
        """Take the answer to a `Question`, in hexadecimal digits."""
        if self._carrier is not None:
            self._carrier.resolved(number, bytes.fromhex(message))

    @operation()
    def echoed(self, number: int, sequence: int, why: Refusal | None) -> None:
        """Answer an `Echo`: by a reply, or as it is refused."""
        if self._carrier is not None:
            self._carrier.echoed(number, sequence, why)

    @operation(chained)
    def take(self) -> tuple[News, ...]:
        """Return what has happened since the last call, in its order."""
        taken = tuple(self._news.values())
        self._news.clear()
        self._untold.clear()
        return taken

    @operation()
    def accept(self, number: int, *, fds: Sequence[int]) -> bool:
        """Carry a flow that waits over a socket.  Return whether it was still there.

        Raises:
            OSError: The socket has not come.
        """
        sock = _come(fds)
        flow = self.flows.get(number)
        if flow is None:
            sock.close()
            return False
        flow.join(sock)
        return True

    @operation()
    def dial(self, number: int, address: Address | None, port: int | None, *, fds: Sequence[int]) -> bool:
        """Dial the way out of an intercepted flow, and return whether it was still there.

        What comes of it is sent to the caller's side: see `UpstreamDial`.

        Args:
            number: The flow.
            address: Another address to reach; None: the flow's.
            port: Another port to reach; None: the flow's.
            fds: The socket that the answer is sent to; and for a UDP flow both ends of a pair of unix sockets, which
                a worker could not make.
        """
        reply, flow = _come(fds), self._intercepted_flow(number)
        pair = [_come((fd,)) for fd in fds[1:]]
        if flow is None:
            for each in (reply, *pair):
                each.close()
            return False
        flow.dial(address, port, reply, *((pair,) if pair else ()))
        return True

    @operation()
    def release(self, number: int, *, fds: Sequence[int]) -> bool:
        """Have an intercepted flow carried as any other, and return whether it was still there.

        Args:
            number: The flow: a connection whose SYN is on hold, or a UDP flow.
            fds: Of a UDP flow, the caller's end of its pair.
        """
        rest = _come(fds) if fds else None
        flow = self._intercepted_flow(number)
        if flow is None:
            if rest is not None:
                rest.close()
            return False
        flow.release(*(() if rest is None else (rest,)))
        return True

    @operation()
    def hold(self, number: int, *, fds: Sequence[int]) -> str:
        """Take nothing more from the guest of an intercepted connection: see `InterceptedConnection.hold`."""
        flow: Any = self._intercepted_flow(number)
        return "gone" if flow is None else str(flow.hold())

    @operation()
    def go_on(self, number: int, way: int, *, fds: Sequence[int]) -> bool:
        """Carry an intercepted connection that is held by a socket, and return whether it was still there.

        Args:
            number: The flow.
            way: The number of its way out, if that ends in the caller's process; 0: it does not.
            fds: The socket.
        """
        sock = _come(fds)
        flow: Any = self._intercepted_flow(number)
        if flow is None:
            sock.close()
            return False
        return bool(flow.go_on(sock, way))

    @operation()
    def turn_back(self, number: int, *, fds: Sequence[int]) -> None:
        """End an intercepted flow as its way out was refused."""
        flow = self._intercepted_flow(number)
        if flow is not None:
            flow.turn_back()

    def _intercepted_flow(self, number: int) -> Any:
        flow = self.flows.get(number)
        return flow if flow is not None and flow.service in self._intercepted else None

    @operation()
    def connect(
        self, service: int, address: Address, port: int, source: Address | None, *, fds: Sequence[int]
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
        self.flows[connection.id] = relay
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
        self.flows[connection.id] = relay
        self.opened(service, connection)

    def _udp_opened(self, service: int, flow: UdpFlow, _: Target) -> Refusal | None:
        if not self._has_room(flow.key):
            return Refusal.NET_UNREACHABLE
        return self.wait_udp(service, flow)

    def wait_udp(self, service: int, flow: UdpFlow, target: Endpoint | None = None) -> Refusal | None:
        """Tell of a UDP flow, which waits for its socket; or return how it is refused."""
        if not self.has_room_for_datagrams():
            return Refusal.NET_UNREACHABLE
        flow.user = self.flows[flow.id] = ServedDatagrams(self, service, flow)
        self.opened(service, flow, target)
        return None

    def has_room_for_datagrams(self) -> bool:
        """Return whether one more UDP flow may wait for its socket."""
        waiting = sum(isinstance(each, ServedDatagrams) and each.waits for each in self.flows.values())
        return waiting < WAITING_MOST

    def _has_room(self, key: bytes) -> bool:
        has_room = self.gateway.router.make_room(key)
        self.gateway.router.refused += not has_room
        return has_room

    # -- what is told ---------------------------------------------------------------------------------

    def opened(
        self,
        service: int,
        flow: TcpConnection | UdpFlow,
        target: Endpoint | None = None,
        name: str | None = None,
    ) -> None:
        """Tell of a flow, where it leads if that is not what the guest has dialled, and its name if it is known."""
        guest, remote = endpoints_of(flow.key)
        name = name or self.gateway.name_of(remote.address)
        transport: Literal["tcp", "udp"] = "tcp" if isinstance(flow, TcpConnection) else "udp"
        self.note(Opened(flow.id, service, transport, guest, remote, target or remote, name))
        if isinstance(flow, UdpFlow) or flow.is_on_hold:  # else the caller's side has asked for it
            self._untold[flow.id] = self._noted

    def ended(self, flow: int, service: int, why: EndingSeen) -> None:
        """Forget a flow, and tell how it has ended; if its beginning is untold yet, nobody has to hear of it."""
        self.flows.pop(flow, None)
        untold = self._untold.pop(flow, None)
        if untold is None:
            self.note(Ended(flow, service, why))
        else:
            del self._news[untold]

    @property
    def has_room_for_news(self) -> bool:
        """Whether one more query or ping may wait to be told of."""
        return len(self._news) < NEWS_MOST

    def note(self, news: News) -> None:
        """Keep something to be taken, and tell the subscriber."""
        self._noted += 1
        self._news[self._noted] = news
        if len(self._news) == 1 and self._subscriber is not None:
            self._tell(self._subscriber)

    def close(self) -> None:
        """Tell nobody any more, since the engine is being closed."""
        self._subscriber = None


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
