"""IndirectRouter: the FlowRouter of an `IndirectUplink`, such as one through a proxy.

It does more than a `FlowRouter`: it finds the names of destinations, it has UDP and pings carried as the
uplink says (`IndirectUplink.carriage`), and it gives up a dial that takes too long.  A gateway with another uplink
has none of this.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from netns_kit.dns.stand_ins import StandIns
from netns_kit.domain_names import to_text
from netns_kit.policy.addresses import canonical
from netns_kit.stack import AnyFlow, EchoFlow, Refusal, TcpConnection, Transport, UdpFlow
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.elsewhere import NamespaceSockets
from netns_kit.uplink.flow import Endpoint, Flow, NamedFlow, Target
from netns_kit.uplink.indirect import Carriage, IndirectUplink, ProxyDial, UdpAssociation
from netns_kit.uplink.sockets import refusal_for

from .elsewhere import SourceElsewhere, Waiting
from .enforcer import Enforcer, Look, Ruling, ruling_of
from .engine import Engine
from .flow_router import DatagramsTaker, FlowRouter, GuestEndpoint, Outcome, Routed, connected, guest_endpoint
from .relay import TcpRelay, UdpRelay
from .relay.associated import AssociatedRelay
from .relay.dialled import Dialled
from .way import DatagramWay, WayRelay

if TYPE_CHECKING:
    from netns_kit.policy.index import Decision, Index
    from netns_kit.policy.policy import Policy

_Guest = tuple[bytes, int, Endpoint, Endpoint | None]
"""A guest's address and port, the proxy that its datagrams go through, and the destination if it is told by name."""


class ByName(NamedTuple):
    """An `Index`, for a destination that has a name and no address."""

    whole: Index

    @property
    def policy(self) -> Policy:
        return self.whole.policy

    def flow(
        self, protocol: Transport, _: bytes | None, port: int, names: tuple[bytes, ...], is_host: object
    ) -> Decision:
        return self.whole.flow(protocol, None, port, names, lambda: False)


class IndirectEnforcer(Enforcer):
    """An `Enforcer` that lets a proxy be told a name that the deciding rule is about.

    The address of a stand-in is none for it: rules about addresses are not about it.
    """

    def flow(self, flow: Flow, now: float) -> Ruling:
        ruling = super().flow(flow, now)
        if isinstance(flow, NamedFlow) and ruling.is_about(flow.name):
            flow.allow_telling()
        return ruling

    def _decide(
        self, index: Index, flow: Flow, seen: Look | None, now: float, given: tuple[bytes, ...]
    ) -> Ruling:
        seen_as = cast("Index", ByName(index)) if flow.is_by_name else index
        return super()._decide(seen_as, flow, seen, now, given)


