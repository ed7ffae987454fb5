"""Listeners: ports of the host, accepting on the engine's side, and leading through the stack.

A `Listener` accepts on the host.  One of mode "stack" connects to the guest through the stack, with the client's
address, so the server inside sees who is there.  A client whose address would mean something else inside comes from
the gateway's address instead: one on the host's loopback, one of the other family, one of IPv6 that is of a link
only.  Those of other modes are in `socket_listeners`.

A published UDP port is a full cone (RFC 4787 4.1, 5): anybody's datagrams come in, and what the guest sends from the
port that it leads to leaves by it, asked or not, wherever it goes: the peers of a server know it by that port.
"""

from __future__ import annotations

import errno
import math
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from netns_kit.arguments import Address
from netns_kit.errors import AddressError, PortInUseError
from netns_kit.frozen import replace
from netns_kit.gateway.engine import IN, Engine, ReadBudget
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.relay import UdpRelay
from netns_kit.host.abi import IP_PKTINFO
from netns_kit.host.undo import on_error
from netns_kit.stack import UdpFlow
from netns_kit.stack.wire import family as addresses
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.stack.wire.ip import is_link_local
from netns_kit.uplink.flow import Endpoint, Way
from netns_kit.uplink.sockets import RESET_ON_CLOSE, Ancillary, family_of, prepare_stream

from .binding import client_address, listen
from .homes import Home
from .ports import PortForward, UnixSocket

ACCEPTS_PER_STEP = 64
ACCEPTS_AT_LEAST = 32  # of a burst, also in a step that is late
SOURCES_KEPT = 64  # addresses of clients, as the guest sees them
PAUSE = 1.0  # seconds without accepting when the process is out of descriptors or memory
OVERLOADED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
PKTINFO = {  # answers leave from the address that was asked (ip(7), IP_PKTINFO; linux/in6.h)
    int(socket.AF_INET): (socket.IPPROTO_IP, IP_PKTINFO),
    int(socket.AF_INET6): (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}
PKTINFO_MESSAGES = frozenset({(socket.IPPROTO_IP, IP_PKTINFO), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)})


Client = TypeVar("Client")


class Accepted(Generic[Client]):
    """The clients who have been accepted and wait until there is time for them.

    Of many at once all are accepted first.  That takes a tenth of the time of leading them on, and the kernel has
    room for few of them (net.core.somaxconn): it drops the SYNs of the others, who try again a second later.

    Args:
        engine: Tells what time there is.
        lead_on: Leads a client to the guest; called with what stands for it, and its socket.

    Attributes:
        clients: Who waits, the first first.
    """

    def __init__(self, engine: Engine, lead_on: Callable[[Client, socket.socket], object]) -> None:
        self._engine = engine
        self._lead_on = lead_on
        self.clients: deque[tuple[Client, socket.socket]] = deque()
        self._goes_on = False  # in the next step

    def lead_on(self) -> None:
        """Lead them on, in their order; those for whom this step has no time in the next one."""
        clients = self.clients
        while clients:
            self._lead_on(*clients.popleft())
            if clients and self._engine.is_late:
                if not self._goes_on:
                    self._goes_on = True
                    self._engine.unregistered.append(self._descriptors)
                    self._engine.again(self._go_on)
                return

    def _go_on(self) -> None:
        self._goes_on = False
        self._engine.unregistered.remove(self._descriptors)
        self.lead_on()

    def _descriptors(self) -> list[int]:
        return [fd for _, sock in self.clients if (fd := sock.fileno()) >= 0]


