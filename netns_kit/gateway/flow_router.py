"""FlowRouter: decides about every flow, and gives it what carries it.

    the guest opens a flow    a handler claims it, the policy lets it pass                       the handler
                              nobody claims it, the policy lets it pass, a descriptor is left    a relay
    a client opens a flow     a listener has accepted it, this worker owns its name              a relay

Whatever fails on the way refuses the flow: the policy never fails open.  Nothing here reads or writes a frame: the
stack calls, and is called.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Protocol

from netns_kit.arguments import Address
from netns_kit.stack import Closed, EchoFlow, Refusal, Stack, StackUser, TcpConnection, Transport, UdpFlow
from netns_kit.stack.wire import flow_key
from netns_kit.stack.wire.family import family_of
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.subnet import Subnet
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.flow import Endpoint, Flow, Target, Way
from netns_kit.uplink.sockets import refusal_for
from netns_kit.uplink.uplink import Uplink, source_of

from .admission import Admission
from .endpoints import Endpoints
from .engine import Engine
from .relay import Inbox, Outbox, PingRelay, TcpRelay, UdpRelay
from .worker_links import WorkerLinks

STRANGERS = 256  # flows of one UDP socket, beyond which nobody new is heard who was not asked
EPHEMERAL = range(32768, 61000)  # ports for clients whose own is taken

GuestEndpoint = tuple[bytes, int, int, bool]
"""A guest's address and port, and what a socket can reach: the family, and loopback or not."""


Routed = tuple[Flow, Target]
"""A flow that may pass, and where it goes."""


class Published(Protocol):
    """A UDP port of the host that leads to a port of the guest's, and that the guest's datagrams leave by."""

    @property
    def host(self) -> Address:
        """The address that it is bound to."""
        ...

    def way_to(self, target: Address, guest: bytes) -> Way | None:
        """Return how what the guest at that packed address sends to `target` leaves by it; None if it cannot."""
        ...

    def add(self, flow: UdpFlow, target: Endpoint, way: Way) -> None:
        """Carry `flow`, which goes to `target`, from now on."""
        ...


