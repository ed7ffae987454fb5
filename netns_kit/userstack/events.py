"""Events: what happens to flows, kept for those who follow them.

Whoever wants to follow flows subscribes under a number, is told once that there is news (`tell`), and takes it; then
the next news is told.  A slow subscriber does not hold up the engine: of a full queue the oldest events are lost, and
the next one says how many.  Without subscribers the stack has no watcher.
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


@frozen
class FlowEvent:
    """A change in the life of a flow."""

    kind: Literal["opened", "refused", "closed"]
    """The change.  "opened": the flow's first packet is here, or a client of a forwarded port.  Then, in the
    end, "refused": turned away, by the uplink, by what it wanted to reach, or for want of descriptors; an inbound
    flow, by the guest, where nobody listens or answers.  Or else "closed"."""
    flow: FlowInfo
    """The flow at that moment: in its last event are all the bytes that it has carried."""
    refusal: Refusal | None = None
    """The refusal, of an event of that kind.  None if it was an ICMP error, from further on or from the guest."""
    missed: int = 0
    """The number of events that were lost just before this one."""


class Events:
    """The subscribers of one stack, and its `Watcher` while there are any.

    Args:
        gateway: Knows the flows.
        tell: Called on the engine's side with the number of a subscriber for whom there is news.
    """

    def __init__(self, gateway: Gateway, tell: Callable[[int], None]) -> None:
        self._gateway = gateway
        self._tell = tell
        self._queues: dict[int, _Queue] = {}
        self._refused: AnyFlow | None = None  # the flow whose end has been told

    @operation(same)
    def subscribe(self, number: int) -> None:
        """Keep events for the subscriber of that number from now on."""
        self._queues[number] = _Queue(lambda: self._tell(number))
        self._gateway.stack.watcher = self._gateway.watcher = self

    @operation(chained)
    def take(self, number: int) -> tuple[FlowEvent, ...]:
        """Return what has happened since this was last asked."""
        return self._queues[number].take()

    @operation(same)
    def unsubscribe(self, number: int) -> None:
        """Keep no more for that subscriber."""
        self._queues.pop(number, None)
        if not self._queues:
            self.close()

    def close(self) -> None:
        """Watch no more."""
        self._gateway.stack.watcher, self._gateway.watcher = UNWATCHED, None

    def opened(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        self._happened("opened", transport, flow)

    def refused(self, transport: Transport, flow: AnyFlow, why: Refusal | IcmpError) -> None:
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
    """The events of one subscriber, who is told of the first that comes after a `take`."""

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
