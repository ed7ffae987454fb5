"""FlowTable: the flows of one transport, from the first packet to the end.

Theory of operation.  A flow is in its table from the moment it is made until it is closed: by its user, by its timer,
or to make room.  `Watcher` is told of both moments here, and of a refusal between them.

A flow that has no end of its own, of UDP or of pings, ends when it has been idle for its `lifetime` (`IdleFlow`), or
when its table (`IdleTable`) needs its place: beyond the limit, the flow that has been idle longest is closed.  To use
a flow costs one assignment, to its `last`.  Which flow is idle longest is found out when room is needed: all flows
are sorted by `last`, and are closed in that order, but for those that were used since; after the last of them they
are sorted again.  So the work for a flow that is closed is bounded by the packets that have come since the last
sorting.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from .network_layer import NetworkLayer
from .user import NOBODY, UNWATCHED, IcmpError, Refusal, Transport, Watcher
from .wire import ip

if TYPE_CHECKING:
    from .echo import EchoFlow
    from .udp import UdpFlow
    from .user import AnyFlow

F = TypeVar("F", bound="AnyFlow")
G = TypeVar("G", bound="UdpFlow | EchoFlow")


class FlowTable(dict[bytes, F]):
    """The flows of one transport by their keys, and what they need of the stack that they live in."""

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
        """Put a flow into the table."""
        self[flow.key] = flow
        self.watcher.opened(self.transport, flow)

    def forget(self, flow: F) -> None:
        """Take a flow out of the table, if it is there still: another may have its key by now."""
        if self.get(flow.key) is flow:
            del self[flow.key]
            self.watcher.closed(self.transport, flow)

    def refused(self, flow: F, why: Refusal | IcmpError) -> None:
        """Tell the watcher that a flow is turned away; `forget` follows."""
        self.watcher.refused(self.transport, flow, why)


class IdleFlow:
    """A flow that ends when it has been idle for its `lifetime`.

    `id` is this flow's alone, also when another has its key later.  `opened` is when it was made, and `last` when it
    was last used.  `received` and `sent` are bytes of payload, from the guest and to it.
    """

    __slots__ = (
        "_table", "id", "key", "last", "opened", "received", "sent", "timer_at", "timer_entry", "user"
    )  # fmt: skip

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
        """Seconds that it may be idle."""
        raise NotImplementedError

    def handle_timer(self, now: float) -> None:
        """Close the flow if it has been idle for its time, else wait for the rest of it."""
        due = self.last + self.lifetime
        if due > now:
            self._table.timers.arm(self, due)
        else:
            self.close()

    def close(self) -> None:
        """Take the flow out of the table, and tell its user.  Again is fine."""
        self.timer_at = math.inf
        self._table.forget(self)
        user, self.user = self.user, NOBODY
        user.expired(self)


class IdleTable(FlowTable[G]):
    """A `FlowTable` in which the flow that has been idle longest makes room."""

    def __init__(self, transport: Transport, network: NetworkLayer, limit: int) -> None:
        super().__init__(transport, network, limit)
        self._idle: deque[tuple[float, bytes]] = deque()  # `last` and key of those sorted that are left

    def evict(self, spare: bytes = b"") -> None:
        """Close the flow that has been idle longest, but for the one of the key `spare`."""
        for _ in range(2):  # at the second time all are as they were sorted
            while self._idle:
                last, key = self._idle.popleft()
                flow = self.get(key)
                if flow is not None and flow.last == last and key != spare:
                    flow.close()
                    return
            self._idle.extend(sorted((flow.last, key) for key, flow in self.items()))

    def turn_away(self, flow: G, why: Refusal, packet: ip.Packet) -> None:
        """Close a flow that its user has refused, and tell the guest so about the packet that has opened it."""
        self.refused(flow, why)
        flow.close()
        self.packets.error(packet.whole, why, by=packet.destination)
