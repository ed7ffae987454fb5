"""The two halves of a TCP connection: what we send and what we receive (RFC 9293 3.3.1).

They keep the numbers and the bytes behind them; `netns_kit.stack.tcp` decides what they mean.
"""

from __future__ import annotations

import math
from collections import deque

from .rto import RetransmissionTimeout
from .seq import MASK, add, distance, less

_NO_PAYLOAD = memoryview(b"")


class SendHalf:
    """Towards the guest: SND of 3.3.1, and the bytes behind it."""

    __slots__ = (
        "blocked",
        "burst",
        "congestion",
        "duplicates",
        "fin",
        "iss",
        "max",
        "mss",
        "nxt",
        "queue",
        "recover",
        "retries",
        "rto",
        "scale",
        "timed",
        "timed_at",
        "una",
        "wl1",
        "wnd",
        "wnd_max",
    )

    def __init__(self, iss: int, mss: int) -> None:
        self.iss = iss
        self.una = iss  # oldest unacknowledged
        self.nxt = iss  # next to send; behind `max` while going back after a timeout
        self.max = iss  # one past the last ever sent
        self.wnd = 0
        self.wnd_max = 0
        self.wl1 = 0  # at most RCV.NXT; WL2 is not needed, since SND.UNA never lies before it
        self.scale = 0
        self.mss = mss
        self.burst = mss
        self.queue: deque[tuple[int, bytes]] = deque()  # (sequence number, bytes), from `una` to `max`
        self.fin: int | None = None  # the sequence number of our FIN
        self.blocked = False  # the user found no room and waits to be told
        self.rto = RetransmissionTimeout()
        self.retries = 0
        self.timed: int | None = None  # an ACK of this number ends the round trip that began at `timed_at`
        self.timed_at = 0.0
        self.duplicates = 0
        self.recover: int | None = None  # RFC 6582: recovering until this is acknowledged
        self.congestion: float = math.inf  # a bound on flight, in bytes, only after a timeout

    @property
    def flight(self) -> int:
        return (self.max - self.una) & MASK

    def acknowledge(self, ack: int, now: float) -> None:
        """`ack` lies in (una, max]: forget what it covers."""
        queue = self.queue
        self.congestion += 2 * distance(self.una, ack)
        self.una = ack
        while queue and distance(queue[0][0], ack) >= len(queue[0][1]) and not less(ack, queue[0][0]):
            queue.popleft()
        if less(self.nxt, ack):
            self.nxt = ack
        if self.timed is not None and not less(ack, self.timed):
            self.rto.sample(now - self.timed_at)
            self.timed = None
        self.duplicates = 0
        if self.retries:
            self.retries = 0
            self.rto.settle()

    def at(self, position: int) -> memoryview:
        """The queued bytes from `position` to the end of the chunk it lies in."""
        for start, data in self.queue:
            offset = distance(start, position)
            if offset < len(data):
                return memoryview(data)[offset:]
        return _NO_PAYLOAD


class ReceiveHalf:
    """From the guest: RCV of 3.3.1, and the bytes before it that the user has not taken."""

    __slots__ = ("ack", "fin", "held", "later", "nxt", "scale", "wnd")

    def __init__(self, wnd: int) -> None:
        self.nxt = 0  # next expected
        self.ack = 0  # next to be taken by the user; what we acknowledge
        self.wnd = wnd  # the window, counted from `ack`
        self.scale = 0
        self.held: deque[memoryview] = deque()  # from `ack` to `nxt`
        self.later: list[tuple[int, bytearray, bool]] = []  # beyond a hole: number, bytes, FIN after them
        self.fin = False  # the guest's FIN is at `nxt`, behind what is held

    def start(self, irs: int) -> None:
        self.nxt = self.ack = add(irs, 1)

    def keep(self, seq: int, data: memoryview, fin: bool, limit: int) -> None:
        """Bytes beyond a hole, in runs, in order of number.  Runs do not overlap: what a run has is cut
        off, so that all of them together are never more than the window."""
        later = self.later
        at = len(later)
        while at and less(seq, later[at - 1][0]):
            at -= 1
        if at < len(later) and (room := distance(seq, later[at][0])) < len(data) + fin:
            data, fin = data[:room], False
        if at:
            start, run, ended = later[at - 1]
            known = len(run) - distance(start, seq)
            if known >= 0:  # it continues that run
                if not ended and known <= len(data):
                    run += data[known:]
                    later[at - 1] = (start, run, fin)
                return
        if (data or fin) and len(later) < limit:
            later.insert(at, (seq, bytearray(data), fin))
