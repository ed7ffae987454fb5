"""FlowRouter: decides about every flow, and selects what carries it.

    the guest opens a flow    a handler claims it and the uplink lets it pass                          the handler
                              no handler claims it, uplink and policy let it pass, a descriptor is free    a relay
                              the same, and it is intercepted                                     the interceptor
    a client opens a flow     a listener accepts it, and it belongs to this worker                     a relay

The uplink is asked first, by `Uplink.route`.  About what it lets pass, the `Enforcer` is asked, if there is a policy.
If anything fails on the way, the flow is refused: no policy ever fails open.  This module reads and writes no frames.
The stack calls the router, and the router calls the stack.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, TypeVar

from netns_kit.arguments import Address
from netns_kit.stack import (
    AnyFlow,
    Closed,
    EchoFlow,
    Ending,
    Refusal,
    Stack,
    StackUser,
    TcpConnection,
    Transport,
    UdpFlow,
)
from netns_kit.stack.wire import flow_key
from netns_kit.stack.wire.family import family_of
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.subnet import Subnet
from netns_kit.uplink.dial import Dial, Refused
from netns_kit.uplink.flow import Endpoint, Flow, Target, Way
from netns_kit.uplink.sockets import refusal_for, socket_address
from netns_kit.uplink.uplink import Uplink, source_of

from .admission import Admission
from .asking import Asking, Held
from .beside import FlowBeside, Watcher
from .endpoints import Endpoints
from .enforcer import REFUSALS, Enforcer, Look, Ruling, ruling_of
from .engine import Engine
from .relay import Inbox, Outbox, PingRelay, TcpRelay, UdpRelay
from .worker_links import WorkerLinks

if TYPE_CHECKING:
    from netns_kit.uplink.in_memory import Waiting

    from .relay.forbidden import Forbidden
    from .relay.peek import Judge, PeekingRelay


F = TypeVar("F", TcpConnection, UdpFlow, EchoFlow)
Answer = TypeVar("Answer")
STRANGERS = 256  # flows of one UDP socket, beyond which no unsolicited datagram opens one
EPHEMERAL = range(32768, 61000)  # ports for clients whose own port is in use

GuestEndpoint = tuple[bytes, int, int, bool, object]
"""A guest's address and port, and the kind of target that a socket reaches: its version of IP, and whether it is
loopback; and where it comes from, None if it is one of the host.
"""


Routed = tuple[Flow, Target]
"""A flow that may pass, and its target."""
DatagramsTaker: TypeAlias = "Callable[[socket.socket | Refusal | Waiting], None]"
"""What is given the way out of datagrams, see `FlowRouter.open_datagrams`."""
HELD: Final = "held"
Outcome = Refusal | Literal["held"] | None
"""What the policy makes of a flow: how it is refused, or that it waits for an answer, or that it may pass."""


class Opener(Protocol):
    """What opens a socket for a flow, as `Uplink.open` does."""

    def __call__(self, transport: Transport, address: Address, port: int = 0, /) -> socket.socket: ...


class Published(Protocol):
    """A UDP port of the host that is forwarded to a port of the guest.  The guest's datagrams from there leave by it
    too.
    """

    @property
    def host(self) -> Address:
        """The address that the port is bound to."""

    def way_to(self, target: Address, guest: bytes) -> Way | None:
        """Return how datagrams to `target`, from the guest's packed address `guest`, leave by this port; None: they
        cannot.
        """

    def add(self, flow: UdpFlow, target: Endpoint, way: Way) -> None:
        """Carry `flow` to `target`."""


class Intercepting(Protocol):
    """What has some of the flows that may pass, rather than a relay."""

    def takes(self, opened: TcpConnection | UdpFlow, flow: Flow, target: Target) -> bool | Refusal:
        """Take a flow, or return False: then a relay carries it.  A UDP flow may be refused.

        Args:
            opened: The flow, which has no user yet.
            flow: The same, as the uplink was asked about it.
            target: Where it goes.
        """
        ...


class FlowRouter:
    """The `StackUser` of a gateway.

    Args:
        engine: The engine of the gateway.
        uplink: Decides about flows, and connects them.
        subnet: The subnet of the guest.
        endpoints: The handlers of flows that this process answers itself.
        stack: Makes the stack, with this object as its user.
        links: The links to the other workers of the same namespace; None: there are none.
        tell: Called with a warning for people, and with the exception behind it, if there is one.

    Attributes:
        published: The published UDP ports of the host, the oldest first, by the guest's port that they lead to.
        beside: Functions that close an idle flow beside the stack, and return whether there was one.
        enforcer: The policy, which is asked about what the uplink lets pass.
        asking: The flows that wait for an answer, since the policy says so.
        forbidden: The connections whose clients are told why they are refused; None: there was none yet.
        watcher: The follower of what the policy does; None: there is none.
        interceptor: What has some of the flows that may pass; None: there is none.
        name_of: Returns the name with which a resolver has last answered a packed address, or None.  Only the router
            of an `IndirectUplink` asks.
        refused: The number of flows that were refused by the uplink, by the policy or for lack of descriptors.
        relay: Makes the relay of a connection of the guest, from the arguments of `TcpRelay`.
        enforcer_kind: Makes the enforcer, from the arguments of `Enforcer`.
    """

    relay: Callable[..., TcpRelay] = TcpRelay
    enforcer_kind: Callable[..., Enforcer] = Enforcer

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
        self._noticed: set[tuple[str, type[object]]] = set()
        self._udp: dict[GuestEndpoint, UdpRelay] = {}
        self.inbox, self.outbox = Inbox(), Outbox()
        self.published: dict[int, list[Published]] = {}
        self.beside: list[Callable[[], bool]] = []
        self.refused = 0
        self.watcher: Watcher | None = None
        self.interceptor: Intercepting | None = None
        self.name_of: Callable[[bytes], str | None] = _unnamed
        self.enforcer = self.enforcer_kind(subnet, self.notice)
        self.asking = Asking(engine, self.enforcer, self)
        self.forbidden: Forbidden | None = None
        self.stack = stack(self)
        self.admission = Admission(engine, self._give_up)

    # -- the decision -------------------------------------------------------------------------------

    def route(
        self, transport: Transport, key: bytes, opened: AnyFlow | None = None, *, served: bool = False
    ) -> Routed | Refusal | None:
        """Return a flow of the guest and its target, if it may pass and there is a descriptor for it; else the
        refusal, or None if the flow waits for an answer.

        Args:
            transport: The transport of the flow.
            key: The key of the flow.
            opened: The flow, which gets the policy's ruling.
            served: Whether a handler of ours has claimed the flow.  It needs no descriptor then, and the policy is
                not asked.
        """
        found = self._decide(transport, key, served)
        if not isinstance(found, Refusal):
            if served:
                return found
            outcome = None if not self.enforcer.governs else self._govern(found, opened)
            if outcome is None:
                if self.make_room(key):
                    return found
                outcome = Refusal.NET_UNREACHABLE
            if not isinstance(outcome, Refusal):
                return None
            found = outcome
        self.refused += 1
        return found

    def _decide(self, transport: Transport, key: bytes, served: bool = False) -> Routed | Refusal:
        """Ask the uplink about a flow.  If the uplink fails, this flow is refused and the failure reported; others go
        on.
        """
        flow = self._flow_of(transport, key, served)
        try:
            target = self._uplink.route(flow)
            if isinstance(target, Target):
                if target.candidates or served:
                    return flow, target
                raise ValueError(
                    "Uplink.route returned a Target without candidates: expected one, or a Refusal"
                )
            if isinstance(target, Refusal):
                return target
            raise TypeError(f"Uplink.route returned {target!r}: expected a Target or a Refusal")
        except KeyboardInterrupt:  # it is meant for the program
            raise
        except BaseException as error:  # not even SystemExit may end the stack
            self.notice(f"flows are refused: the uplink failed to decide about {flow}", error)
            return Refusal.PROHIBITED

    def _flow_of(self, transport: Transport, key: bytes, served: bool = False) -> Flow:
        source, destination = endpoints_of(key)
        return Flow(transport, source, destination, self._subnet, served)

    def _govern(self, found: Routed, opened: AnyFlow | None) -> Outcome:
        """Ask the policy about a flow, and return what becomes of it."""
        flow, target = found
        ruling = self.enforcer.flow(flow, self._engine.now)
        if opened is not None:
            opened.ruling = ruling
            if ruling.action == "ask":
                return self.asking.hold(opened, flow, target, ruling) or HELD
            if ruling.audit and self.watcher is not None:
                self.watcher.let_pass(flow.protocol, opened, REFUSALS[ruling.refusal])
        return REFUSALS[ruling.refusal] if ruling.refuses else None

    def cannot_dial(self, error: BaseException) -> Refused:
        """Report that the uplink, or one of its dials, has failed, and return how the flow is refused."""
        self.notice("flows are refused: the uplink failed to dial", error)
        return Refused(Refusal.PROHIBITED)

    def open_socket(self, transport: Transport, address: Address, port: int = 0) -> socket.socket:
        """Have the uplink open a socket.

        Raises:
            OSError: As the uplink raises it.  Any other exception of the uplink's is reported, and becomes
                EHOSTUNREACH.
        """
        try:
            return self._uplink.open(transport, address, port)
        except (OSError, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.notice("flows are refused: the uplink failed to open a socket", error)
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)) from error

    def dial_resolver(self, resolver: Endpoint) -> Dial:
        """Have the uplink dial a resolver, for a flow of the DNS server's own.  If the uplink fails, the flow is
        refused.
        """
        flow = Flow("tcp", Endpoint._make((self._subnet.dns, 0)), resolver, self._subnet)
        return self._dialled(lambda: self._uplink.dial_resolver(flow, Target((resolver,))))

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        """Have the uplink dial.  If it fails, the flow is refused."""
        return self._dialled(lambda: self._uplink.dial(flow, target, ttl=ttl, tos=tos))

    def _dialled(self, dial: Callable[[], Answer]) -> Answer | Refused:
        """Return what the uplink answers, or how the flow is refused if it fails."""
        try:
            return dial()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self.cannot_dial(error)

    def route_served(self, transport: Transport, key: bytes) -> Target | Refusal:
        """Ask the uplink again about a flow that a handler has: return the target now, or the refusal."""
        found = self.route(transport, self._endpoints.redirected(key), served=True)
        return found[1] if isinstance(found, tuple) else found or Refusal.PROHIBITED

    # -- the guest's flows: StackUser ---------------------------------------------------------------

    def tcp_opened(self, connection: TcpConnection) -> None:
        key = self._endpoints.redirected(connection.key)
        handler = self._endpoints.claim_tcp(key)
        found = self.route("tcp", key, connection, served=handler is not None)
        if not isinstance(found, tuple):
            if found is not None:
                self.refuse(connection, found)
            return
        flow, target = found
        if handler is not None:
            handler(connection, target)
        elif self.interceptor is None or not self.interceptor.takes(connection, flow, target):
            relay = self.relay if not self.enforcer.governs else self._relay_for(connection, flow)
            connection.user = made = relay(self._engine, connection, self.cannot_dial)
            try:
                dial = self._uplink.dial(flow, target, ttl=connection.ttl, tos=connection.tos)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                dial = self.cannot_dial(error)
            made.begin(dial)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        key = self._endpoints.redirected(flow.key)
        handler = self._endpoints.claim_udp(key)
        found = self.route("udp", key, flow, served=handler is not None)
        if not isinstance(found, tuple):
            return found
        described, target = found
        if handler is not None:
            return handler(flow, target)
        taken = self.interceptor is not None and self.interceptor.takes(flow, described, target)
        if taken:
            return None if taken is True else taken
        return self._carry_udp(flow, target.candidates[0])

    def _carry_udp(self, flow: UdpFlow, endpoint: Endpoint) -> Refusal | None:
        """Give a flow its relay, or return how it is refused."""
        if self._leaves_by_published(flow, endpoint):
            return None
        return self._carry_udp_by(self.open_socket, flow, endpoint, guest_endpoint(flow, endpoint))

    def _carry_udp_by(
        self, open_socket: Opener, flow: UdpFlow, endpoint: Endpoint, guest: GuestEndpoint
    ) -> Refusal | None:
        relay = self._udp.get(guest)
        if relay is None:
            try:
                relay = self._udp[guest] = self._open_udp(open_socket, guest, endpoint.address)
            except OSError as error:
                return self._no_socket("udp", error)
        relay.add(flow, _socket_name(endpoint))
        return None

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        found = self.route("icmp", flow.key, flow)
        if not isinstance(found, tuple):
            return found
        return self._carry_echo(flow, found[1].candidates[0])

    def _carry_echo(self, flow: EchoFlow, endpoint: Endpoint) -> Refusal | None:
        """Give a flow its relay, or return how it is refused."""
        return self._carry_echo_by(self.open_socket, flow, endpoint)

    def _carry_echo_by(self, open_socket: Opener, flow: EchoFlow, endpoint: Endpoint) -> Refusal | None:
        try:
            sock = open_socket("icmp", endpoint.address)
        except OSError as error:
            return self._no_socket("icmp", error)
        try:
            PingRelay(self._engine, sock, flow, endpoint)
        except OSError as error:
            sock.close()
            return refusal_for(error.errno or 0)
        return None

    def _open_udp(self, open_socket: Opener, guest: GuestEndpoint, address: Address) -> UdpRelay:
        """Return a new relay for the datagrams of a guest's endpoint.

        Raises:
            OSError: There is no socket; nothing is left open.
        """
        sock = open_socket("udp", address, guest[1])
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
        """Return whether a published port that leads to the flow's source port carries the flow.

        Of several such ports the one that is bound to the host's source address is used, else one that is bound to
        all addresses, else the oldest.
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
        """Return whether a handler of ours would get what the guest sends in that UDP flow.

        A client outside may not open such a flow, because the guest's datagrams in it would not reach the handler.
        """
        return self._endpoints.redirected(key) != key or self._endpoints.claim_udp(key) is not None

    def _unsolicited(self, guest: GuestEndpoint, relay: UdpRelay, sender: tuple[str, int]) -> None:
        """Open a flow for a datagram from an endpoint that the guest has not sent to, if the guest may answer it."""
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
            if (
                not isinstance(found, Refusal)
                and (target := found[1].candidates[0]) == (address, port)
                and (not self.enforcer.governs or self._govern(found, None) is None)
            ):
                flow = self.stack.add_udp(key, self._engine.now, _socket_name(target))
                if self._udp.get(guest) is relay:
                    relay.add(flow, _socket_name(target))
                else:  # the relay was closed to make room
                    flow.close()
                return
        self.stack.dropped["udp-filtered"] += 1

    # -- what has waited for an answer --------------------------------------------------------------

    def proceed(self, opened: AnyFlow, flow: Flow, target: Target) -> Refusal | None:
        """Have a flow that may pass now carried or intercepted, or return how it is refused."""
        if self.interceptor is not None and not isinstance(opened, EchoFlow):
            taken = self.interceptor.takes(opened, flow, target)
            if taken:
                return None if taken is True else taken
        return self.let_pass(opened, flow, target)

    def let_pass(self, opened: AnyFlow, flow: Flow, target: Target) -> Refusal | None:
        """Carry a flow that may pass to its target, or return how it is refused."""
        if not self.make_room(opened.key):
            self.refused += 1
            return Refusal.NET_UNREACHABLE
        if isinstance(opened, UdpFlow):
            return self._carry_udp(opened, target.candidates[0])
        if isinstance(opened, EchoFlow):
            return self._carry_echo(opened, target.candidates[0])
        opened.user = relay = self._relay_for(opened, flow)(self._engine, opened, self.cannot_dial)
        relay.begin(self.dial(flow, target, ttl=opened.ttl, tos=opened.tos))
        return None

    def limit(self, relay: object) -> None:
        """Limit the time that a relay's dial may take; here the kernel does."""

    def open_datagrams(
        self, flow: Flow, target: Target, give: DatagramsTaker, pair: list[socket.socket]
    ) -> None:
        """Give a UDP socket that is connected to a target, or how the uplink refuses that, now or later.

        Args:
            flow: The flow, as the uplink is asked about it.
            target: The target.
            give: Called with it; or with a `Waiting`, if the caller's side has what is there.
            pair: Two connected unix sockets, which may be taken out, so that one is given: its records are those of
                `netns_kit.gateway.served`.
        """
        address = target.candidates[0].address
        give(connected(lambda: self.open_socket("udp", address), target))

    def flush(self) -> None:
        """Send the datagrams that wait for more of their kind."""
        self.outbox.flush()

    # -- what the policy refuses, and what it looks at ----------------------------------------------

    def refuse(self, connection: TcpConnection, why: Refusal) -> None:
        """Refuse a connection whose SYN is on hold; if its rule says so, in words."""
        ruling = ruling_of(connection)
        if ruling is not None and ruling.refuses and ruling.refusal == "forbidden":
            self._forbid(connection, ruling, b"")
        else:
            connection.refuse(why)

    def _forbid(self, connection: TcpConnection, ruling: Ruling, said: bytes) -> None:
        """Tell the client of a connection why it is refused."""
        if self.forbidden is None:
            from .relay.forbidden import Forbidden  # without such a rule nobody has it

            self.forbidden = Forbidden(self._engine, self.stack.dropped)
        self.stack.tcp.refused(connection, Refusal.PROHIBITED)
        remote = endpoints_of(connection.key)[1]
        what = str(remote) if ruling.name is None else f"{ruling.name} ({remote})"
        self.forbidden.take(connection, what, str(ruling.rule), said)

    def _relay_for(self, connection: TcpConnection, flow: Flow) -> Callable[..., TcpRelay]:
        """Return what makes the relay of a connection, by its ruling."""
        judging = self.judging(connection, flow)
        if judging is None:
            return self.relay
        from .relay.peek import PeekingRelay  # without such a rule nobody has it

        judge, waits = judging
        return partial(PeekingRelay, judge=judge, waits=waits)

    def judging(self, connection: TcpConnection, flow: Flow) -> tuple[Judge, bool] | None:
        """Return what judges the first bytes of a connection, and whether a server that speaks first waits for that;
        None: they are not looked at.
        """
        ruling, policy = ruling_of(connection), self.enforcer.policy_of(flow)
        if ruling is None or not ruling.looks or policy is None:
            return None
        return partial(self._judge, flow), not policy.audit

    def _judge(self, flow: Flow, relay: PeekingRelay, seen: Look) -> None:
        """Decide about a connection once more, now that its first bytes are known."""
        connection = relay.connection
        assert connection is not None
        ruling = connection.ruling = self.enforcer.first_bytes(flow, seen, self._engine.now)
        if not ruling.refuses:
            if ruling.audit and self.watcher is not None:
                self.watcher.let_pass("tcp", connection, REFUSALS[ruling.refusal])
            relay.pass_on()
            return
        self.refused += 1
        if ruling.refusal == "forbidden":
            _, said = relay.leave()
            self._forbid(connection, ruling, said)
        else:
            self.stack.tcp.refused(connection, Refusal.RESET)
            relay.abort(reset=True)

    def cut(self, guests: Collection[bytes] = ()) -> None:
        """End the flows of the guest that the policy does not let pass now.

        Connections are reset, towards the guest and towards the host's peer.  A flow that the policy would ask about
        is ended too, and so is one whose first bytes it would look at.  If these were looked at before, they decide
        again.

        Args:
            guests: The packed addresses of the guests that it is about; none: all.
        """
        stack, claim = self.stack, self._endpoints
        for connection in _flows_of(guests, stack.tcp.values()):
            key = claim.redirected(connection.key)
            if not connection.inbound and claim.claim_tcp(key) is None:
                self._cut_tcp(connection, key)
        relays = set(self._udp.values())
        for flow in _flows_of(guests, stack.udp.values()):
            key = claim.redirected(flow.key)
            opened_inside = flow.host is None or flow.user in relays
            if opened_inside and claim.claim_udp(key) is None and self._is_cut("udp", key, flow):
                flow.end("cut by policy")
        for echo in _flows_of(guests, stack.echo.values()):
            if self._is_cut("icmp", echo.key, echo):
                echo.end("cut by policy")

    def _cut_tcp(self, connection: TcpConnection, key: bytes) -> None:
        """End a connection if the policy does not let it pass now."""
        if not self._is_cut("tcp", key, connection):
            return
        if not connection.is_on_hold:
            self.abort(connection, reset=True, ending="cut by policy")
            return
        user = connection.user
        connection.refuse(REFUSALS[connection.ruling.refusal])
        if user is not None:
            user.closed(Closed.ABORTED)

    def _is_cut(self, transport: Transport, key: bytes, flow: AnyFlow) -> bool:
        """Decide about a flow again, and return whether it may not go on.  If it may not, it gets the ruling."""
        before, described, now = ruling_of(flow), self._flow_of(transport, key), self._engine.now
        ruling = self.enforcer.existing(described, before, now)
        if ruling.action != "deny" and isinstance(flow.user, Held):  # it has not passed yet
            return False
        if ruling.looks and (before is None or not before.looks):  # it never was looked at
            ruling = ruling._replace(action="deny", looks=False)
        if ruling.refuses:
            flow.ruling = ruling
        return ruling.refuses

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
            key: The key of the flow as the guest sees it.  If there is such a flow, the client gets another port.
            sock: The client's connection.  It belongs to the flow from now on.
        """
        stack, steering = self.stack, self.stack.steering
        if self._links is not None and (owner := steering.owner(key)) != steering.index:
            self._links.hand_over_connection(owner, key, sock)
            return
        relay = TcpRelay(self._engine)
        try:
            relay.run(sock)
        except OSError:  # the kernel's limit on polled descriptors is reached
            sock.close()
            return
        try:
            name = self.free_key(key, stack.tcp)
            relay.connection = stack.connect_tcp(name, relay, self._engine.now, relay.peer())
        except KeyError:  # the table is full
            relay.closed(Closed.ABORTED)

    def tcp_handed_over(self, key: bytes, sock: socket.socket) -> None:
        """Connect a client that another worker has accepted, as `tcp_accepted` does, if there is a descriptor for it.

        If there is none, the connection is closed.  The listener would wait, but it is in the other process.
        """
        if self.make_room():
            self.tcp_accepted(key, sock)
        else:
            self.refused += 1
            sock.close()

    def free_key(self, key: bytes, table: Mapping[bytes, object]) -> bytes:
        """Return `key`, or if `table` has it, the key of the same flow with another port of the client.

        Raises:
            KeyError: The table has all of them.
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
        """Close the relays of the guest's own flows that use a UDP port of the host, so that the port can be
        published.

        Return whether there was one.  The guest's next datagrams leave by whatever carries them then.
        """
        relays = [relay for relay in self._udp.values() if relay.port == port]
        for relay in relays:
            relay.close()
        return bool(relays)

    # -- room ---------------------------------------------------------------------------------------

    def make_room(self, key: bytes = b"") -> bool:
        """Return whether there is a descriptor for one more flow; if necessary, close another flow for it.
        If there is none, people are told.

        The flow closed is the UDP flow that has been idle longest.  It is a connection whose handshake is not over
        instead if there is no UDP flow, or if such connections have more than half of all descriptors; and if there
        is neither, an idle flow beside the stack.

        Args:
            key: The key of the new flow, if the guest opens it: this flow is not closed.
        """
        return self.admission.admit(lambda: self._evict(key)) or self._has_none()

    def _has_none(self) -> bool:
        self.notice("out of file descriptors (RLIMIT_NOFILE): new flows are refused")
        return False

    def _evict(self, key: bytes) -> bool:
        """Close a flow that is idle or has not begun, but not the one of that key.  Return whether there was one."""
        stack = self.stack
        pending = next(
            (each for name, each in stack.pending.items() if name != key and not isinstance(each.user, Held)),
            None,
        )
        idle = next((name for name in stack.udp if name != key), None)
        many = len(stack.pending) > self.admission.most // 2
        if pending is not None and not pending.is_on_hold and not pending.may_give_way(self._engine.now):
            pending = None
        if pending is not None and (many or idle is None):
            pending.give_way()
        elif idle is not None:
            stack.udp.evict(spare=key)
        elif not any(close_idle() for close_idle in self.beside):
            return False
        stack.dropped["limit-descriptors"] += 1
        return True

    def _give_up(self) -> None:
        """Close a flow because another gateway of this process is owed a descriptor: an idle one, else the oldest
        connection.
        """
        if self.admission.close_one(lambda: self._evict(b"")):
            return
        oldest = next(iter(self.stack.tcp.values()), None)
        if oldest is not None and isinstance(oldest.user, TcpRelay):
            oldest.user.abort(ending="made room")
            self.stack.dropped["limit-descriptors"] += 1

    # -- the end ------------------------------------------------------------------------------------

    def abort(self, connection: TcpConnection, *, reset: bool, ending: Ending = "ended") -> None:
        """Reset a connection towards the guest; with `reset=True` towards the host's peer too."""
        user = connection.user
        if isinstance(user, TcpRelay):
            user.abort(reset=reset, ending=ending)
            return
        connection.abort(self._engine.now, ending)
        if user is not None:
            user.closed(Closed.ABORTED)

    def end(self, flow: AnyFlow | FlowBeside) -> None:
        """End any flow, a connection with resets on both sides."""
        if isinstance(flow, TcpConnection):
            self.abort(flow, reset=True)
        else:
            flow.end()

    def reset_connections(self) -> None:
        """Reset all connections that have a user, as `abort` does."""
        for connection in list(self.stack.tcp.values()):
            if connection.user is not None:
                self.abort(connection, reset=False)

    def close(self) -> None:
        """Withdraw the claim on descriptors, and close all sockets of datagrams."""
        self.admission.close()
        for flow in [*self.stack.udp.values(), *self.stack.echo.values()]:
            flow.end()

    def notice(self, text: str, error: BaseException | None = None) -> None:
        """Report a warning to people, each text up to its " about " once; of exceptions, one of each type."""
        what = text.partition(" about ")[0], type(error)
        if what not in self._noticed:
            self._noticed.add(what)
            self._tell(text, error)


