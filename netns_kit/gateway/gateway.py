"""The gateway: a pure `Stack`, a device and an `Uplink`, joined on an `Engine`.

This is all that runs per packet.  It reads frames into one buffer that it owns, hands each to the stack, and gives
every flow the stack reports a relay, or a refusal, as `Uplink.route` says.  A driver calls `Engine.step`; everything
else here is called from there, on the driver's thread.  `DeviceGone` passes through it to the driver.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Literal
from typing import Protocol as Interface

from netns_kit.arguments import Address
from netns_kit.dhcp import DEFAULT, DhcpSettings
from netns_kit.dhcp.names import is_name
from netns_kit.dns import Record, Zone
from netns_kit.errors import DeviceGone
from netns_kit.frozen import frozen, replace
from netns_kit.stack import (
    AnyFlow,
    Closed,
    EchoFlow,
    Limits,
    Refusal,
    Stack,
    Steering,
    TcpConnection,
    UdpFlow,
)
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import flow_key
from netns_kit.stack.wire.family import family_of
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.stack.wire.ndp import Advertisement
from netns_kit.subnet import Subnet, Subnet6
from netns_kit.tap.frame_device import FRAME_MAX, Device
from netns_kit.uplink.uplink import (
    DNS_PORT,
    OURSELVES,
    Endpoint,
    Flow,
    Target,
    Uplink,
    Way,
    source_of,
)

from .admission import Admission
from .engine import IN, NEVER, OUT, Appetite, Engine
from .leasing import Leasing
from .relay import ClientStream, DnsRelay, Inbox, Outbox, PingRelay, TcpRelay, UdpRelay, refusal_for
from .worker_links import Peers

FRAMES_PER_STEP = 32
FLOODED = 0.1  # seconds in which new flows made each step late: then it is a flood,
CALM = 0.5  # seconds for which it is taken for one,
DRAINED = 256  # frames that are looked at nevertheless, of a step that is late,
STRANGE_FRAMES = (
    256  # and of these such as belong to no flow yet, which wait for their turn; more are dropped
)
STRANGERS = 256  # flows of one UDP socket, beyond which nobody new is heard who was not asked
EPHEMERAL = range(32768, 61000)  # ports for clients whose own is taken
DOMAINS = ("containers.internal", "docker.internal")  # where programs in containers look for their host
NAMES = [f"{name}.{domain}" for name in ("gateway", "host") for domain in DOMAINS]  # the gateway's

# a guest's address and port, and what a socket can reach: the family, and loopback or not
GuestEndpoint = tuple[bytes, int, int, bool]


@frozen
class FlowInfo:
    """One flow, as it was when this was asked for, or when the event happened."""

    id: int
    """This flow's alone for as long as the stack runs, also when another has its endpoints later: for
    `UserStack.end_flow`."""
    protocol: Transport
    """What carries it; "icmp" is a series of pings."""
    guest: Endpoint
    """The namespace's end; of a ping its port is the identifier."""
    remote: Endpoint
    """The other end, as the guest sees it: of a client on the host's loopback, the gateway."""
    state: str
    """TCP's state, or "open"; of an event, its kind."""
    direction: Literal["outbound", "inbound"]
    """Who opened it: the guest, or a client outside."""
    host: Endpoint | None
    """The end of it on the host: the local address of the host's socket or, of an inbound flow, its client.

    None while there is none, or where it ends at ourselves, as DNS does."""
    name: str | None
    """What `remote` is called, if that is known: by a record of ours, or by what the guest last asked of DNS and was
    answered with that address, as long as answers are kept (`dns_cache`)."""
    bytes_from_guest: int
    """Bytes of payload that the guest has sent and the host's socket has taken."""
    bytes_to_guest: int
    """Bytes of payload sent to the guest; by TCP, and acknowledged by it."""
    age: float
    """Seconds since it was opened."""


class Published(Interface):
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


