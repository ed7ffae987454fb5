"""Control: what people may ask of a stack that runs, on the engine's side.

`Control` lives beside the `Gateway`, on the driver's thread or in the worker's process, and owns the listeners.  An
*operation* is one of its public methods, known by its name; its arguments and its result are plain (see
`netns_kit.child.codec`), because a socket may lie between it and who asks.  Drivers call an operation between two
steps of the engine.

Events.  Whoever wants to follow flows subscribes under a number, is told once that there is news (`tell`), and takes
it; then he is told again.  Nobody's slowness holds the engine: of a full queue the oldest events are lost, and
the next says how many.  While nobody listens nothing is done for it, but for one look per flow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from netns_kit.arguments import Address
from netns_kit.dhcp import Lease, StaticLease
from netns_kit.dns import Record
from netns_kit.forwarder.listeners import Listener, TcpListener, UdpListener
from netns_kit.forwarder.ports import PortForward
from netns_kit.frozen import frozen, replace
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.stack import AnyFlow, IcmpError, Refusal
from netns_kit.stack.user import UNWATCHED, Transport

EVENTS_KEPT = 4096  # for each subscriber
PATIENCE = (
    2.0  # seconds that cleaning up waits for an engine that does not answer: what is left ends with the stack
)

FlowEventKind = Literal["opened", "refused", "closed"]


@frozen
class FlowEvent:
    """Something that happened to a flow.

    `kind` is "opened": its first packet is here, or a client of a forwarded port.  Then, in the end, "refused":
    turned away, by the uplink, by what it wanted to reach, or for want of descriptors; if it is inbound, by the
    guest, where nobody listens or answers; or else "closed".  `refusal` says how it was refused; None if an ICMP
    error did: from further on, which the guest was told, or from the guest itself.  `missed` is how many events were
    lost just before this one.  `flow` is the flow at that moment: in its last event are all the bytes that it has
    carried.
    """

    kind: Literal["opened", "refused", "closed"]
    flow: FlowInfo
    refusal: Refusal | None = None
    missed: int = 0


class Control:
    """Made with a gateway that it will close; `tell` is called, on the engine's side, with the number of a subscriber
    for whom there is news.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self.gateway = gateway
        self._tell = tell
        self._listeners: dict[tuple[int, PortForward], Listener] = {}  # by owner and what he asked for
        self._watch = _Watch(gateway)

    def flows(self) -> tuple[FlowInfo, ...]:
        """All flows under way."""
        return self.gateway.flows()

    def end_flow(self, number: int) -> bool:
        """End the flow of that id; whether there is one."""
        return self.gateway.end_flow(number)

    def names(self, addresses: tuple[Address, ...]) -> tuple[str | None, ...]:
        """What these addresses are called, as far as is known here: see `FlowInfo.name`."""
        return tuple(self.gateway.name_of(address) for address in addresses)

    def stats(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return self.gateway.stats()

    def leases(self) -> tuple[Lease, ...]:
        """All leases of DHCP."""
        return self.gateway.leasing.leases(self.gateway.engine.now)

    def reserve_lease(self, static: StaticLease) -> None:
        """Keep an address for one client.  Raises `AddressError`."""
        self.gateway.leasing.reserve(static)

    def revoke_lease(self, address: Address) -> bool:
        """Take a lease away; whether there was one."""
        return self.gateway.leasing.revoke(address, self.gateway.engine.now)

    def add_forwards(self, owner: int, forwards: tuple[PortForward, ...]) -> tuple[PortForward, ...]:
        """Listen on all of these, or on none; what is listening, with the port that the kernel has chosen.

        Raises `PortInUseError`, `AddressError` and OSError.
        """
        made: list[Listener] = []
        try:
            for forward in forwards:
                kind = TcpListener if forward.protocol == "tcp" else UdpListener
                made.append(kind(self.gateway, forward))
        except BaseException:
            for listener in made:
                listener.close()
            raise
        self._listeners |= {(owner, listener.forward): listener for listener in made}
        return tuple(listener.forward for listener in made)

    def remove_forward(self, owner: int, forward: PortForward) -> bool:
        """Stop listening; whether there was one like that."""
        listener = self._listeners.pop((owner, forward), None)
        if listener is not None:
            listener.close()
        return listener is not None

    def forwards(self, owner: int) -> tuple[PortForward, ...]:
        """What listens for this owner, oldest first."""
        return tuple(forward for whose, forward in self._listeners if whose == owner)

    def close_forwards(self, owner: int) -> None:
        """Stop all listening for this owner."""
        for forward in self.forwards(owner):
            self.remove_forward(owner, forward)

    def add_record(self, record: Record) -> None:
        """Own the record's name, and answer for it, from now on."""
        self.gateway.zone.add(record)

    def remove_records(self, name: str, kind: str, value: str) -> int:
        """Forget what is said of `name`, of that type and value if they are not empty; how many records it was."""
        return self.gateway.zone.remove(name, kind, value)

    def records(self) -> tuple[Record, ...]:
        """What is said of the names that are ours."""
        return self.gateway.zone.records()

    def subscribe(self, number: int) -> None:
        """Keep events for the subscriber of that number from now on."""
        self._watch.queues[number] = _Queue(lambda: self._tell(number))
        self.gateway.stack.watcher = self._watch

    def take_events(self, number: int) -> tuple[FlowEvent, ...]:
        """What has happened since this was last asked."""
        return self._watch.queues[number].take()

    def unsubscribe(self, number: int) -> None:
        """Keep no more for that subscriber."""
        self._watch.queues.pop(number, None)
        if not self._watch.queues:
            self.gateway.stack.watcher = UNWATCHED

    def close(self) -> None:
        """End everything: listeners, connections, sockets.  Not to be called over a socket."""
        self.gateway.stack.watcher = UNWATCHED
        while self._listeners:
            self._listeners.popitem()[1].close()
        self.gateway.close()


OPERATIONS = frozenset(name for name in vars(Control) if not name.startswith("_") and name != "close")
"""What may be asked over a socket, by name."""


class _Queue:
    """The events of one subscriber, who is told of the first that comes after he has taken what there was."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._events: deque[FlowEvent] = deque()
        self._missed = 0
        self._tell = tell

    def put(self, event: FlowEvent) -> None:
        if not self._events:
            self._tell()
        elif len(self._events) >= EVENTS_KEPT:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)

    def take(self) -> tuple[FlowEvent, ...]:
        events, missed = tuple(self._events), self._missed
        self._events.clear()
        self._missed = 0
        return (replace(events[0], missed=missed), *events[1:]) if missed else events


class _Watch:
    """The stack's `Watcher`, while somebody subscribes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._refused: AnyFlow | None = None  # its end has been told of
        self.queues: dict[int, _Queue] = {}

    def opened(self, transport: Transport, flow: AnyFlow) -> None:
        self._happened("opened", transport, flow)

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
        self._refused = flow
        self._happened("refused", transport, flow, why if isinstance(why, Refusal) else None)

    def closed(self, transport: Transport, flow: AnyFlow) -> None:
        refused, self._refused = self._refused, None
        if refused is not flow:
            self._happened("closed", transport, flow)

    def _happened(
        self, kind: FlowEventKind, transport: Transport, flow: AnyFlow, refusal: Refusal | None = None
    ) -> None:
        event = FlowEvent(kind, self._gateway.info(transport, flow, kind), refusal)
        for queue in self.queues.values():
            queue.put(event)