def connected(open_socket: Callable[[], socket.socket], target: Target) -> socket.socket | Refusal:
    """Return a socket that is connected to a target, or how that is refused."""
    try:
        sock = open_socket()
    except OSError as error:
        return refusal_for(error.errno or 0)
    try:
        sock.connect(socket_address(*target.candidates[0]))
    except OSError as error:
        sock.close()
        return refusal_for(error.errno or 0)
    return sock


def _flows_of(guests: Collection[bytes], flows: Iterable[F]) -> list[F]:
    """Return the flows of guests with these packed addresses; of none: all."""
    return [each for each in flows if not guests or flow_key.parse(each.key).guest in guests]


def _unnamed(_: bytes) -> None:
    """Return no name."""


def endpoints_of(key: bytes) -> tuple[Endpoint, Endpoint]:
    """Return the guest's endpoint and the remote endpoint of the flow with that key."""
    guest, remote, guest_port, remote_port = flow_key.parse(key)
    made = tuple.__new__  # without the checks of `Endpoint`, which are not needed here
    return made(Endpoint, (_address(guest), guest_port)), made(Endpoint, (_address(remote), remote_port))


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> Address:
    return ip_address(packed)


def guest_endpoint(flow: UdpFlow, endpoint: Endpoint, source: object = None) -> GuestEndpoint:
    """Return what has one socket: all flows from a port of the guest to targets of a kind."""
    names, address = flow_key.parse(flow.key), endpoint.address
    return names.guest, names.guest_port, address.version, address.is_loopback, source


def _socket_name(endpoint: Endpoint) -> tuple[str, int]:
    return str(endpoint.address), endpoint.port
