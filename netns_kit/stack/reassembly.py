"""Putting fragments together (RFC 791, RFC 8200 4.5), with RFC 5722's rule for both families:

a fragment that overlaps another one damns the whole packet.  An exact duplicate is only dropped.
Memory is bounded: beyond the bound the oldest incomplete packet goes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .wire import BadPacket, ip
from .wire.family import IPV4

if TYPE_CHECKING:
    from collections import Counter

    from .limits import Limits
    from .timers import Timers

PACKET = 768  # bytes counted for each packet, and
PIECE = 128  # for each of its fragments, beside its own: small ones are not free
QUOTED = 1280  # of the first fragment, for an ICMP error: RFC 4443 2.4 (c)
PIECES = 1500  # of one packet, enough for 64 KiB at an MTU of 68; beyond: as if they overlapped


class _Partial:
    __slots__ = ("born", "bytes", "cost", "damned", "first", "pieces", "total")

    def __init__(self, born: float) -> None:
        self.born = born
        self.pieces: dict[int, bytes] = {}
        self.bytes = 0
        self.cost = PACKET
        self.total: int | None = None
        self.first: ip.Packet | None = None
        self.damned = False


class Reassembly:
    """`add` a fragment; the whole packet comes back with its last one."""

    __slots__ = (
        "_dropped",
        "_held",
        "_lifetime",
        "_limit",
        "_partials",
        "_timers",
        "timer_at",
        "timer_entry",
    )

    def __init__(self, limits: Limits, dropped: Counter[str], timers: Timers) -> None:
        self._limit, self._lifetime = limits.fragments, limits.reassembly
        self._timers = timers
        self.timer_at = self.timer_entry = math.inf
        self._dropped = dropped
        self._partials: dict[tuple[bytes, int, int], _Partial] = {}
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes waiting for the rest of their packet, overhead included."""
        return self._held

    def add(self, packet: ip.Packet, now: float) -> ip.Packet | None:
        """Raises `BadPacket` for a fragment that cannot be part of any packet, or damns one."""
        start, data = packet.fragment_offset, bytes(packet.payload)
        end = start + len(data)
        if packet.more_fragments and (len(data) & 7 or not data):
            raise BadPacket("fragment-length")
        if end > packet.family.longest_payload:
            raise BadPacket("fragment-too-long")
        protocol = (
            packet.protocol if packet.family is IPV4 else 0
        )  # RFC 8200 4.5: first fragments alone name it
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
        overlaps = any(start < at + len(piece) and at < end for at, piece in partial.pieces.items())
        overlaps = overlaps or len(partial.pieces) >= PIECES
        conflicts = partial.total is not None and (end > partial.total or not packet.more_fragments)
        beyond = not packet.more_fragments and any(at + len(p) > end for at, p in partial.pieces.items())
        if overlaps or conflicts or beyond:
            self._held -= partial.cost - PACKET
            partial.pieces.clear()
            partial.first = None
            partial.cost, partial.damned = PACKET, True
            raise BadPacket("fragment-overlap")
        partial.pieces[start] = data
        partial.bytes += len(data)
        partial.cost += len(data) + PIECE
        self._held += len(data) + PIECE
        if not packet.more_fragments:
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
        if partial.bytes == partial.total and partial.first is not None:
            self._drop(key)
            partial.first.payload = memoryview(b"".join(partial.pieces[at] for at in sorted(partial.pieces)))
            return partial.first
        while self._held > self._limit:
            self._dropped["limit-fragments"] += 1
            self._drop(next(iter(self._partials)))
        return None

    def handle_timer(self, now: float) -> None:
        """Packets that have waited too long are given up."""
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
