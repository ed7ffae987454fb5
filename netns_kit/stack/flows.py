"""FlowTable: the flows of one transport, from the first packet to the end.

A flow is in its table from the moment it is made until it is closed: by its user, by its timer, or to make room.  The
table tells the `Watcher` of both moments, and of a refusal between them.

UDP and ping flows have no end of their own.  Such a flow (`IdleFlow`) is closed when it has been idle for its
`lifetime`.  It is also closed if its table (`IdleTable`) is full and it is the flow that has been idle longest.

Using a flow costs one assignment to `last`.  Which flow has been idle longest is only found out when room is needed.
All flows are then sorted by `last` into a list.  From then on, the next flow of the list whose `last` has not changed
is closed.  When the list is used up, the flows are sorted again.  So the cost of closing flows is bounded by the
number of packets since the last sorting.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from .network_layer import NetworkLayer
from .user import NOBODY, UNWATCHED, Ending, IcmpError, Refusal, Transport, Watcher
from .wire import ip

if TYPE_CHECKING:
    from .echo import EchoFlow
    from .udp import UdpFlow
    from .user import AnyFlow

F = TypeVar("F", bound="AnyFlow")
G = TypeVar("G", bound="UdpFlow | EchoFlow")


class FlowTable(dict[bytes, F]):
    """The flows of one transport by their keys, and the parts of the stack that they use."""

    def __init__(self, transport: Transport, network: NetworkLayer, limit: int) -> None:
        super().__init__()
        self.transport = transport
        self.limit = limit
        self.watcher: Watcher = UNWATCHED
        self.network = network
        self.link, self.packets = network.link, network.packets
        self.limits, self.timers, self.dropped = network.limits, network.timers, network.dropped
        self.flow_ids = network.flow_ids

    def add(self, flow: F) -> None:
        """Put a flow into the table, and tell the watcher."""
        self[flow.key] = flow
        self.watcher.opened(self.transport, flow)

    def forget(self, flow: F) -> None:
        """Take a flow out of the table, and tell the watcher.  If another flow has its key by now, do nothing."""
        if self.get(flow.key) is flow:
            del self[flow.key]
            self.watcher.closed(self.transport, flow)

    def refused(self, flow: F, why: Refusal | IcmpError) -> None:
        """Tell the watcher that a flow is refused; `forget` follows."""
        self.watcher.refused(self.transport, flow, why)


class IdleFlow:
    """A flow that is closed when it has been idle for its `lifetime`.

    `id` is a number that no other flow ever has.  `opened` is the time when the flow was made, and `last` the time
    when it was last used.  `received` and `sent` count the bytes of payload from the guest and to it.  `ruling`
    is what the owner of the stack has decided about the flow; it is not set before.
    """

    __slots__ = (
        "_table", "ending", "id", "key", "last", "opened", "received", "ruling", "sent", "timer_at", "timer_entry",
        "user"
    )  # fmt: skip

    ending: Ending
    ruling: Any

    def __init__(self, table: IdleTable[Any], key: bytes, now: float) -> None:
        self._table = table
        self.key = key
        self.id = next(table.flow_ids)
        self.opened = self.last = now
        self.received = self.sent = 0
        self.user: Any = NOBODY
        self.timer_at = self.timer_entry = math.inf
        table.timers.arm(self, now + self.lifetime)

    @property
    def lifetime(self) -> float:
        """Seconds that the flow may be idle."""
        raise NotImplementedError

    def handle_timer(self, now: float) -> None:
        """Close the flow if it has been idle for its lifetime; otherwise wait for the rest of it."""
        due = self.last + self.lifetime
        if due > now:
            self._table.timers.arm(self, due)
        else:
            self.close()

    def turn_away(self, why: Refusal) -> None:
        """Close a flow that is refused after it was opened.  The guest is not told yet."""
        self._table.refused(self, why)
        self.close()

    def close(self) -> None:
        """Take the flow out of the table, and tell its user.  Calling it again is allowed."""
        self.timer_at = math.inf
        self._table.forget(self)
        user, self.user = self.user, NOBODY
        user.expired(self)

    def end(self, ending: Ending = "ended") -> None:
        """Close a flow for another reason than that it is idle."""
        self.ending = ending
        self.close()


class IdleTable(FlowTable[G]):
    """A `FlowTable` that closes the flow which has been idle longest when it needs room."""

    def __init__(self, transport: Transport, network: NetworkLayer, limit: int) -> None:
        super().__init__(transport, network, limit)
        self._idle: deque[tuple[float, bytes]] = deque()  # the sorted list: `last` and key of each flow

    def evict(self, spare: bytes = b"") -> None:
        """Close the flow that has been idle longest, other than the one with the key `spare`."""
        for _ in range(2):  # if the list is used up, once more with a new list
            while self._idle:
                last, key = self._idle.popleft()
                flow = self.get(key)
                if flow is not None and flow.last == last and key != spare:
                    flow.end("made room")
                    return
            self._idle.extend(sorted((flow.last, key) for key, flow in self.items()))

    def turn_away(self, flow: G, why: Refusal, packet: ip.Packet) -> None:
        """Close a flow that its user has refused, and tell the guest, about the packet that has opened the flow."""
        self.refused(flow, why)
        flow.close()
        self.packets.error(packet.whole, why, by=packet.destination)
