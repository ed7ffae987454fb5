"""TimeWait: what is left of a connection that both ends have closed (TIME-WAIT, RFC 9293 3.6).

Its only task is to acknowledge the guest's FIN again if our ACK was lost.  That takes two sequence numbers and a
timestamp, so a record is a few packed bytes and not a `TcpConnection`.  A guest that closes thousands of connections
thus leaves no objects for the garbage collector of the process to visit.

All records live equally long.  The table is in the order in which they end, and one timer serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

from . import seq
from .wire.tcp import ACK, FIN, RST, STAMP, SYN, Segment, pack_stamp, parse_options, ticks

if TYPE_CHECKING:
    from collections import Counter

    from .limits import Limits
    from .timers import Timers

_RECORD = Struct("=dII")  # end, SND.NXT, RCV.NXT; then follows `TcpConnection.stamp`


class TimeWait:
    """The connections in TIME-WAIT, by their keys.

    `acknowledge` is called to send an ACK without payload.  Its arguments are key, sequence number, acknowledgement
    number, flags and options.
    """

    __slots__ = ("_acknowledge", "_dropped", "_limits", "_timers", "records", "timer_at", "timer_entry")

    def __init__(
        self,
        limits: Limits,
        dropped: Counter[str],
        timers: Timers,
        acknowledge: Callable[[bytes, int, int, int, bytes], None],
    ) -> None:
        self._limits = limits
        self._dropped = dropped
        self._timers = timers
        self._acknowledge = acknowledge
        self.records: dict[bytes, bytes] = {}  # by key, the one that ends first in front
        self.timer_at = self.timer_entry = math.inf

    def __len__(self) -> int:
        return len(self.records)

    def add(self, key: bytes, snd_nxt: int, rcv_nxt: int, stamp: bytes, now: float) -> None:
        """Keep a connection for 2 MSL from `now`.  Beyond the limit the oldest one is forgotten."""
        until = now + self._limits.tcp_time_wait
        if len(self.records) >= self._limits.tcp_time_waits:
            self._dropped["limit-tcp-time-waits"] += 1
            del self.records[next(iter(self.records))]
        self.records[key] = _RECORD.pack(until, snd_nxt, rcv_nxt) + stamp
        if self.timer_at == math.inf:
            self._timers.arm(self, until)

    def discard(self, key: bytes) -> None:
        """Forget a connection, if it is here, since its key is used again."""
        self.records.pop(key, None)

    def segment_arrives(self, key: bytes, segment: Segment, now: float) -> bool:
        """Handle a segment of a connection that is here.  Return False if there is none.

        A SYN with a higher sequence number or a newer timestamp ends the record (RFC 6191).  The result is then
        False, so that it opens a new connection.
        """
        record = self.records.get(key)
        if record is None:
            return False
        _, snd_nxt, rcv_nxt = _RECORD.unpack_from(record)
        stamp, flags = record[_RECORD.size :], segment.flags
        recent = int.from_bytes(stamp[len(STAMP) :], "big")
        if flags & (SYN | ACK | RST) == SYN:
            offered = parse_options(segment.options).stamp if stamp else None
            if seq.less(rcv_nxt, segment.seq) or (offered is not None and seq.less(recent, offered[0])):
                del self.records[key]
                return False
        if flags & RST:
            if segment.seq == rcv_nxt:
                del self.records[key]
            return True
        expected = segment.seq == rcv_nxt and not segment.length
        if flags & FIN and not expected:  # our ACK was lost: 2 MSL begin again
            del self.records[key]
            self.add(key, snd_nxt, rcv_nxt, stamp, now)
        if not expected or (flags & ACK and seq.less(snd_nxt, segment.ack)):
            options = pack_stamp(ticks(now), recent) if stamp else b""
            self._acknowledge(key, snd_nxt, rcv_nxt, ACK, options)
        return True

    def handle_timer(self, now: float) -> None:
        """Forget the connections whose time is over."""
        records = self.records
        while records:
            key = next(iter(records))
            until, _, _ = _RECORD.unpack_from(records[key])
            if until > now:
                self._timers.arm(self, until)
                return
            del records[key]