class Listener:
    """One host port that listens.  It is made and used on the engine's thread."""

    def __init__(
        self,
        gateway: Gateway,
        forward: PortForward,
        made: socket.socket | None = None,
        home: Home | None = None,
    ) -> None:
        """Listen as `forward` says, or by the socket that was `made` so, of which others may have copies.

        It leads to `home`, by default the stack's own namespace.

        Raises:
            PortInUseError: Another socket has the port.
            AddressError: The address is none of the host's, or none that the namespace may have.
            OSError: As the host's kernel says; nothing is left bound then.
        """
        self._gateway = gateway
        self._engine = gateway.engine
        self._home: Home = home or gateway
        self._check(forward)
        self._socket = made or self._listen(forward)
        self._is_shared = made is not None
        if not isinstance(forward.host, UnixSocket):
            forward = replace(forward, host_port=self._socket.getsockname()[1])
        self.forward = forward
        with on_error(self._socket.close):
            self._begin()

    def _begin(self) -> None:
        """Begin to watch the socket, which is closed if this raises."""

    def close(self) -> None:
        """Stop listening: the port is free when this returns."""
        raise NotImplementedError

    @property
    def target(self) -> tuple[Address, int] | None:
        """Where it leads, if it has no socket and others connect to there."""
        return None

    def _check(self, forward: PortForward) -> None:
        """Raise `AddressError` for what this listener cannot lead to."""

    def _listen(self, forward: PortForward) -> socket.socket:
        return listen(forward)


class ThroughStack(Listener):
    """A host port that leads through the stack."""

    def _check(self, forward: PortForward) -> None:
        subnet, guest, host = self._gateway.subnet, forward.guest, forward.host
        assert not isinstance(guest, UnixSocket)
        assert not isinstance(host, UnixSocket)
        local = subnet.of(host) or subnet if guest is None else subnet.of(guest)
        if local is None:
            expected = "expected an address of the namespace, which has no IPv6"
            raise AddressError(expected, "port", str(forward), "forward to its IPv4 address, or turn IPv6 on")
        own = self._gateway.stack.addresses
        if guest is not None and (not _is_host(guest.packed) or guest.packed in own):
            fix = "use mode=socket, which reaches the loopback inside" if guest.is_loopback else None
            raise AddressError("expected an address that the namespace can have", "port", str(forward), fix)
        self._local, self._to = local, guest
        self._sources: dict[str, bytes] = {}

    def _guest(self) -> Address:
        """Return the address inside that the port leads to."""
        return self._to or self._home.guest(self._local)

    def _key(self, address: str, port: int) -> bytes:
        """Return the key of the flow, on the guest's side, of a client with that address and port."""
        source = self._sources.get(address)
        if source is None:
            if len(self._sources) >= SOURCES_KEPT:
                self._sources.clear()
            source = self._sources[address] = self._source(address)
        return FlowKey(self._guest().packed, source, self.forward.guest_port, port).pack()

    def _source(self, address: str) -> bytes:
        """Return what the guest sees as the address of a client."""
        local, client = self._local, client_address(address)
        if (
            client.version == local.gateway.version
            and not client.is_loopback
            and not is_link_local(client.packed)
            and client not in local.network
        ):
            return client.packed
        return local.gateway.packed


