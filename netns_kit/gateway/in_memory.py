"""InMemoryRouter: the FlowRouter of an `InMemoryUplink`, whose flows and names the caller's process answers.

    the guest opens a flow --policy lets it pass--> waits --Opened--> the caller's side decides
                                                      |                   |
          a relay with the end of a socket pair <-----+----- accept ------+
          RST, ICMP error, silence              <-----+----- refuse ------+
    a query for a name, none of ours --Question-->  resolved --> the answer
    an echo request                  -->  Echo  -->  echoed  --> a reply, or an error

What waits is one of the flows of `Serving`, as if an endpoint had claimed it.  Nothing is decided here: so the next
flow sees what has changed on the caller's side, and it is the same with every driver.  There is no socket but the
ends of pairs that the caller's side hands over.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any

from netns_kit.dns import Send, Upstream
from netns_kit.stack import Closed, EchoFlow, Ending, IcmpError, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.wire.ip import Packet
from netns_kit.uplink.dial import Dial
from netns_kit.uplink.flow import Endpoint, Flow, Target
from netns_kit.uplink.in_memory import Waiting
from netns_kit.uplink.uplink import is_reachable

from .flow_router import DatagramsTaker, FlowRouter, endpoints_of
from .relay import DnsRelay, TcpRelay
from .relay.peek import PeekingRelay
from .served import KEPT_MOST, DecidedRelay, Echo, Question, ServedConnection, Teller

QUERIES_MOST = 4096  # that wait for the caller's side; beyond that the oldest has no answer


class InMemoryRouter(FlowRouter):
    """The `StackUser` of a gateway whose uplink is in memory.  Its arguments are those of `FlowRouter`.

    Attributes:
        serving: What tells the caller's side; None: nobody is there yet, and flows are refused.
        service: The number under which it does.
        answered: Called with the number of a query, and its answer.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.relay = self._carried
        self.enforcer.has_host = False
        self.stack.link.stands_for = self._stands_for
        self.serving: Teller | None = None
        self.service = 0
        self.answered: Callable[[int, bytes], object] = _nobody

    def carry(self, serving: Teller, service: int) -> None:
        """Tell the caller's side of flows and queries from now on."""
        self.serving, self.service = serving, service

    def _stands_for(self, packed: bytes) -> bool:
        """Return whether an address is beyond the link, for a guest that has no route to it."""
        address = ip_address(packed)
        local = self._subnet.of(address)
        return local is not None and address not in local.network and is_reachable(address)

    def _carried(self, _: object, connection: TcpConnection, failed: object) -> TcpRelay:
        if self.serving is None:
            return TooEarly(self._engine, connection)
        return CarriedConnection(self.serving, self.service, connection)

    def _relay_for(self, connection: TcpConnection, flow: Flow) -> Callable[..., TcpRelay]:
        found = super()._relay_for(connection, flow)
        if self.serving is not None and isinstance(found, partial):
            return partial(CarriedLook, self.serving, self.service, **found.keywords)
        return found

    def _carry_udp(self, flow: UdpFlow, endpoint: Endpoint) -> Refusal | None:
        if self.serving is None:
            return Refusal.HOST_UNREACHABLE
        return self.serving.wait_udp(self.service, flow, endpoint)

    def open_datagrams(
        self, flow: Flow, target: Target, give: DatagramsTaker, pair: list[socket.socket]
    ) -> None:
        give(Waiting(target.candidates[0]))

    def _carry_echo(self, flow: EchoFlow, endpoint: Endpoint) -> Refusal | None:
        if self.serving is None:
            return Refusal.HOST_UNREACHABLE
        flow.user = Echoes(self.serving, flow, endpoint)
        return None

    def resolved(self, number: int, message: bytes) -> None:
        """Take the answer to a query."""
        self.answered(number, message)

    def echoed(self, number: int, sequence: int, why: Refusal | None) -> None:
        """Answer an echo request, as `Serving.echoed` says."""
        flow = next((each for each in self.stack.echo.values() if each.id == number), None)
        if flow is not None and isinstance(flow.user, Echoes):
            flow.user.answer(sequence, why, self._engine.now)


class TooEarly(TcpRelay):
    """A connection that is opened before the caller's side is there."""

    __slots__ = ()

    def begin(self, dial: Dial) -> None:
        self.refuse(Refusal.HOST_UNREACHABLE)


