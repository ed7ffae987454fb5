"""Events: what happens to flows, and which names are refused, kept for those who follow.

A subscriber has a number and a queue of events.  `tell` is called once when its queue is no longer empty, and again
only after the subscriber has taken the events (`Events.take`).  A slow subscriber does not delay the engine: when its
queue is full, the oldest event is dropped, and the next one says how many were.  Without subscribers the stack has no
watcher, so that events cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import starmap
from time import time
from typing import Literal, TypeAlias

from netns_kit.arguments import Address
from netns_kit.dns.message import Rcode, type_name
from netns_kit.domain_names import to_text
from netns_kit.frozen import frozen, replace
from netns_kit.gateway.beside import FlowBeside
from netns_kit.gateway.enforcer import ruling_of
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.namespace.process_info import ProcessInfo
from netns_kit.operations import chained, operation, same
from netns_kit.stack import AnyFlow, EchoFlow, Ending, IcmpError, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import Transport, ending_of
from netns_kit.uplink.flow import Endpoint

EVENTS_KEPT = 4096  # for each subscriber

FlowEventKind = Literal["opened", "refused", "closed", "open"]
"""The kind of a change in the life of a flow: see `FlowEvent`."""


@frozen
class FlowEvent:
    """A change in the life of a flow."""

    kind: FlowEventKind
    """The change.  Each flow has two events.  The first is "opened": its first packet has arrived, or a client of a
    forwarded port has connected.  The last is "refused" or "closed".  A flow is refused by the policy, by its
    destination, or for lack of descriptors; an inbound flow is refused by the guest, if nothing there listens or
    answers.  What a policy with `audit` would have refused has a third event between the two.  In a log, "open" is a
    flow that was under way when the log was ended."""
    flow: FlowInfo
    """The flow at that moment.  The last event has the number of all bytes that it has carried."""
    refusal: Refusal | None = None
    """The reason of a "refused" event.  None if the flow was refused by an ICMP error of another host."""
    missed: int = 0
    """The number of events that were lost just before this one."""
    audit: bool = False
    """True for a "refused" event of a flow that was let pass all the same, since the policy only audits."""
    process: ProcessInfo | None = None
    """The process inside that has opened the flow; None unless it was asked for, and could be found."""
    ended: Ending | None = None
    """The way in which the flow of a "closed" event has ended."""
    time: float = 0.0
    """The time of the event, in seconds since the epoch."""

    @property
    def rule(self) -> str | None:
        """The rule that has decided about the flow, see `FlowInfo.rule`."""
        return self.flow.rule

    def as_dict(self) -> dict[str, object]:
        """Return the event as plain data, which is the same as a line of `UserStack.log_events`."""
        flow, process = self.flow, self.process
        return {
            "time": round(self.time, 6),
            "kind": self.kind,
            "id": flow.id,
            "protocol": flow.protocol,
            "direction": flow.direction,
            **_plain("guest", flow.guest),
            **_plain("remote", flow.remote),
            "name": flow.name,
            **_plain("host", flow.host),
            "rule": flow.rule,
            "refusal": None if self.refusal is None else self.refusal.value,
            "audit": self.audit,
            "process": None
            if process is None
            else {name: getattr(process, name) for name in ProcessInfo.__match_args__},
            "bytes_from_guest": flow.bytes_from_guest,
            "bytes_to_guest": flow.bytes_to_guest,
            "age": round(flow.age, 6),
            "ended": self.ended,
        }


@frozen
class QueryEvent:
    """A DNS query that the policy has refused."""

    kind: Literal["refused"]
    """The kind of the event."""
    name: str
    """The name that was asked for, as a zone file has it."""
    type: str
    """The type that was asked for, like "AAAA"."""
    client: IPv4Address | IPv6Address
    """The address in the namespace that has asked."""
    rule: str | None
    """The rule that has refused it."""
    rcode: str
    """The result code of the answer, like "NXDOMAIN"."""
    audit: bool = False
    """True for a query that was answered all the same, since the policy only audits."""
    missed: int = 0
    """The number of events that were lost just before this one."""
    time: float = 0.0
    """The time of the event, in seconds since the epoch."""

    def as_dict(self) -> dict[str, object]:
        """Return the event as plain data, which is the same as a line of `UserStack.log_events`."""
        return {
            "time": round(self.time, 6),
            "kind": self.kind,
            "protocol": "dns",
            "guest": str(self.client),
            "name": self.name,
            "type": self.type,
            "rule": self.rule,
            "rcode": self.rcode,
            "audit": self.audit,
        }


Event: TypeAlias = FlowEvent | QueryEvent
"""What `UserStack.events` yields."""


def under_way(flow: FlowInfo, process: ProcessInfo | None) -> FlowEvent:
    """Return the event of a flow that is under way now."""
    return FlowEvent("open", flow, process=process, time=time())


class Events:
    """The subscribers of one stack, and its `Watcher` while there are any.

    Args:
        gateway: Gateway whose flows are followed.
        tell: Called, by the engine's driver, with the number of a subscriber whose queue is no longer empty.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self._gateway = gateway
        self._tell = tell
        self._queues: dict[int, _Queue] = {}
        self._refused: set[int] = set()  # ids of flows that are not closed yet, but were said to be refused

    @operation(same)
    def subscribe(self, number: int, guests: tuple[Address, ...] = ()) -> None:
        """Begin to queue events for the subscriber `number`: those of the guests with these addresses; none: all."""
        self._queues[number] = _Queue(lambda: self._tell(number), frozenset(guests))
        self._gateway.watcher = self

    @operation(chained)
    def take(self, number: int) -> tuple[FlowEvent | QueryEvent, ...]:
        """Return the events since the last call, and empty the queue."""
        return self._queues[number].take()

    @operation(same)
    def unsubscribe(self, number: int) -> None:
        """Stop queueing events for that subscriber."""
        self._queues.pop(number, None)
        if not self._queues:
            self.close()

    def close(self) -> None:
        """Stop watching the stack."""
        self._gateway.watcher = None
        self._refused.clear()

    # -- the watcher ----------------------------------------------------------------------------------

    def opened(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        self._happened("opened", transport, flow)

    def refused(self, transport: Transport, flow: AnyFlow | FlowBeside, why: Refusal | IcmpError) -> None:
        self._refused.add(flow.id)
        self._happened("refused", transport, flow, why)

    def closed(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        if flow.id in self._refused:
            self._refused.remove(flow.id)
        else:
            if isinstance(flow, TcpConnection | UdpFlow | EchoFlow):
                ended = ending_of(transport, flow)
            else:
                ended = flow.ending
            self._happened("closed", transport, flow, ended=ended)

    def let_pass(self, transport: Transport, flow: AnyFlow | FlowBeside, why: Refusal) -> None:
        self._happened("refused", transport, flow, why, audit=True)

    def query_refused(
        self, name: bytes, kind: int, client: bytes, rule: str | None, rcode: int, *, audit: bool
    ) -> None:
        client_address = ip_address(client)
        self._put(
            QueryEvent(
                "refused",
                to_text(name),
                type_name(kind),
                client_address,
                rule,
                Rcode(rcode).name,
                audit,
                time=time(),
            )
        )

    def _happened(
        self,
        kind: FlowEventKind,
        transport: Transport,
        flow: AnyFlow | FlowBeside,
        why: Refusal | IcmpError | None = None,
        *,
        audit: bool = False,
        ended: Ending | None = None,
    ) -> None:
        refusal = why if isinstance(why, Refusal) else None
        info = self._gateway.info(transport, flow, kind)
        event = FlowEvent(kind, info, refusal, audit=audit, ended=ended, time=time())
        self._put(event, flow if kind == "opened" else None)

    def _put(self, event: Event, opened: AnyFlow | FlowBeside | None = None) -> None:
        for queue in self._queues.values():
            queue.put(event, opened)


class _Queue:
    """The events of one subscriber.  `tell` is called for the first event after each `take`.

    A flow is opened before it is decided about.  So what has decided is looked up when the event is taken.
    """

    def __init__(self, tell: Callable[[], None], guests: frozenset[Address]) -> None:
        self._guests = guests
        self._events: deque[tuple[Event, AnyFlow | FlowBeside | None]] = deque()
        self._missed = 0
        self._tell = tell

    def put(self, event: Event, opened: AnyFlow | FlowBeside | None) -> None:
        if self._guests:
            guest = event.client if isinstance(event, QueryEvent) else event.flow.guest.address
            if guest not in self._guests:
                return
        if not self._events:
            self._tell()
        elif len(self._events) >= EVENTS_KEPT:
            self._events.popleft()
            self._missed += 1
        self._events.append((event, opened))

    def take(self) -> tuple[Event, ...]:
        events, missed = tuple(starmap(_ruled, self._events)), self._missed
        self._events.clear()
        self._missed = 0
        return (replace(events[0], missed=missed), *events[1:]) if missed else events


def _ruled(event: Event, opened: AnyFlow | FlowBeside | None) -> Event:
    """Return the event with the rule by which the flow was decided since then."""
    ruling = None if opened is None else ruling_of(opened)
    if ruling is None or isinstance(event, QueryEvent):
        return event
    flow = replace(event.flow, rule=ruling.rule, name=ruling.name_or(event.flow.name))
    return replace(event, flow=flow)


def _plain(name: str, endpoint: Endpoint | None) -> dict[str, object]:
    """Return an endpoint as two items of a dictionary."""
    if endpoint is None:
        return {name: None, f"{name}_port": None}
    return {name: str(endpoint.address), f"{name}_port": endpoint.port}