class StreamListener(Listener):
    """A TCP port, or a unix socket.  When it is closed, the connections that it has made go on."""

    def _begin(self) -> None:
        self.timer_at = self.timer_entry = math.inf
        self._budget = ReadBudget(self._engine)
        self._goes_on = False  # in the next step, before other events
        self._engine.add(self._socket.fileno(), self._on_events, IN)

    def close(self) -> None:
        self.timer_at = math.inf
        self._engine.remove(self._socket.fileno())
        if not self._is_shared:
            with suppress(OSError):  # the port is free now, whatever fork of this process has a copy
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _on_events(self, _: int) -> None:
        size = self._budget.size(ACCEPTS_PER_STEP)
        for at in range(size):
            if at >= ACCEPTS_AT_LEAST and self._engine.is_late:
                break
            if not self._has_room():
                self._pause()
                return
            try:
                sock, client = self._socket.accept()
            except BlockingIOError:
                self._budget.exhausted()
                return
            except OSError as error:
                if error.errno in OVERLOADED:
                    self._pause()
                    return
                continue  # that client has gone again
            sock.setblocking(False)
            if self._is_shared:  # it listened before it had these options from us
                prepare_stream(sock)
            self._engine.newest = sock.fileno()  # by which `Admission` goes, while it waits
            self._accepted(sock, client)
        if size > ACCEPTS_AT_LEAST and not self._goes_on:  # a burst: the next event would come after its own
            self._goes_on = True
            self._engine.again(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        if self._socket.fileno() >= 0 and self.timer_at == math.inf:
            self._on_events(IN)

    def _has_room(self) -> bool:
        """Return whether there is a descriptor for one client more."""
        return self._gateway.router.make_room()

    def _accepted(self, sock: socket.socket, client: Any) -> None:
        """Take a client's connection, and its address as accept(2) tells it."""
        raise NotImplementedError

    def _pause(self) -> None:
        self._engine.modify(self._socket.fileno(), 0)
        self._engine.timers.arm(self, self._engine.now + PAUSE)

    def handle_timer(self, now: float) -> None:
        """Accept again: the pause is over."""
        self._engine.modify(self._socket.fileno(), IN)


class TcpListener(StreamListener, ThroughStack):
    """A TCP port that leads through the stack.  When it is closed, clients who still wait are reset."""

    def _begin(self) -> None:
        self._waiting = Accepted(self._engine, self._gateway.router.tcp_accepted)
        super()._begin()

    def close(self) -> None:
        super().close()
        while self._waiting.clients:  # as those that the kernel has not told of
            _, sock = self._waiting.clients.popleft()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.close()

    def _on_events(self, events: int) -> None:
        super()._on_events(events)
        self._waiting.lead_on()

    def _accepted(self, sock: socket.socket, client: Any) -> None:
        self._waiting.clients.append((self._key(*client[:2]), sock))


class UdpListener(ThroughStack):
    """A UDP port that leads through the stack.  When it is closed, its flows end."""

    def _begin(self) -> None:
        router = self._gateway.router
        self._socket.setsockopt(*PKTINFO[family_of(self._socket)], 1)
        self._relay = UdpRelay(
            self._engine,
            self._socket,
            router.inbox,
            router.outbox,
            unsolicited=self._open,
            idle=lambda _: None,
        )
        self._published = router.published.setdefault(self.forward.guest_port, [])
        self._published.append(self)

    def close(self) -> None:
        self._published.remove(self)
        self._relay.close()

    def _listen(self, forward: PortForward) -> socket.socket:
        try:
            return listen(forward)
        except PortInUseError:  # perhaps the guest has it, since it has sent from the same port
            if not self._gateway.router.leave_udp_port(forward.host_port):
                raise
            return listen(forward)

    @property
    def host(self) -> Address:
        assert not isinstance(self.forward.host, UnixSocket)
        return self.forward.host

    def way_to(self, target: Address, guest: bytes) -> Way | None:
        if self._guest().packed != guest:
            return None
        return self._gateway.uplink.way_by(self.host, self.forward.device, target)

    def add(self, flow: UdpFlow, target: Endpoint, way: Way) -> None:
        self._relay.add(flow, (str(target.address), target.port), _told(way, family_of(self._socket)))

    def _open(self, relay: UdpRelay, client: tuple[str, int], ancillary: Ancillary) -> None:
        stack = self._gateway.stack
        try:
            key = self._gateway.router.free_key(self._key(*client), stack.udp)
        except KeyError:
            stack.dropped["udp-ports"] += 1
            return
        if self._gateway.router.is_answered_here(key):
            stack.dropped["udp-filtered"] += 1
            return
        flow = stack.add_udp(key, self._engine.now, client)
        relay.add(flow, client, [each for each in ancillary if each[:2] in PKTINFO_MESSAGES])


def _told(way: Way, family: int) -> Ancillary:
    """Return the ancillary data of a datagram that goes this way."""
    if way == (None, 0):
        return []
    if family == socket.AF_INET:
        source = socket.inet_aton(way.source or "0.0.0.0")
        return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4x", way.interface, source))]
    source = socket.inet_pton(socket.AF_INET6, way.source or "::")
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16sI", source, way.interface))]


def _is_host(address: bytes) -> bool:
    if addresses.family_of(address) is addresses.IPV6:
        return address[0] not in (0, 0xFF) and not is_link_local(address)
    return address[0] not in (0, 127) and address[0] < 224
