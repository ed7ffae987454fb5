"""Gateway: a pure `Stack`, a device and an `Uplink`, joined on an `Engine`.

    TapDevice <--> FramePump <--> Stack --> FlowRouter --> a relay <--> a socket of the host
                                                  +--> a handler of `Endpoints`: DNS, ...
    other workers <--> LinkPump

A driver calls `Engine.step`, and everything else here is called from there, on the driver's thread.  `Gateway`
connects these parts, answers questions about flows, and closes the parts in the end.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from netns_kit.arguments import Address
from netns_kit.dns import Record, Zone
from netns_kit.domain_names import is_host_name, to_wire
from netns_kit.errors import DeviceGone, FeatureUnavailable
from netns_kit.frozen import frozen, replace
from netns_kit.operations import chained, operation, same, summed
from netns_kit.policy.addresses import canonical
from netns_kit.stack import (
    AnyFlow,
    EchoFlow,
    Refusal,
    Stack,
    StackUser,
    Steering,
    TcpConnection,
    Transport,
    UdpFlow,
)
from netns_kit.stack.user import UNWATCHED
from netns_kit.stack.wire.ndp import Advertisement
from netns_kit.subnet import Subnet, Subnet6
from netns_kit.tap.frame_device import Device, DeviceWrapper
from netns_kit.uplink.flow import DNS_PORT, Endpoint

from .beside import FlowBeside, Watcher
from .endpoints import Endpoints
from .enforcer import Enforcer, ruling_of
from .engine import IN, Engine
from .flow_router import FlowRouter, endpoints_of
from .frame_pump import FramePump, LinkPump
from .leasing import Leasing
from .relay import DnsRelay, PingRelay, UdpRelay
from .setup import Setup
from .worker_links import NOTED, STANDING, WorkerLinks

if TYPE_CHECKING:
    from netns_kit.dns.guard import Guard, Refused
    from netns_kit.policy.policy import Policy

    from .answered_names import AnsweredNames
    from .inside import Inside
    from .stand_in_names import StandInNames

DOMAINS = ("containers.internal", "docker.internal")  # in which programs in containers look for their host
NAMES = [f"{name}.{domain}" for name in ("gateway", "host") for domain in DOMAINS]  # names of the gateway


@frozen
class FlowInfo:
    """A flow at the moment of the question, or of the event, that it belongs to."""

    id: int
    """Number of this flow.  As long as the stack runs, no other flow has it.  See `UserStack.end_flow`."""
    protocol: Transport
    """Transport of the flow."""
    guest: Endpoint
    """The namespace's endpoint.  The port of a ping is its identifier."""
    remote: Endpoint
    """The remote endpoint, as the guest sees it.  A client on the host's loopback appears as the gateway."""
    state: str
    """The state of a TCP connection; "open" for other flows; in an event, its kind."""
    direction: Literal["outbound", "inbound"]
    """Direction of opening: "outbound" by the guest, "inbound" by a client outside."""
    host: Endpoint | None
    """Endpoint on the host: the local address of the host's socket, or the client of an inbound flow.

    None while there is no socket, or if this process answers the flow itself, as it does DNS.
    """
    name: str | None
    """Name of `remote`, if it is known.  It comes from a record of ours, or from the last DNS answer to the guest
    that has this address, as long as answers are kept (`DnsSettings.cache`).
    """
    bytes_from_guest: int
    """Bytes of payload from the guest that the host's socket has taken."""
    bytes_to_guest: int
    """Bytes of payload sent to the guest; of TCP, only those that the guest has acknowledged."""
    age: float
    """Seconds since the flow was opened."""
    rule: str | None = None
    """The policy's rule that has decided about the flow, as text.  None if there is no policy, and for flows that it
    does not decide about: inbound ones, and those of our DNS address."""