class FlowRouter:
    """The `StackUser` of a gateway.

    Args:
        stack: Makes the stack, whose user this is.
        links: The other workers that serve the same namespace.
        tell: Called with what somebody should know, and the error behind it.

    Attributes:
        published: UDP ports of the host by the guest's port that they lead to, the oldest first.
        refused: Counts flows, refused by the uplink or for want of descriptors.
    """

    def __init__(
        self,
        engine: Engine,
        uplink: Uplink,
        subnet: Subnet,
        endpoints: Endpoints,
        stack: Callable[[StackUser], Stack],
        *,
        links: WorkerLinks | None,
        tell: Callable[[str, BaseException | None], None],
    ) -> None:
        self._engine = engine
        self._uplink = uplink
        self._subnet = subnet
        self._endpoints = endpoints
        self._links = links
        self._tell = tell
        self._noticed: set[str | tuple[str, type[BaseException]]] = set()
        self._udp: dict[GuestEndpoint, UdpRelay] = {}
        self.inbox, self.outbox = Inbox(), Outbox()
        self.published: dict[int, list[Published]] = {}
        self.refused = 0
        self.stack = stack(self)
        self.admission = Admission(engine, self._give_up)

    # -- the decision -------------------------------------------------------------------------------

    def route(self, transport: Transport, key: bytes, *, served: bool = False) -> Routed | Refusal:
        """Return where a flow of the guest goes, if it may pass and there is a descriptor for it.

        Args:
            served: Whether a handler of ours has it: then it needs no descriptor.
        """
        found = self._decide(transport, key, served)
        if not isinstance(found, Refusal):
            if served or self.make_room(key):
                return found
            self.notice("out of file descriptors (RLIMIT_NOFILE): new flows are refused")
            found = Refusal.NET_UNREACHABLE
        self.refused += 1
        return found

    def _decide(self, transport: Transport, key: bytes, served: bool = False) -> Routed | Refusal:
        """Ask the uplink.  If it fails, the flow is refused and the failure told: one bad flow does not end the
        others."""
        source, destination = endpoints_of(key)
        flow = Flow(transport, source, destination, self._subnet, served)
        try:
            target = self._uplink.route(flow)
            if not isinstance(target, Target | Refusal):
                raise TypeError(f"Uplink.route returned {target!r}: expected a Target or a Refusal")
            if isinstance(target, Target) and not target.candidates and not served:
                raise ValueError(
                    "Uplink.route returned a Target without candidates: expected one, or a Refusal"
                )
        except KeyboardInterrupt:  # that is for the program
            raise
        except BaseException as error:  # even what ends a task or a program: it ends no stack
            self.notice(f"flows are refused: the uplink failed to decide about {flow}", error)
            return Refusal.PROHIBITED
        return target if isinstance(target, Refusal) else (flow, target)

    def _cannot_dial(self, error: BaseException) -> Refused:
        """Refuse a flow for which the uplink, or a dial of its own, has failed, and tell of the failure."""
        self.notice("flows are refused: the uplink failed to dial", error)
        return Refused(Refusal.PROHIBITED)

    def _open(self, transport: Transport, address: Address, port: int = 0) -> socket.socket:
        """Have the uplink open a socket.  If it fails otherwise than by OSError, tell of that, and raise OSError."""
        try:
            return self._uplink.open(transport, address, port)
        except (OSError, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.notice("flows are refused: the uplink failed to open a socket", error)
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)) from error

    def route_served(self, transport: Transport, key: bytes) -> Target | Refusal:
        """Return what the uplink says now of a flow that a handler has had for a while."""
        found = self.route(transport, self._endpoints.redirected(key), served=True)
        return found if isinstance(found, Refusal) else found[1]

    # -- the guest's flows: StackUser ---------------------------------------------------------------

    def tcp_opened(self, connection: TcpConnection) -> None:
        key = self._endpoints.redirected(connection.key)
        handler = self._endpoints.claim_tcp(key)
        found = self.route("tcp", key, served=handler is not None)
        if isinstance(found, Refusal):
            connection.refuse(found)
            return
        flow, target = found
        if handler is not None:
            handler(connection, target)
        else:
            connection.user = relay = TcpRelay(self._engine, connection, self._cannot_dial)
            try:
                dial = self._uplink.dial(flow, target, ttl=connection.ttl, tos=connection.tos)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                dial = self._cannot_dial(error)
            relay.begin(dial)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        key = self._endpoints.redirected(flow.key)
        handler = self._endpoints.claim_udp(key)
        found = self.route("udp", key, served=handler is not None)
        if isinstance(found, Refusal):
            return found
        _, target = found
        if handler is not None:
            return handler(flow, target)
        endpoint = target.candidates[0]
        if self._leaves_by_published(flow, endpoint):
            return None
        address, names = endpoint.address, flow_key.parse(flow.key)
        guest = (names.guest, names.guest_port, address.version, address.is_loopback)
        relay = self._udp.get(guest)
        if relay is None:
            try:
                relay = self._udp[guest] = self._open_udp(guest, address)
            except OSError as error:
                return self._no_socket("udp", error)
        relay.add(flow, _socket_name(endpoint))
        return None

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        found = self.route("icmp", flow.key)
        if isinstance(found, Refusal):
            return found
        endpoint = found[1].candidates[0]
        try:
            sock = self._open("icmp", endpoint.address)
        except OSError as error:
            return self._no_socket("icmp", error)
        try:
            PingRelay(self._engine, sock, flow, endpoint)
        except OSError as error:
            sock.close()
            return refusal_for(error.errno or 0)
        return None

    def _open_udp(self, guest: GuestEndpoint, address: Address) -> UdpRelay:
        """Raises OSError; nothing is left open then."""
        sock = self._open("udp", address, guest[1])
        try:
            return UdpRelay(
                self._engine,
                sock,
                self.inbox,
                self.outbox,
                unsolicited=lambda relay, sender, _: self._unsolicited(guest, relay, sender),
                idle=lambda relay: self._close_udp(guest, relay),
            )
        except BaseException:
            sock.close()
            raise

    def _close_udp(self, guest: GuestEndpoint, relay: UdpRelay) -> None:
        del self._udp[guest]
        relay.close()

    def _leaves_by_published(self, flow: UdpFlow, endpoint: Endpoint) -> bool:
        """Return whether `flow` is carried by a published port that leads to the port it comes from.

        Of several, the one that is bound to the address that the host would send from; else one bound to all
        addresses; else the oldest.
        """
        names = flow_key.parse(flow.key)
        published = self.published.get(names.guest_port)
        if published is None:
            return False
        target, guest = endpoint.address, names.guest
        found = [(each, way) for each in published if (way := each.way_to(target, guest)) is not None]
        if len(found) > 1:
            source = source_of(target)
            found.sort(key=lambda one: (str(one[0].host) != source, not one[0].host.is_unspecified))
        for each, way in found[:1]:
            each.add(flow, endpoint, way)
        return bool(found)

    def is_answered_here(self, key: bytes) -> bool:
        """Return whether what the guest sends in that UDP flow is for a handler of ours, or is redirected.

        Nobody outside may open such a flow: the guest's part of it would pass by the handler.
        """
        return self._endpoints.redirected(key) != key or self._endpoints.claim_udp(key) is not None

    def _unsolicited(self, guest: GuestEndpoint, relay: UdpRelay, sender: tuple[str, int]) -> None:
        """Let a datagram in from where the guest has not sent to, if the guest could answer it."""
        address, port = ip_address(sender[0].partition("%")[0]), sender[1]
        local = self._subnet.of(address)
        seen_as = local.gateway if local is not None and address.is_loopback else address
        if (
            self._uplink.udp_filtering == "endpoint-independent"
            and family_of(guest[0]).version == seen_as.version
            and relay.flow_count < STRANGERS
        ):
            key = FlowKey(guest[0], seen_as.packed, guest[1], port).pack()
            refused = key in self.stack.udp or self.is_answered_here(key)
            found = Refusal.DROP if refused else self._decide("udp", key)
            if not isinstance(found, Refusal) and (target := found[1].candidates[0]) == (address, port):
                flow = self.stack.add_udp(key, self._engine.now, _socket_name(target))
                if self._udp.get(guest) is relay:
                    relay.add(flow, _socket_name(target))
                else:  # making room has ended it
                    flow.close()
                return
        self.stack.dropped["udp-filtered"] += 1

    def _no_socket(self, transport: Transport, error: OSError) -> Refusal:
        if transport == "icmp" and error.errno in (errno.EACCES, errno.EPERM):
            self.notice("ping is not permitted: this user's group is not within net.ipv4.ping_group_range")
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            self.notice("out of file descriptors: new flows are refused")
        return refusal_for(error.errno or 0)

    # -- flows of clients outside -------------------------------------------------------------------

    def tcp_accepted(self, key: bytes, sock: socket.socket) -> None:
        """Connect a client of a forwarded port to the guest.

        Args:
            key: The flow's name in the guest's sight; if it is taken, the client gets another port.
            sock: The client's connection, which is this flow's from now on.
        """
        stack, steering = self.stack, self.stack.steering
        if self._links is not None and (owner := steering.owner(key)) != steering.index:
            self._links.hand_over_connection(owner, key, sock)
            return
        relay = TcpRelay(self._engine)
        try:
            relay.run(sock)
        except OSError:  # the kernel has no room for one more to be watched
            sock.close()
            return
        try:
            name = self.free_key(key, stack.tcp)
            relay.connection = stack.connect_tcp(name, relay, self._engine.now, relay.peer())
        except KeyError:  # the table is full
            relay.closed(Closed.ABORTED)

    def tcp_handed_over(self, key: bytes, sock: socket.socket) -> None:
        """Do as `tcp_accepted` for a client that another worker has accepted, if there is a descriptor for it.

        If not, the client's connection is closed: the listener, which would wait, is in another process.
        """
        if self.make_room():
            self.tcp_accepted(key, sock)
        else:
            self.refused += 1
            sock.close()

    def free_key(self, key: bytes, table: Mapping[bytes, object]) -> bytes:
        """Return `key`, or the same flow with a free client port if it is taken.

        Raises:
            KeyError: All of them are taken.
        """
        if key not in table:
            return key
        names = flow_key.parse(key)
        steering, is_ours_alone = self.stack.steering, table is not self.stack.tcp
        for port in EPHEMERAL:
            name = names._replace(remote_port=port).pack()
            if name not in table and (is_ours_alone or steering.owner(name) == steering.index):
                return name
        raise KeyError(key)

    def leave_udp_port(self, port: int) -> bool:
        """End what has that UDP port of the host for the guest's own flows, so that it can be published.

        Returns whether something had it.  The guest's next datagrams go by what is there then.
        """
        relays = [relay for relay in self._udp.values() if relay.port == port]
        for relay in relays:
            relay.close()
        return bool(relays)

    # -- room ---------------------------------------------------------------------------------------

    def make_room(self, key: bytes = b"") -> bool:
        """Return whether there is a descriptor for one more flow, of the name `key` if it is the guest's.

        If there is none, a connection whose handshake is not over gives its own where they have more than half of
        them all, else the UDP flow idle longest does, or they, if there is none.
        """
        return self.admission.admit(lambda: self._evict(key))

    def _evict(self, key: bytes) -> bool:
        """Close a flow, not that of the name `key`, which has not begun or is idle.  Return whether there was one."""
        stack = self.stack
        pending = next((each for name, each in stack.pending.items() if name != key), None)
        idle = next((name for name in stack.udp if name != key), None)
        many = len(stack.pending) > self.admission.most // 2
        if pending is not None and not pending.is_on_hold and not pending.may_give_way(self._engine.now):
            pending = None
        if pending is not None and (many or idle is None):
            pending.give_way()
        elif idle is not None:
            stack.udp.evict(spare=key)
        else:
            return False
        stack.dropped["limit-descriptors"] += 1
        return True

    def _give_up(self) -> None:
        """Close a flow, for another gateway of this process that is owed its descriptor: an idle one, or the oldest
        connection."""
        if self.admission.close_one(lambda: self._evict(b"")):
            return
        oldest = next(iter(self.stack.tcp.values()), None)
        if oldest is not None and isinstance(oldest.user, TcpRelay):
            oldest.user.abort()
            self.stack.dropped["limit-descriptors"] += 1

    # -- the end ------------------------------------------------------------------------------------

    def abort(self, connection: TcpConnection, *, reset: bool) -> None:
        """End a connection at once: RST to the guest; with `reset`, to the host's peer too."""
        user = connection.user
        if isinstance(user, TcpRelay):
            user.abort(reset=reset)
            return
        connection.abort(self._engine.now)
        if user is not None:
            user.closed(Closed.ABORTED)

    def reset_connections(self) -> None:
        """End all connections that somebody has, as `abort` does."""
        for connection in list(self.stack.tcp.values()):
            if connection.user is not None:
                self.abort(connection, reset=False)

    def close(self) -> None:
        """Claim no descriptors any more, and close the sockets of datagrams."""
        self.admission.close()
        for udp in list(self.stack.udp.values()):
            udp.close()
        for echo in list(self.stack.echo.values()):
            echo.close()

    def notice(self, text: str, error: BaseException | None = None) -> None:
        """Tell of it, once; of errors, one of each type."""
        what = text if error is None else (text.partition(" about ")[0], type(error))
        if what not in self._noticed:
            self._noticed.add(what)
            self._tell(text, error)


def endpoints_of(key: bytes) -> tuple[Endpoint, Endpoint]:
    """Return the guest's endpoint and the other one of a flow of that key."""
    guest, remote, guest_port, remote_port = flow_key.parse(key)
    made = tuple.__new__  # which checks nothing: there is nothing to check
    return made(Endpoint, (_address(guest), guest_port)), made(Endpoint, (_address(remote), remote_port))


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> Address:
    return ip_address(packed)


def _socket_name(endpoint: Endpoint) -> tuple[str, int]:
    return str(endpoint.address), endpoint.port