class Carried(DecidedRelay):
    """A connection that waits for what the caller's side says of it."""

    __slots__ = ()

    _serving: Teller
    service: int

    def begin(self, dial: Dial) -> None:
        if isinstance(dial, Waiting) and self.connection is not None:
            self._serving.flows[self.connection.id] = self
            self._serving.opened(self.service, self.connection, dial.target)
        else:
            super().begin(dial)


class CarriedConnection(Carried, ServedConnection):
    """A `ServedConnection` of the guest's to anywhere."""

    __slots__ = ()


class CarriedLook(Carried, PeekingRelay):
    """A connection whose first bytes decide about it, when the caller's side has let it pass.

    Args:
        serving: What is told how it ends.
        service: The number under which it is told of.
        engine, connection, failed, options: As for `PeekingRelay`.
    """

    __slots__ = ("_flow", "_serving", "service")

    def __init__(
        self,
        serving: Teller,
        service: int,
        engine: Any,
        connection: TcpConnection,
        failed: Any,
        **options: Any,
    ) -> None:
        super().__init__(engine, connection, failed, **options)
        self._serving = serving
        self._flow = connection.id
        self.service = service

    def _made_plain(self) -> TcpRelay:
        assert self.connection is not None
        return ServedConnection(self._serving, self.service, self.connection)

    def _leave(self) -> None:
        plain = self._plain
        if isinstance(plain, ServedConnection) and plain.connection is not None:
            self._serving.flows[self._flow] = plain
        super()._leave()

    def leave(self) -> tuple[TcpConnection, bytes]:
        self._told()
        return super().leave()

    def abort(self, *, reset: bool = False, ending: Ending = "reset by peer") -> None:
        super().abort(reset=reset, ending=ending)
        self._told()

    def closed(self, why: Closed) -> None:
        super().closed(why)
        self._told()

    def _refused(self, why: Refusal | IcmpError) -> None:
        super()._refused(why)
        self._told()

    def _told(self) -> None:
        self._serving.ended(self._flow, self.service, "reset")


class Echoes:
    """The requests of a flow of pings that wait for an answer.

    Args:
        serving: What tells of them.
        flow: The flow.
        target: The address where it leads, and the identifier.
    """

    __slots__ = ("_flow", "_serving", "_target", "_waiting")

    def __init__(self, serving: Teller, flow: EchoFlow, target: Endpoint) -> None:
        self._serving = serving
        self._flow = flow
        self._target = target
        self._waiting: dict[int, bytes] = {}  # payloads by their sequence numbers

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        if sequence in self._waiting:  # whoever floods is answered once
            self._waiting[sequence] = bytes(payload)
        elif len(self._waiting) < KEPT_MOST and self._serving.has_room_for_news:
            self._waiting[sequence] = bytes(payload)
            self._serving.note(Echo(flow.id, sequence, self._target, endpoints_of(flow.key)[0]))

    def answer(self, sequence: int, why: Refusal | None, now: float) -> None:
        """Answer a request that waits, if it does."""
        payload = self._waiting.pop(sequence, None)
        if payload is None:
            return
        if why is None:
            self._flow.reply(sequence, payload, 64, now)
        else:
            self._flow.refuse(why, sequence, payload)

    def expired(self, flow: EchoFlow) -> None:
        self._waiting.clear()


class InMemoryDns(DnsRelay):
    """The DNS server of a gateway whose uplink is in memory: the caller's side is its only resolver.

    Its arguments are those of `DnsRelay`.  It keeps no answers, but remembers the names of addresses.
    """

    entries = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        *_, router = arguments
        assert isinstance(router, InMemoryRouter)
        self._world = router
        self._world.answered = self._resolved
        self._waiting: dict[int, Upstream] = {}

    def _send(self, action: Send) -> bool:
        serving = self._world.serving
        if serving is None or not serving.has_room_for_news:
            return False
        if len(self._waiting) >= QUERIES_MOST:
            del self._waiting[next(iter(self._waiting))]
        number = serving.next_id()
        self._waiting[number] = action.upstream
        serving.note(Question(number, action.message.hex()))
        return True

    def _resolved(self, number: int, message: bytes) -> None:
        """Take the answer to a query that waits."""
        upstream = self._waiting.pop(number, None)
        if upstream is not None:
            self._do(self._server.response(message, upstream, self._engine.now))
            self._wait()


def _nobody(*_: object) -> None:
    """Take nothing."""