class Gateway:
    """What the guest has for a gateway."""

    def __init__(
        self,
        engine: Engine,
        tap: Device,
        uplink: Uplink,
        subnet: Subnet,
        *,
        limits: Limits | None = None,
        dhcp: DhcpSettings | None = DEFAULT,
        secret: bytes | None = None,
        peers: Peers | None = None,
        tell: Callable[[str, BaseException | None], None] | None = None,
    ) -> None:
        """`peers` are the others that serve the same namespace, each by a queue of its own of the tap.  `tell` is
        called with what somebody should know, and the error behind it; else that is logged."""
        self.engine = engine
        self.uplink = uplink
        self.subnet = subnet
        search = tuple(filter(is_name, uplink.search()))
        if dhcp is not None and dhcp.search is None:
            dhcp = replace(dhcp, search=search)
        self.stack = Stack(
            self,
            tap.write,
            addresses=tuple(address.packed for address in subnet.neighbours),
            mac=subnet.mac,
            mtu=tap.mtu,
            secret=secret or os.urandom(16),
            offloads=tap.offloads,
            limits=limits,
            timers=engine.timers,
            sources=None if uplink.any_source else _sources(subnet),
            advertised=_advertisement(subnet.ipv6, search) if peers is None or peers.index == 0 else None,
            steering=None if peers is None else Steering(peers.index, peers.count, peers.hand_over),
        )
        self.leasing = Leasing(self.stack, subnet, dhcp)
        self._resolvers = tuple(address.packed for address in subnet.resolvers)
        if tap.mac is not None:
            for network in (subnet, subnet.ipv6):
                if network is not None:
                    self.stack.link.learn(network.guest.packed, tap.mac)
        self._tap = tap
        self._buffer = memoryview(bytearray(2 * FRAME_MAX))
        self._appetite = Appetite(engine)
        self._late, self._late_since, self._flooded_until = NEVER, math.inf, -math.inf
        self._strange: deque[bytes] = deque()  # frames that wait, in a flood
        self.inbox, self.outbox = Inbox(), Outbox()
        self.zone = _zone(subnet)
        self._dns = DnsRelay(engine, uplink, self.zone, self._hook_failed, self._resolvers_for)
        self._udp: dict[GuestEndpoint, UdpRelay] = {}
        self.published: dict[int, list[Published]] = {}  # by the guest's port, the oldest first
        self._noticed: set[str] = set()
        self._tell = tell or log
        self.refused = 0  # flows, by the uplink or for want of descriptors
        self.admission = Admission(engine, self._give_up)
        self._events = IN
        engine.add(tap.fileno(), self._on_tap, IN)
        engine.after_step.append(self._end_of_step)
        self.timer_at = self.timer_entry = math.inf
        self._peers = peers
        self._peers_appetite = Appetite(engine)
        if peers is not None:
            engine.add(peers.fileno(), self._on_peers, IN)

    # -- frames -------------------------------------------------------------------------------------

    def _on_tap(self, events: int) -> None:
        if events & OUT:
            self._tap.flush()
        self._read_frames(self._appetite.size(FRAMES_PER_STEP))

    def _read_frames(self, most: int) -> None:
        if self._strange:  # others have come before
            self._drain()
            return
        read, receive, now = self._tap.read_into, self.stack.receive, self.engine.now
        buffer, outbox = self._buffer, self.outbox
        free, network = buffer, self.stack.network
        costly = network.costly
        for _ in range(most):
            size = read(free)
            if size is None:
                self._appetite.is_sated()
                break
            receive(free[:size], now)
            if outbox.relays:  # they keep what they have been lent until `flush`
                free = free[size:]
                if len(free) < FRAME_MAX:
                    outbox.flush()
                    free = buffer
            if network.costly != costly:
                costly = network.costly
                if self.engine.is_late:
                    self._look_for_flood()
                    break
        if outbox.relays:
            outbox.flush()

    def _look_for_flood(self) -> None:
        """Empty the guest's queue, if all steps have been late for long, lest what is under way gets lost in it."""
        engine, now = self.engine, self.engine.now
        if engine.steps > self._late + engine.around:
            self._late_since = now
        self._late = engine.steps
        if now - self._late_since > FLOODED:
            self._flooded_until = now + CALM
        if now < self._flooded_until and self.stack.knows_at_a_glance:
            self._drain()

    def _drain(self) -> None:
        """Receive what the guest's queue has of known flows.

        What belongs to no flow yet waits for `_receive_strange`, and is dropped unseen if there is too much of it."""
        buffer, outbox, stack, strange = self._buffer, self.outbox, self.stack, self._strange
        has_waited = bool(strange)
        for _ in range(DRAINED):
            if outbox.relays:
                outbox.flush()
            size = self._tap.read_into(buffer)
            if size is None:
                break
            if stack.receive_known(buffer[:size], self.engine.now):
                continue
            if len(strange) < STRANGE_FRAMES:
                strange.append(bytes(buffer[:size]))
            else:
                stack.dropped["flooded"] += 1
        if outbox.relays:
            outbox.flush()
        if strange and not has_waited:
            self.engine.again(self._receive_strange)

    def _receive_strange(self) -> None:
        """Receive what waits, until the step has used up its time: one frame at least."""
        strange, outbox = self._strange, self.outbox
        while strange:
            self.stack.receive(memoryview(strange.popleft()), self.engine.now)
            if self.engine.is_late:
                break
        if outbox.relays:
            outbox.flush()
        if strange:
            self.engine.again(self._receive_strange)

    def _on_peers(self, _: int) -> None:
        peers, stack, buffer = self._peers, self.stack, self._buffer
        assert peers is not None
        try:
            for _ in range(self._peers_appetite.size(FRAMES_PER_STEP)):
                size = peers.read_into(buffer, self.tcp_accepted)
                if size is None:
                    self._peers_appetite.is_sated()
                    break
                if size:
                    stack.steering.hops = peers.hops
                    stack.receive(buffer[:size], self.engine.now)
                    if self.outbox.relays:
                        self.outbox.flush()
        finally:
            stack.steering.hops = 0

    def _end_of_step(self) -> None:
        tap = self._tap
        if self.stack.acks.at_once:
            self.stack.flush()
        if tap.deadline < math.inf:
            self.engine.timers.arm(self, tap.deadline)
        events = IN | OUT if tap.backlog else IN
        if events != self._events:
            self._events = events
            self.engine.modify(tap.fileno(), events)

    def handle_timer(self, now: float) -> None:
        """An impaired device has frames that have been under way."""
        self._tap.advance(now)
        self._read_frames(FRAMES_PER_STEP)

    # -- the guest's flows: StackUser ---------------------------------------------------------------

    def tcp_opened(self, connection: TcpConnection) -> None:
        target = self._route("tcp", connection.key)
        if isinstance(target, Refusal):
            connection.refuse(target)
        elif self._is_dns(connection.key):
            self._dns.accept(connection, _upstreams(target))
        else:
            relay = TcpRelay(self.engine, connection)
            connection.user = relay
            relay.connect(self.uplink, target)

    def tcp_accepted(self, key: bytes, sock: socket.socket) -> None:
        """A client of a forwarded port, to be the flow of that name in the guest's sight; with another port for the
        client's, if there is one already."""
        stack, steering = self.stack, self.stack.steering
        if self._peers is not None and (owner := steering.owner(key)) != steering.index:
            self._peers.hand_over_connection(owner, key, sock)
            return
        relay = TcpRelay(self.engine)
        try:
            relay.run(sock)
        except OSError:  # the kernel has no room for one more to be watched
            sock.close()
            return
        try:
            name = self.free_key(key, stack.tcp)
            relay.connection = stack.connect_tcp(name, relay, self.engine.now, relay.peer())
        except KeyError:  # the table is full
            relay.closed(Closed.ABORTED)

    def free_key(self, key: bytes, table: Mapping[bytes, object]) -> bytes:
        """It, or if it is taken one with another port for the client's.  Raises `KeyError` if there is none."""
        if key not in table:
            return key
        names = flow_key.parse(key)
        steering, is_ours_alone = self.stack.steering, table is not self.stack.tcp
        for port in EPHEMERAL:
            name = names._replace(remote_port=port).pack()
            if name not in table and (is_ours_alone or steering.owner(name) == steering.index):
                return name
        raise KeyError(key)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        target = self._route("udp", flow.key)
        if isinstance(target, Refusal):
            return target
        if self._is_dns(flow.key):
            self._dns.add(flow, _upstreams(target))
            return None
        endpoint = target.endpoints[0]
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
        relay.add(flow, _address_of(endpoint))
        return None

    def _open_udp(self, guest: GuestEndpoint, address: Address) -> UdpRelay:
        """Raises OSError; nothing is left open then."""
        sock = self.uplink.open("udp", address, guest[1])
        try:
            return UdpRelay(
                self.engine,
                sock,
                self.inbox,
                self.outbox,
                unsolicited=lambda relay, sender, _: self._unsolicited(guest, relay, sender),
                idle=lambda relay: self._close_udp(guest, relay),
            )
        except BaseException:
            sock.close()
            raise

    def _leaves_by_published(self, flow: UdpFlow, endpoint: Endpoint) -> bool:
        """Whether `flow` is carried by a published port that leads to the port it comes from.

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

    def leave_udp_port(self, port: int) -> bool:
        """End what has that UDP port of the host for the guest's own flows, so that it can be published.  Whether
        something had it; the guest's next datagrams go by what is there then."""
        relays = [relay for relay in self._udp.values() if relay.port == port]
        for relay in relays:
            relay.close()
        return bool(relays)

    def _is_dns(self, key: bytes) -> bool:
        """Whether it is to be answered by us, if it is carried."""
        names = flow_key.parse(key)
        return names.remote_port == DNS_PORT and names.remote in self._resolvers

    def _resolvers_for(self, protocol: Transport, key: bytes) -> tuple[Endpoint, ...] | None:
        """Whom a flow to the DNS address that was carried asks now; None: it would be refused."""
        target = self._route(protocol, key)
        return None if isinstance(target, Refusal) else _upstreams(target)

    def _hook_failed(self, error: BaseException) -> None:
        self._notice("names are not resolved: the uplink's dns_hook failed", error)

    def _unsolicited(self, guest: GuestEndpoint, relay: UdpRelay, sender: tuple[str, int]) -> None:
        """A datagram from where the guest has not sent to: it comes in if the guest could answer it."""
        address, port = ip_address(sender[0].partition("%")[0]), sender[1]
        local = self.subnet.of(address)
        seen_as = local.gateway if local is not None and address.is_loopback else address
        if (
            self.uplink.udp_filtering == "endpoint-independent"
            and family_of(guest[0]).version == seen_as.version
            and relay.flow_count < STRANGERS
        ):
            key = FlowKey(guest[0], seen_as.packed, guest[1], port).pack()
            target = None if key in self.stack.udp else self._decide("udp", key)
            if isinstance(target, Target) and target.endpoints[0] == (address, port):
                flow = self.stack.add_udp(key, self.engine.now, _address_of(target.endpoints[0]))
                if self._udp.get(guest) is relay:
                    relay.add(flow, _address_of(target.endpoints[0]))
                else:  # making room has ended it
                    flow.close()
                return
        self.stack.dropped["udp-filtered"] += 1

    def _close_udp(self, guest: GuestEndpoint, relay: UdpRelay) -> None:
        del self._udp[guest]
        relay.close()

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        target = self._route("icmp", flow.key)
        if isinstance(target, Refusal):
            return target
        endpoint = target.endpoints[0]
        try:
            sock = self.uplink.open("icmp", endpoint.address)
        except OSError as error:
            return self._no_socket("icmp", error)
        try:
            PingRelay(self.engine, sock, flow, endpoint)
        except OSError as error:
            sock.close()
            return refusal_for(error.errno or 0)
        return None

    def _no_socket(self, protocol: Transport, error: OSError) -> Refusal:
        if protocol == "icmp" and error.errno in (errno.EACCES, errno.EPERM):
            self._notice("ping is not permitted: this user's group is not within net.ipv4.ping_group_range")
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            self._notice("out of file descriptors: new flows are refused")
        return refusal_for(error.errno or 0)

    def _notice(self, text: str, error: BaseException | None = None) -> None:
        """Tell of it, once; of errors, one of each type."""
        what = text if error is None else type(error).__name__
        if what not in self._noticed:
            self._noticed.add(what)
            self._tell(text, error)

    def _route(self, protocol: Transport, key: bytes) -> Target | Refusal:
        """Where a flow of the guest goes, if there is a descriptor for it.  DNS shares its own."""
        target = self._decide(protocol, key)
        if isinstance(target, Target) and not self._is_dns(key) and not self.make_room(key):
            self._notice("out of file descriptors (RLIMIT_NOFILE): new flows are refused")
            target = Refusal.NET_UNREACHABLE
        if isinstance(target, Refusal):
            self.refused += 1
        return target

    def _decide(self, protocol: Transport, key: bytes) -> Target | Refusal:
        """What the uplink says.  If it fails, the flow is refused and the failure logged: never open, and one
        bad flow does not end the others."""
        source, destination = self.endpoints(key)
        flow = Flow(protocol, source, destination, self.subnet)
        try:
            target = self.uplink.route(flow)
            if not isinstance(target, Target | Refusal):
                raise TypeError(f"Uplink.route returned {target!r}: expected a Target or a Refusal")
        except KeyboardInterrupt:  # that is for the program
            raise
        except BaseException as error:  # even what ends a task or a program: it ends no stack
            self._notice(f"flows are refused: the uplink failed to decide about {flow}", error)
            return Refusal.PROHIBITED
        return target

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
        if pending is not None and not pending.is_on_hold and not pending.may_give_way(self.engine.now):
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

    def endpoints(self, key: bytes) -> tuple[Endpoint, Endpoint]:
        """The guest's and the other that a flow of this key is between."""
        guest, remote, guest_port, remote_port = flow_key.parse(key)
        made = Endpoint._make  # which checks nothing: there is nothing to check
        return made((_address(guest), guest_port)), made((_address(remote), remote_port))

    # -- what people ask -----------------------------------------------------------------------------

    def flows(self) -> tuple[FlowInfo, ...]:
        """All flows under way."""
        stack = self.stack
        found = [self.info("tcp", flow, flow.state.value) for flow in stack.tcp.values()]
        found += [self.info("udp", flow, "open") for flow in stack.udp.values()]
        found += [self.info("icmp", flow, "open") for flow in stack.echo.values()]
        return tuple(found)

    def info(self, protocol: Transport, flow: AnyFlow, state: str) -> FlowInfo:
        """What is known of a flow."""
        guest, remote = self.endpoints(flow.key)
        inbound, host = False, None
        if isinstance(flow, EchoFlow):
            carried = flow.received, flow.sent
        else:
            host = flow.host
            inbound = flow.inbound if isinstance(flow, TcpConnection) else host is not None
            carried = flow.carried if isinstance(flow, TcpConnection) else (flow.received, flow.sent)
        if host is None and isinstance(flow.user, UdpRelay | PingRelay):
            host = flow.user.local()
        return FlowInfo(
            flow.id,
            protocol,
            guest,
            remote,
            state,
            "inbound" if inbound else "outbound",
            None if host is None else Endpoint(*host),
            self.name_of(remote.address),
            *carried,
            max(self.engine.now - flow.opened, 0.0),
        )

    def name_of(self, address: Address) -> str | None:
        """What an address is called, if that is known."""
        return self._dns.name_of(address.packed)

    def end_flow(self, number: int) -> bool:
        """End the flow of that id at once; whether there is one."""
        stack = self.stack
        for connection in stack.tcp.values():
            if connection.id == number:
                user = connection.user
                if isinstance(user, TcpRelay):
                    user.abort(reset=True)
                elif isinstance(user, ClientStream):
                    user.abort()
                else:  # nobody has it any more, or yet
                    connection.abort(self.engine.now)
                return True
        others: list[UdpFlow | EchoFlow] = [*stack.udp.values(), *stack.echo.values()]
        found = next((flow for flow in others if flow.id == number), None)
        if found is not None:
            found.close()
        return found is not None

    def guest(self, network: Subnet | Subnet6) -> Address:
        """Where the namespace is: see `Leasing.guest`."""
        return self.leasing.guest(network, self._tap.mac, self.engine.now)

    def stats(self) -> dict[str, int]:
        """Counters and gauges by name."""
        dns = {f"dns_{name}": count for name, count in self._dns.stats().items()}
        return {
            **self.stack.stats(),
            "flows_refused": self.refused,
            "tap_received": self._tap.counters.received,
            "tap_sent": self._tap.counters.sent,
            "tap_refused": self._tap.counters.refused,
            "tap_dropped": self._tap.counters.dropped,
            **dns,
            **({} if self._peers is None else self._peers.stats()),
            **self.leasing.stats(),
        }

    def close(self) -> None:
        """Reset every connection and close every socket.  The device stays its owner's."""
        self.admission.close()
        try:
            self.outbox.flush()  # what cannot be sent is refused, by a frame
            self._reset_connections()
        except DeviceGone:
            self.stack.link.emit = _nowhere
            self._reset_connections()
        for udp in list(self.stack.udp.values()):
            udp.close()
        for echo in list(self.stack.echo.values()):
            echo.close()
        self._dns.close()

    def _reset_connections(self) -> None:
        for connection in list(self.stack.tcp.values()):
            if isinstance(connection.user, TcpRelay | ClientStream):
                connection.user.abort()


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> Address:
    return ip_address(packed)


