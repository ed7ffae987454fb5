"""Events: what happens to flows, kept for those who follow them.

A subscriber has a number and a queue of events.  `tell` is called once when its queue is no longer empty, and again
only after the subscriber has taken the events (`Events.take`).  A slow subscriber does not delay the engine: when its
queue is full, the oldest event is dropped, and the next one says how many were.  Without subscribers the stack has no
watcher, so that events cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from netns_kit.frozen import frozen, replace
from netns_kit.gateway.beside import FlowBeside
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.operations import chained, operation, same
from netns_kit.stack import AnyFlow, IcmpError, Refusal
from netns_kit.stack.user import UNWATCHED, Transport

EVENTS_KEPT = 4096  # for each subscriber

FlowEventKind = Literal["opened", "refused", "closed"]
"""The kind of a change in the life of a flow: see `FlowEvent`."""


@frozen
class FlowEvent:
    """A change in the life of a flow."""

    kind: FlowEventKind
    """The change.  Each flow has two events.  The first is "opened": its first packet has arrived, or a client of a
    forwarded port has connected.  The last is "refused" or "closed".  A flow is refused by the uplink, by its
    destination, or for lack of descriptors; an inbound flow is refused by the guest, if nothing there listens or
    answers."""
    flow: FlowInfo
    """The flow at that moment.  The last event has the number of all bytes that it has carried."""
    refusal: Refusal | None = None
    """The reason of a "refused" event.  None if the flow was refused by an ICMP error of another host."""
    missed: int = 0
    """The number of events that were lost just before this one."""


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
        self._refused: AnyFlow | FlowBeside | None = None  # the flow whose end has been told

    @operation(same)
    def subscribe(self, number: int) -> None:
        """Begin to queue events for the subscriber `number`."""
        self._queues[number] = _Queue(lambda: self._tell(number))
        self._gateway.stack.watcher = self._gateway.watcher = self

    @operation(chained)
    def take(self, number: int) -> tuple[FlowEvent, ...]:
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
        self._gateway.stack.watcher, self._gateway.watcher = UNWATCHED, None

    def opened(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        self._happened("opened", transport, flow)

    def refused(self, transport: Transport, flow: AnyFlow | FlowBeside, why: Refusal | IcmpError) -> None:
        self._refused = flow
        self._happened("refused", transport, flow, why if isinstance(why, Refusal) else None)

    def closed(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        refused, self._refused = self._refused, None
        if refused is not flow:
            self._happened("closed", transport, flow)

    def _happened(
        self,
        kind: FlowEventKind,
        transport: Transport,
        flow: AnyFlow | FlowBeside,
        refusal: Refusal | None = None,
    ) -> None:
        event = FlowEvent(kind, self._gateway.info(transport, flow, kind), refusal)
        for queue in self._queues.values():
            queue.put(event)


class _Queue:
    """The events of one subscriber.  `tell` is called for the first event after each `take`."""

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