class IndirectRouter(FlowRouter):
    """The `StackUser` of a gateway whose uplink is indirect.

    Its arguments are those of `FlowRouter`, and `supplies`: where sockets of each of `Uplink.namespaces` are ordered.

    Attributes:
        stand_ins: The addresses that stand for names; None: there are none.
    """

    enforcer_kind = IndirectEnforcer
    stand_ins: StandIns | None = None

    def __init__(
        self,
        engine: Engine,
        uplink: IndirectUplink,
        *arguments: Any,
        supplies: Sequence[socket.socket],
        **options: Any,
    ) -> None:
        self._sources = [SourceElsewhere(engine, each, self._is_free, self._ended) for each in supplies]
        self._indirect = uplink.attached(self.notice, iter(self._sources))
        self._associations: dict[_Guest, AssociatedRelay] = {}
        self._ways: set[DatagramWay] = set()  # out, of handlers
        super().__init__(engine, self._indirect, *arguments, **options)
        self._waiting = Waiting(engine, self.enforcer, self)

    # -- names ----------------------------------------------------------------------------------------

    def _flow_of(self, transport: Transport, key: bytes, served: bool = False) -> Flow:
        flow = super()._flow_of(transport, key, served)
        address = flow.destination.address.packed
        enforcer = self.enforcer.of(flow.source.address.packed)
        if served:
            return flow
        if self.stand_ins is not None and address in self.stand_ins:
            named = NamedFlow.of(flow, self._stood_for(self.stand_ins, address), is_by_name=True)
        else:
            name = self._name(enforcer, address) if self._indirect.wants_names else None
            if name is None:
                return flow
            named = NamedFlow.of(flow, name)
        if enforcer.policy is None and self._indirect.policy is None:
            named.allow_telling()
        return named

    def _stood_for(self, stand_ins: StandIns, address: bytes) -> str | None:
        """Return the name that an address stands for, which another worker may have told."""
        now = self._engine.now
        if not stand_ins.is_sure(address, now) and self.enforcer.catch_up is not None:
            self.enforcer.catch_up()
        stand_ins.use(address, now)
        found = stand_ins.name_of(address)
        return None if found is None else to_text(found)

    def _decide(self, transport: Transport, key: bytes, served: bool = False) -> Routed | Refusal:
        found = super()._decide(transport, key, served)
        if isinstance(found, tuple) and found[0].is_by_name and found[0].name is None:
            return Refusal.HOST_UNREACHABLE
        return found

    def _name(self, enforcer: Enforcer, address: bytes) -> str | None:
        if enforcer.policy is not None:
            names = enforcer.pins.names(canonical(address), self._engine.now)
            if names:
                return to_text(names[-1])
        return self.name_of(address)

    def _govern(self, found: Routed, opened: AnyFlow | None) -> Outcome:
        outcome, flow = super()._govern(found, opened), found[0]
        if outcome is None and isinstance(flow, NamedFlow) and flow.is_by_name and not flow.may_be_told:
            return Refusal.PROHIBITED
        return outcome

    # -- TCP ------------------------------------------------------------------------------------------

    def tcp_opened(self, connection: TcpConnection) -> None:
        super().tcp_opened(connection)
        self.limit(connection.user)

    def let_pass(self, opened: AnyFlow, flow: Flow, target: Target) -> Refusal | None:
        refusal = super().let_pass(opened, flow, target)
        self.limit(opened.user)
        return refusal

    def limit(self, relay: object) -> None:
        """Give up the dial of a relay when the time of the proxy is over."""
        if isinstance(relay, Dialled) and isinstance(relay.pending, ProxyDial):
            limit = TimeLimit(relay, relay.pending)
            self._engine.timers.arm(limit, self._engine.now + self._indirect.time_limit)

    # -- datagrams ------------------------------------------------------------------------------------

    def _carry_udp(self, flow: UdpFlow, endpoint: Endpoint) -> Refusal | None:
        found = self._carriage("udp", flow, endpoint)
        if found is None:
            return super()._carry_udp(flow, endpoint)
        if isinstance(found, Refusal):
            return found
        if isinstance(found, NamespaceSockets):
            guest_there = guest_endpoint(flow, endpoint, found)
            if guest_there not in self._udp and not found.source.has("udp", endpoint.address.version):
                return self._waiting.hold(flow, self._flow_of("udp", flow.key), endpoint, found)
            return self._carry_udp_by(found.open, flow, endpoint, guest_there)
        names = flow_key.parse(flow.key)
        flow_is_by_name = self.stand_ins is not None and endpoint.address.packed in self.stand_ins
        guest = names.guest, names.guest_port, found.proxy, endpoint if flow_is_by_name else None
        relay = self._associations.get(guest)
        if relay is not None:
            relay.add(flow, endpoint)
            return None
        dial = self._dialled(found.dial)
        if isinstance(dial, Refused):
            return _refusal_of(dial)
        relay = self._associations[guest] = AssociatedRelay(
            self._engine, found, self.cannot_dial, idle=lambda: self._associations.pop(guest, None)
        )
        relay.add(flow, endpoint)
        relay.begin(dial)
        self.limit(relay)
        return None

    def open_datagrams(
        self, flow: Flow, target: Target, give: DatagramsTaker, pair: list[socket.socket]
    ) -> None:
        found = self._asked(flow, target)
        if isinstance(found, NamespaceSockets):
            self._open_elsewhere(found, target, give)
        elif isinstance(found, Refusal):
            give(found)
        elif found is None:
            super().open_datagrams(flow, target, give, pair)
        else:
            self._open_association(found, target, give, pair)

    def _open_elsewhere(self, sockets: NamespaceSockets, target: Target, give: DatagramsTaker) -> None:
        source, address = sockets.source, target.candidates[0].address

        def take(found: socket.socket | OSError) -> None:
            if isinstance(found, OSError):
                give(refusal_for(found.errno or 0))
                return
            source.give_back("udp", address.version, found)
            give(connected(lambda: sockets.open("udp", address), target))

        if source.has("udp", address.version):
            give(connected(lambda: sockets.open("udp", address), target))
        elif source.fileno() < 0:
            give(Refusal.NET_UNREACHABLE)
        else:
            source.take("udp", address.version, take)

    def _open_association(
        self, association: UdpAssociation, target: Target, give: DatagramsTaker, pair: list[socket.socket]
    ) -> None:
        """Give one end of the pair, whose other end has an association of its own."""
        dial = self._dialled(association.dial)
        if isinstance(dial, Refused):
            give(_refusal_of(dial))
            return
        near, far = pair
        try:
            way = DatagramWay(self._engine, near, self._ways.discard)
        except OSError as error:
            give(refusal_for(error.errno or 0))
            return
        pair.clear()
        relay = WayRelay(self._engine, association, self.cannot_dial, way, far, give)
        relay.add(cast("UdpFlow", way), target.candidates[0])  # it has all that the relay asks of one
        self._ways.add(way)
        relay.begin(dial)
        self.limit(relay)

    def _unsolicited(self, guest: GuestEndpoint, relay: UdpRelay, sender: tuple[str, int]) -> None:
        is_elsewhere = isinstance(guest[-1], NamespaceSockets)
        if is_elsewhere and ip_address(sender[0].partition("%")[0]).is_loopback:  # which is not the gateway's
            self.stack.dropped["udp-filtered"] += 1
        else:
            super()._unsolicited(guest, relay, sender)

    def _is_free(self) -> bool:
        return self.admission.is_free()

    def _ended(self, source: SourceElsewhere) -> None:
        """End the flows that leave from a namespace which has ended."""
        self.notice("flows are refused: the namespace that they are to leave from has ended")
        for connection in list(self.stack.tcp.values()):
            user = connection.user
            if isinstance(user, TcpRelay) and user.socket is not None and source.has_given(user.socket):
                user.abort()
        for guest, relay in list(self._udp.items()):
            if isinstance(guest[-1], NamespaceSockets) and guest[-1].source is source:
                relay.close()

    def close(self) -> None:
        super().close()
        for way in list(self._ways):
            way.close()
        for each in self._sources:
            each.close()

    def _carry_echo(self, flow: EchoFlow, endpoint: Endpoint) -> Refusal | None:
        found = self._carriage("icmp", flow, endpoint)
        if found is None:
            return super()._carry_echo(flow, endpoint)
        if isinstance(found, Refusal):
            return found
        if not isinstance(found, NamespaceSockets):
            return Refusal.PROHIBITED
        if not found.source.has("icmp", endpoint.address.version):
            return self._waiting.hold(flow, self._flow_of("icmp", flow.key), endpoint, found)
        return self._carry_echo_by(found.open, flow, endpoint)

    def carry(self, opened: UdpFlow | EchoFlow, target: Endpoint) -> Refusal | None:
        """Give a flow its relay, or return how it is refused.

        Args:
            opened: The flow.
            target: Where it goes.
        """
        carry = self._carry_udp if isinstance(opened, UdpFlow) else self._carry_echo
        return carry(opened, target)  # type: ignore[arg-type]  # mypy does not see which of them it is

    def _carriage(self, transport: Transport, flow: UdpFlow | EchoFlow, endpoint: Endpoint) -> Carriage:
        """Ask the uplink what carries a flow.  If it fails, the flow is refused."""
        described, ruling = self._flow_of(transport, flow.key), ruling_of(flow)
        if isinstance(described, NamedFlow) and ruling is not None and ruling.is_about(described.name):
            described.allow_telling()
        found = self._asked(described, Target((endpoint,)))
        self.refused += isinstance(found, Refusal)
        return found

    def _asked(self, flow: Flow, target: Target) -> Carriage:
        found = self._dialled(lambda: self._indirect.carriage(flow, target))
        return _refusal_of(found) if isinstance(found, Refused) else found


class TimeLimit:
    """The time that a proxy has for one dial."""

    __slots__ = ("_dial", "_relay", "timer_at", "timer_entry")

    def __init__(self, relay: Dialled, dial: ProxyDial) -> None:
        self._relay = relay
        self._dial = dial
        self.timer_at = self.timer_entry = math.inf

    def handle_timer(self, _: float) -> None:
        """Refuse the flow, if the dial is still under way."""
        if self._relay.pending is self._dial:
            self._relay.refuse(self._dial.time_over().why)


def _refusal_of(refused: Refused) -> Refusal:
    return refused.why if isinstance(refused.why, Refusal) else Refusal.HOST_UNREACHABLE