def _zone(subnet: Subnet) -> Zone:
    """The gateway's names, and that nobody else is asked about its networks."""
    networks = [each for each in (subnet, subnet.ipv6) if each is not None]
    zone = Zone(domains=DOMAINS, networks=[each.network for each in networks])
    for name in NAMES:
        for each in networks:
            zone.add(Record(name, str(each.gateway)))
    return zone


def _upstreams(target: Target) -> tuple[Endpoint, ...]:
    """Whom to ask for names."""
    return () if target.endpoints == (OURSELVES,) else target.endpoints


def _address_of(endpoint: Endpoint) -> tuple[str, int]:
    return str(endpoint.address), endpoint.port


def _sources(subnet: Subnet) -> tuple[tuple[bytes, int], ...]:
    """The networks that guests are in."""
    networks = [each.network for each in (subnet, subnet.ipv6) if each is not None]
    return tuple((each.network_address.packed, each.prefixlen) for each in networks)


def _advertisement(subnet: Subnet6 | None, search: tuple[str, ...]) -> Advertisement | None:
    if subnet is None:
        return None
    return Advertisement(
        subnet.network.network_address.packed,
        subnet.managed,
        subnet.other,
        subnet.autonomous,
        (subnet.dns.packed,),
        search if subnet.search is None else subnet.search,
    )


def log(text: str, error: BaseException | None = None) -> None:
    """Log it as a warning of this module."""
    from logging import getLogger  # which costs as much as the whole stack: not everybody has it log

    getLogger(__name__).warning(text, exc_info=error)


def _nowhere(*_: object) -> None:
    """Where frames go when the device has gone."""
