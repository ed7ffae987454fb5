"""Reassembly: puts fragments together (RFC 791, RFC 8200 4.5).  RFC 5722's rule is used for both families.

If a fragment overlaps another one, the whole packet is discarded.  An exact duplicate is just dropped.  Memory is
bounded: beyond the bound the oldest incomplete packet is dropped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .ranges import RangeSet
from .wire import BadPacket, ip
from .wire.family import IPV4

if TYPE_CHECKING:
    from collections import Counter

    from .limits import Limits
    from .timers import Timers

PACKET = 768  # bytes that each packet counts
PIECE = 128  # bytes that each fragment counts, in addition to its own
QUOTED = 1280  # bytes of the first fragment that are kept for an ICMP error (RFC 4443 2.4 (c))
PIECES = 1500  # fragments of one packet, enough for 64 KiB at an MTU of 68; more are taken for an overlap


class _Partial:
    """An incomplete packet."""

    __slots__ = ("arrived", "born", "cost", "damned", "first", "pieces", "total")

    def __init__(self, born: float) -> None:
        self.born = born
        self.pieces: dict[int, bytes] = {}  # by offset
        self.arrived = RangeSet()
        self.cost = PACKET
        self.total: int | None = None  # bytes, once the last fragment has come
        self.first: ip.Packet | None = None
        self.damned = False

    @property
    def is_complete(self) -> bool:
        """Whether every byte has arrived."""
        arrived = self.arrived
        return (
            self.first is not None and len(arrived) == 1 and (arrived.start, arrived.end) == (0, self.total)
        )


class Reassembly:
    """The incomplete packets of a stack."""

    __slots__ = (
        "_dropped", "_held", "_lifetime", "_limit", "_partials", "_timers", "timer_at", "timer_entry"
    )  # fmt: skip

    def __init__(self, limits: Limits, dropped: Counter[str], timers: Timers) -> None:
        self._limit, self._lifetime = limits.fragments, limits.reassembly
        self._timers = timers
        self.timer_at = self.timer_entry = math.inf
        self._dropped = dropped
        self._partials: dict[tuple[bytes, int, int], _Partial] = {}
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes that incomplete packets occupy, overhead included."""
        return self._held

    def add(self, packet: ip.Packet, now: float) -> ip.Packet | None:
        """Add a fragment, and return the packet if it is now complete.

        Raises:
            BadPacket: The fragment is malformed, or overlaps another one.
        """
        start, data = packet.fragment_offset, bytes(packet.payload)
        end = start + len(data)
        if packet.more_fragments and (len(data) & 7 or not data):
            raise BadPacket("fragment-length")
        if end > packet.family.longest_payload:
            raise BadPacket("fragment-too-long")
        protocol = packet.protocol if packet.family is IPV4 else 0  # RFC 8200 4.5: only the first one has it
        key = (packet.addresses, protocol, packet.identification)
        partial = self._partials.get(key)
        if partial is None:
            partial = self._partials[key] = _Partial(now)
            self._held += partial.cost
            if self.timer_at == math.inf:
                self._timers.arm(self, now + self._lifetime)
        if partial.damned:
            raise BadPacket("fragment-overlap")
        if partial.pieces.get(start) == data:
            return None
        arrived, more = partial.arrived, packet.more_fragments
        overlaps = arrived.overlaps(start, end) or len(partial.pieces) >= PIECES
        beyond_end = partial.total is not None and (end > partial.total or not more)
        ends_early = not more and len(arrived) > 0 and arrived.end > end
        if overlaps or beyond_end or ends_early:
            self._held -= partial.cost - PACKET
            partial.pieces.clear()
            arrived.clear()
            partial.first = None
            partial.cost, partial.damned = PACKET, True
            raise BadPacket("fragment-overlap")
        partial.pieces[start] = data
        arrived.add(start, end)
        partial.cost += len(data) + PIECE
        self._held += len(data) + PIECE
        if not more:
            partial.total = end
        if start == 0:
            whole = memoryview(bytes(packet.whole[:QUOTED]))
            partial.first = ip.Packet(
                packet.family,
                packet.addresses,
                packet.protocol,
                memoryview(b""),
                whole,
                packet.ttl,
                packet.tos,
            )
        if partial.is_complete and partial.first is not None:
            self._drop(key)
            partial.first.payload = memoryview(b"".join(partial.pieces[at] for at in sorted(partial.pieces)))
            return partial.first
        while self._held > self._limit:
            self._dropped["limit-fragments"] += 1
            self._drop(next(iter(self._partials)))
        return None

    def handle_timer(self, now: float) -> None:
        """Drop the packets that have waited too long."""
        while self._partials:
            key = next(iter(self._partials))
            due = self._partials[key].born + self._lifetime
            if due > now:
                self._timers.arm(self, due)
                break
            self._dropped["fragment-timeout"] += 1
            self._drop(key)

    def _drop(self, key: tuple[bytes, int, int]) -> None:
        self._held -= self._partials.pop(key).cost