class Gateway:
    """The gateway of one guest: stack, device, uplink, and what connects them.

    Args:
        engine: The engine that drives everything.
        setup: The settings of the stack.
        secret: The key of TCP's initial sequence numbers; None: a random one.
        peers: The links to the other workers of the same namespace, each of which has a queue of the tap.
        tell: Called with a warning for people, and with the exception behind it, if there is one.  By default it is
            logged.
    """

    def __init__(
        self,
        engine: Engine,
        setup: Setup,
        *,
        secret: bytes | None = None,
        peers: WorkerLinks | None = None,
        tell: Callable[[str, BaseException | None], None] | None = None,
    ) -> None:
        tap, uplink, subnet = setup.tap, setup.uplink, setup.subnet
        self.engine = engine
        self.uplink = uplink
        self.subnet = subnet
        self._tap = tap
        self._links = peers
        self.endpoints = Endpoints()
        search = tuple(filter(is_host_name, uplink.search()))
        stack_for = partial(self._stack_for, setup, search, secret or os.urandom(16))
        self.router: FlowRouter = _router_kind(setup)(
            engine, uplink, subnet, self.endpoints, stack_for, links=peers, tell=tell or log
        )
        stack: Stack = self.router.stack
        self.stack: Stack = stack
        self.enforcer: Enforcer = self.router.enforcer
        self.enforcer.told = self._query_refused
        if peers is not None:
            self.enforcer.pinned = peers.send_pins
            self.enforcer.catch_up = self.read_pins
            engine.add(peers.pins_fileno(), self._on_pins, IN)
        self.asking = self.router.asking
        self.asking.timeout = setup.on_flow_timeout if setup.asks else None
        self.asking.name_of = self.name_of
        stack.services = self.endpoints.link
        dhcp = setup.dhcp
        if dhcp is not None and dhcp.search is None:
            dhcp = replace(dhcp, search=search)
        self.leasing = Leasing(stack, self.endpoints, subnet, dhcp)
        if tap.mac is not None:
            for network in subnet.families:
                stack.link.learn(network.guest.packed, tap.mac)
        self._answer_names(setup)
        self._answered: AnsweredNames | None = None
        self._govern(setup.policy)
        self.beside: dict[int, FlowBeside] = {}
        self._inside: Inside | None = None
        if setup.supply is not None:
            from .inside import Inside  # programs that wait for our start have none

            self._inside = Inside(engine, setup.supply, self.router.admission.is_free)
        self._pump = FramePump(engine, tap, stack, self.router.outbox)
        if peers is not None:
            LinkPump(engine, peers, stack, self.router.outbox, self.router.tcp_handed_over)

    @property
    def device(self) -> Device:
        """What carries the stack's frames: the device, or a wrapper that was put before it."""
        return self._pump.tap

    @device.setter
    def device(self, device: Device) -> None:
        self._pump.tap = device
        self.stack.link.emit = device.write

    def withdraw(self, wrapper: DeviceWrapper) -> None:
        """Let what stands before the device stand there no more."""
        above = self.device
        if above is wrapper:
            self.device = wrapper.device
            return
        while isinstance(above, DeviceWrapper) and above.device is not wrapper:
            above = above.device
        if isinstance(above, DeviceWrapper):
            above.device = wrapper.device

    def _stack_for(self, setup: Setup, search: tuple[str, ...], secret: bytes, user: StackUser) -> Stack:
        tap, subnet, peers = setup.tap, setup.subnet, self._links
        return Stack(
            user,
            tap.write,
            addresses=tuple(address.packed for address in subnet.neighbours),
            mac=subnet.mac,
            mtu=tap.mtu,
            secret=secret,
            offloads=tap.offloads,
            limits=setup.limits,
            timers=self.engine.timers,
            sources=None if self.uplink.any_source else _sources(subnet),
            advertised=_advertisement(subnet.ipv6, search) if peers is None or peers.index == 0 else None,
            steering=None if peers is None else Steering(peers.index, peers.count, peers.hand_over),
        )

    def _answer_names(self, setup: Setup) -> None:
        """Answer DNS over UDP and TCP at the DNS addresses, and elsewhere if all of it is intercepted."""
        self.zone = _zone(self.subnet)
        for record in setup.records:
            self.zone.add(record)
        self.enforcer.own_names = self.zone.names_of
        relay: Callable[..., DnsRelay] = DnsRelay
        if self.uplink.is_in_memory:
            from .in_memory import InMemoryDns as relay
        self.dns: DnsRelay = relay(self.engine, self.uplink, self.zone, self._hook_failed, self.router)
        self.router.name_of = self._name_elsewhere
        self._standing: StandInNames | None = None
        if self.uplink.stands_in:
            self._stand_in()
        resolvers = self.subnet.resolvers
        for address in resolvers:
            self.endpoints.serve_tcp(address, DNS_PORT, self.dns.tcp_opened)
            self.endpoints.serve_udp(address, DNS_PORT, self.dns.udp_opened)
        if setup.intercept_dns:
            self.endpoints.redirect(DNS_PORT, resolvers)

    def _stand_in(self) -> None:
        from .stand_in_names import StandInNames  # it is for proxies

        self._standing = StandInNames(self.engine, self.router, self.uplink, self.subnet, self._links)
        self.dns.stand_in(self._standing)

    def _govern(self, policy: Policy | None) -> None:
        """Let a policy decide from now on, about flows and names."""
        self.enforcer.set(policy)
        self._guard_names()

    def want_names(
        self, who: object, targets: Collection[str], changed: Callable[[], object] = lambda: None
    ) -> None:
        """Note for whom our DNS gives addresses, for `answered`; see `AnsweredNames.want`.

        Args:
            who: Who wants to know it.
            targets: The names, as targets of rules; none: it wants to know no more.
            changed: Called when an address has one name more.
        """
        if targets or self._answered is not None:
            answered = self._answered or self._note_names()
            answered.want(who, targets, changed, self._answered_before)
            if not answered.is_wanted:
                self._answered = None
            self._guard_names()

    def _note_names(self) -> AnsweredNames:
        from .answered_names import AnsweredNames  # few need it

        links = self._links
        share = None if links is None else partial(links.send_pins, whose=NOTED)
        self._answered = AnsweredNames(share)
        return self._answered

    def _answered_before(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield names and addresses of answers that are remembered, as far as people may be told of them."""
        for address in self.dns.addresses():
            name = self.dns.name_of(address)
            if name is not None and is_host_name(name):
                yield to_wire(name).lower(), canonical(address)

    def answered(self, address: bytes) -> tuple[bytes, ...]:
        """Return the names for which our DNS has given a packed address.

        They are those of our own records, those that somebody wants to know (`want_names`), and the last one.
        """
        self.read_pins()
        noted = () if self._answered is None else self._answered.of(address)
        last = self.dns.name_of(address)
        names = self.zone.names_of(address) + noted
        return names if last is None or not is_host_name(last) else (*names, to_wire(last).lower())

    def _guard_names(self) -> None:
        guard: Guard | None = self.enforcer.guard
        if self._answered is not None and self._answered.is_wanted:
            from .answered_names import ListenedGuard  # few need it

            guard = ListenedGuard(guard, self._answered.hear)
        self.dns.guard = guard

    def read_pins(self) -> bool:
        """Learn what other workers have pinned and noted, and return whether there was anything."""
        found = False
        for whose, pins in () if self._links is None else self._links.read_pins():
            found = True
            if whose == NOTED:
                (self._answered or self._note_names()).note((name, address) for name, address, _, _ in pins)
            elif whose == STANDING:
                if self._standing is not None:
                    self._standing.learn(pins)
            else:
                self.enforcer.learn(pins, whose)
        return found

    def _on_pins(self, _: int) -> None:
        self.read_pins()

    def _query_refused(self, name: bytes, kind: int, client: bytes, refused: Refused, rule: str) -> None:
        enforcer = self.enforcer.of(client)
        enforcer.hits[f"dns {rule}"] += 1
        watcher, policy = self.watcher, enforcer.policy
        if watcher is not None and policy is not None:
            watcher.query_refused(name, kind, client, rule, refused.rcode, audit=policy.audit)

    def _hook_failed(self, error: BaseException) -> None:
        self.router.notice("names are not resolved: the uplink's DNS hook failed", error)

    # -- what people ask ----------------------------------------------------------------------------

    @operation(chained)
    def flows(self) -> tuple[FlowInfo, ...]:
        """Return all current flows."""
        stack = self.stack
        found = [self.info("tcp", flow, flow.state.value) for flow in stack.tcp.values()]
        found += [self.info("udp", flow, "open") for flow in stack.udp.values()]
        found += [self.info("icmp", flow, "open") for flow in stack.echo.values()]
        found += [self.info(flow.protocol, flow, flow.state) for flow in self.beside.values()]
        return tuple(found)

    def info(self, protocol: Transport, flow: AnyFlow | FlowBeside, state: str) -> FlowInfo:
        """Return the description of a flow."""
        if not isinstance(flow, TcpConnection | UdpFlow | EchoFlow):
            return FlowInfo(
                flow.id,
                protocol,
                flow.guest,
                flow.remote,
                state,
                flow.direction,
                flow.host,
                self.name_of(flow.remote.address),
                *flow.carried,
                max(self.engine.now - flow.opened, 0.0),
            )
        guest, remote = endpoints_of(flow.key)
        inbound, host, ruling, name = False, None, ruling_of(flow), self.name_of(remote.address)
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
            name if ruling is None else ruling.name_or(name),
            *carried,
            max(self.engine.now - flow.opened, 0.0),
            None if ruling is None else ruling.rule,
        )

    def name_of(self, address: Address) -> str | None:
        """Return the name of an address, or None if it is not known."""
        return self.dns.name_of(address.packed)

    def _name_elsewhere(self, address: bytes) -> str | None:
        """Return the name with which a resolver has answered an address; None if a record of ours has it."""
        return None if self.zone.name_of(address) is not None else self.dns.name_of(address)

    @operation()
    def names(self, addresses: tuple[Address, ...]) -> tuple[str | None, ...]:
        """Return the names of these addresses, None for unknown ones: see `FlowInfo.name`."""
        return tuple(map(self.name_of, addresses))

    @operation(any)
    def end_flow(self, number: int) -> bool:
        """End the flow with that id at once.  Return whether there was one."""
        flows = itertools.chain(self._flows(), self.beside.values())
        found = next((each for each in flows if each.id == number), None)
        if found is not None:
            self.router.end(found)
        return found is not None

    @operation(sum)
    def end_flows_of(self, addresses: tuple[Address, ...]) -> int:
        """End the flows of the guest with these addresses at once, and return how many there were."""
        found = [each for each in self._flows() if endpoints_of(each.key)[0].address in addresses]
        for each in found:
            self.router.end(each)
        return len(found)

    def _flows(self) -> Iterator[AnyFlow]:
        stack = self.stack
        return itertools.chain(stack.tcp.values(), stack.udp.values(), stack.echo.values())

    @operation(same)
    def set_policy(self, text: str | None, existing: Literal["keep", "cut"]) -> None:
        """Let another policy decide from now on: see `UserStack.set_policy`.

        Args:
            text: The policy, as `netns_kit.child.codec.dump` has it; None: there is no policy any more.
            existing: What becomes of flows that are under way.

        Raises:
            DecodeError: The text is no policy.  The old one stays.
        """
        if text is None:
            self._govern(None)
            return
        from netns_kit.child.codec import load  # with no policy nobody has these
        from netns_kit.policy.policy import Policy

        self._govern(load(Policy, text.encode()))
        if existing == "cut":
            self.router.cut()

    @operation(same)
    def set_policy_of(
        self, member: int, guests: tuple[Address, ...], text: str | None, existing: Literal["keep", "cut"]
    ) -> None:
        """Let a policy decide about a member, in place of the common one.

        Args:
            member: The number of the member, which no other has: see `Enforcer.set_own`.
            guests: The addresses of the member.
            text: The policy, as for `set_policy`; None: the common one decides.
            existing: As for `set_policy`.

        Raises:
            DecodeError: The text is no policy.
        """
        policy = None
        if text is not None:
            from netns_kit.child.codec import load  # as above
            from netns_kit.policy.policy import Policy

            policy = load(Policy, text.encode())
        addresses = tuple(each.packed for each in guests)
        self.enforcer.set_own(member, addresses, policy)
        self._guard_names()
        if existing == "cut":
            self.router.cut(addresses)

    @operation(summed)
    def policy_hits(self, guest: Address) -> dict[str, int]:
        """Return how often each rule of the policy that decides about a guest has done so, see `Enforcer.hits`."""
        return dict(self.enforcer.of(guest.packed).hits)

    @property
    def watcher(self) -> Watcher | None:
        """The follower of all flows and of what the policy does; None: there is none."""
        return self.router.watcher

    @watcher.setter
    def watcher(self, watcher: Watcher | None) -> None:
        self.router.watcher = watcher
        self.stack.watcher = UNWATCHED if watcher is None else watcher

    # -- flows beside the stack -----------------------------------------------------------------------

    @property
    def inside(self) -> Inside:
        """The sockets of the namespace.

        Raises:
            FeatureUnavailable: The device is in no namespace that has an agent.
        """
        if self._inside is None:
            raise FeatureUnavailable(
                "expected a device in a Namespace: this one came by a descriptor, and no socket can be made inside",
                fix='use mode="stack", or open the device in the namespace: TapDevice.open(namespace, "tap0")',
            )
        return self._inside

    def next_flow_id(self) -> int:
        """Return the number of a new flow."""
        return next(self.stack.tcp.flow_ids)

    def begun(self, flow: FlowBeside) -> None:
        """Note a flow that has begun."""
        self.beside[flow.id] = flow
        if self.watcher is not None:
            self.watcher.opened(flow.protocol, flow)

    def refused(self, flow: FlowBeside, why: Refusal) -> None:
        """Note that nobody takes a flow that has begun; `ended` follows."""
        if self.watcher is not None:
            self.watcher.refused(flow.protocol, flow, why)

    def ended(self, flow: FlowBeside) -> None:
        """Note a flow that has ended."""
        del self.beside[flow.id]
        if self.watcher is not None:
            self.watcher.closed(flow.protocol, flow)

    def guest(self, network: Subnet | Subnet6) -> Address:
        """Return the address of the namespace in a network: see `Leasing.guest`."""
        return self.leasing.guest(network, self._tap.mac, self.engine.now)

    @operation(summed)
    def stats(self) -> dict[str, int]:
        """Return counters and gauges by name."""
        dns = {f"dns_{name}": count for name, count in self.dns.stats().items()}
        return {
            **self.stack.stats(),
            "flows_refused": self.router.refused,
            "flows_asked": len(self.asking),
            **self.enforcer.stats(),
            "tap_received": self._tap.counters.received,
            "tap_sent": self._tap.counters.sent,
            "tap_refused": self._tap.counters.refused,
            "tap_dropped": self._tap.counters.dropped,
            **dns,
            **({} if self._links is None else self._links.stats()),
            **self.leasing.stats(),
        }

    def close(self) -> None:
        """Reset every connection and close every socket.  The device is not closed: it belongs to the caller."""
        self.asking.close()
        for flow in list(self.beside.values()):
            flow.end()
        if self._inside is not None:
            self._inside.close()
        try:
            self.router.outbox.flush()  # it writes a frame for what cannot be sent
            self.router.reset_connections()
        except DeviceGone:
            self.stack.link.emit = _nowhere
            self.router.reset_connections()
        self.router.close()
        self.dns.close()


def _router_kind(setup: Setup) -> Callable[..., FlowRouter]:
    """Return what makes the router for an uplink; most uplinks have none of these modules."""
    if setup.uplink.is_indirect:
        from .indirect_router import IndirectRouter

        return partial(IndirectRouter, supplies=setup.supplies[0] if setup.supplies else ())
    if setup.uplink.is_in_memory:
        from .in_memory import InMemoryRouter

        return InMemoryRouter
    return FlowRouter


def _zone(subnet: Subnet) -> Zone:
    """Return a zone with the names of the gateway.  It answers reverse queries for its networks."""
    zone = Zone(domains=DOMAINS, networks=[each.network for each in subnet.families])
    for name in NAMES:
        for each in subnet.families:
            zone.add(Record(name, str(each.gateway)))
    return zone


def _sources(subnet: Subnet) -> tuple[tuple[bytes, int], ...]:
    """Return the networks of the guests, each as packed address and prefix length."""
    networks = (each.network for each in subnet.families)
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
        tuple(map(to_wire, search if subnet.search is None else subnet.search)),
    )


def log(text: str, error: BaseException | None = None) -> None:
    """Log a warning by this module's logger."""
    from logging import getLogger  # importing it costs as much as the whole stack, and few need it

    getLogger(__name__).warning(text, exc_info=error)


def _nowhere(*_: object) -> None:
    """Drop a frame, since the device has gone."""
