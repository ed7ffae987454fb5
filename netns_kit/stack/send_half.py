"""The sending half of a TCP connection: SND of RFC 9293 3.3.1, the bytes behind it, and what is to be sent again.

It keeps the numbers, and decides which pieces of the queue a loss asks for; `netns_kit.stack.tcp` decides when, and
sends them.  Every byte kept is counted in the `Memory` of the stack.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .rto import RetransmissionTimeout
from .seq import HALF, MASK, add, distance, less
from .windows import Memory, Tuner

if TYPE_CHECKING:
    from .limits import Limits

DUPLICATE_ACKS = 3  # RFC 5681 3.2
PIECES = 64  # what is queued beyond so many
CHUNK = 16384  # bytes is joined with what it follows, up to so many
RESENT = 1 << 18  # bytes, at one time: the rest when the next ACK comes
SACKED = 256  # ranges remembered: a guest may acknowledge every other byte
_NO_PAYLOAD = memoryview(b"")

Range = tuple[int, int]
Piece = tuple[int, "memoryview | None"]  # sequence number and bytes; None: our FIN


class SendHalf:
    """Towards the guest."""

    __slots__ = (
        "blocked",
        "burst",
        "congestion",
        "duplicates",
        "fin",
        "iss",
        "limit",
        "max",
        "memory",
        "most",
        "mss",
        "nxt",
        "probes",
        "queue",
        "recover",
        "resent",
        "resent_at",
        "retries",
        "rto",
        "sacked",
        "scale",
        "timed",
        "timed_at",
        "tuner",
        "una",
        "urgent",
        "wl1",
        "wnd",
        "wnd_max",
    )

    def __init__(self, iss: int, mss: int, limits: Limits, memory: Memory) -> None:
        self.memory = memory
        self.iss = iss
        self.una = iss  # oldest unacknowledged
        self.nxt = iss  # next to send; behind `max` while going back after a timeout
        self.max = iss  # one past the last ever sent
        self.wnd = 0
        self.wnd_max = 0
        self.wl1 = 0  # at most RCV.NXT; WL2 is not needed, since SND.UNA never lies before it
        self.scale = 0
        self.limit, self.most = limits.tcp_send, limits.tcp_send_max  # our own bound on flight, and its own
        self.tuner = Tuner(iss)
        self.mss = mss
        self.burst = mss
        # (sequence number, bytes), from `una` to `max`
        self.queue: deque[tuple[int, bytes | memoryview]] = deque()
        self.fin: int | None = None  # the sequence number of our FIN
        self.urgent: int | None = None  # SND.UP: one past the last urgent byte, until that is acknowledged
        self.blocked = False  # the user found no room and waits to be told
        self.rto = RetransmissionTimeout()
        self.retries = 0
        self.probes = 0  # for a loss, since something was last acknowledged
        self.timed: int | None = None  # an ACK of this number ends the round trip that began at `timed_at`
        self.timed_at = -math.inf
        self.duplicates = 0
        self.recover: int | None = None  # RFC 6582: recovering until this is acknowledged
        self.congestion: float = math.inf  # a bound on flight, in bytes, only after a timeout
        self.sacked: list[Range] = []  # beyond `una`, in order, disjoint: the guest has these (RFC 2018)
        self.resent = iss  # HighRxt of RFC 6675: holes before it have been sent again
        self.resent_at = iss  # `max` when that was

    @property
    def flight(self) -> int:
        return (self.max - self.una) & MASK

    def append(self, data: bytes | memoryview) -> int:
        """Queue `data`, to be sent at once; its sequence number.  A view is one that `Memory.take` has returned."""
        seq, queue = self.max, self.queue
        if len(queue) > PIECES and len(queue[-1][1]) + len(data) <= CHUNK:
            # many small ones would cost more than they hold; few are sent again as they were
            start, last = queue[-1]
            queue[-1] = start, b"".join((last, data))
            self.memory.held += len(data)
        else:
            queue.append((seq, data))
            self.memory.hold(data)
        self.nxt = self.max = (seq + len(data)) & MASK
        return seq

    def acknowledge(self, ack: int, now: float) -> None:
        """`ack` lies in (una, max]: forget what it covers."""
        queue = self.queue
        if self.congestion != math.inf:
            self.congestion += 2 * distance(self.una, ack)
        self.una = ack
        while queue:
            start, data = queue[0]
            if not len(data) <= (ack - start) & MASK < HALF:
                break
            del queue[0]
            self.memory.forget(data)
        if (self.nxt - ack) & MASK >= HALF:
            self.nxt = ack
        if self.timed is not None and not less(ack, self.timed):
            self.rto.sample(now - self.timed_at, now)
            self.timed = None
        self.duplicates = self.probes = 0
        if self.retries:
            self.retries = 0
            self.rto.settle()
        if self.urgent is not None and not less(ack, self.urgent):
            self.urgent = None
        if self.sacked:
            self.sacked = [(start, end) for start, end in self.sacked if less(ack, start)]
        if now >= self.tuner.due:
            rtt = 0.0 if self.memory.full else self.rto.smallest
            self.limit = min(self.tuner.grown(self.limit, ack, now, rtt), self.most)

    def at(self, position: int) -> memoryview:
        """The queued bytes from `position` to the end of the chunk it lies in."""
        queue = self.queue
        if not queue:
            return _NO_PAYLOAD
        base = queue[0][0]
        index = bisect_right(queue, distance(base, position), key=lambda chunk: distance(base, chunk[0]))
        start, data = queue[index - 1]
        return memoryview(data)[distance(start, position) :]

    def sack(self, blocks: Iterable[Range]) -> bool:
        """The guest has `blocks`; whether that is news.  Old blocks, and lies, lie outside (una, max]."""
        una, flight = self.una, self.flight
        known = [*self.sacked, *blocks]
        ranges = sorted((distance(una, start), distance(una, end)) for start, end in known)
        merged: list[Range] = []
        for start, end in ranges:
            if not 0 < start < end <= flight:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        if len(merged) > SACKED:
            merged[SACKED - 1 : -1] = []  # the last is what is news
        before, self.sacked = self.sacked, [(add(una, a), add(una, b)) for a, b in merged]
        return self.sacked != before

    def hole(self, position: int) -> tuple[int, int]:
        """The first byte from `position` on that the guest is not known to have, and how many from there."""
        for start, end in self.sacked:
            if less(position, start):
                return position, distance(position, start)
            if less(position, end):
                position = end
        return position, distance(position, self.max)

    def clear(self) -> None:
        while self.queue:
            self.memory.forget(self.queue.pop()[1])

    # -- what is to be sent again ---------------------------------------------------------------------

    def duplicate(self) -> Iterable[Piece]:
        """A duplicate ACK (RFC 5681 2), or news by SACK: what it says is lost.

        Going back makes duplicates of its own, and a shut window is no news of a loss.
        """
        if self.nxt != self.max or not self.wnd:
            return ()
        self.duplicates += 1
        tail_arrived = self.sacked and self.sacked[-1][1] == self.max  # nothing will come to make it three
        if self.recover is None and (self.duplicates >= DUPLICATE_ACKS or tail_arrived):
            self.recover, self.resent, self.resent_at = self.max, self.una, self.max
            if not self.sacked:
                return self.first()
        if self.recover is not None and self.sacked:
            return self.holes()
        return ()

    def first(self) -> Iterator[Piece]:
        """The first unacknowledged segment.  Its round trip is not timed (Karn)."""
        if self.una == self.fin:
            self.timed = None
            yield self.fin, None
        else:
            yield from self._again(self.una, len(self.at(self.una)))

    def holes(self) -> Iterator[Piece]:
        """RFC 6675 in the small: there is no congestion to mind, so every hole before what has arrived is sent
        again, once; and all of them once more when something has arrived that was sent after that."""
        last, arrived = self.sacked[-1]
        if less(self.resent_at, arrived) or less(self.resent, self.una):
            self.resent = self.una
        at, size = self.hole(self.resent)
        budget = RESENT
        while less(at, last) and budget > 0:
            size = min(size, budget)
            yield from self._again(at, size)
            budget -= size
            self.resent_at = self.max
            self.resent = add(at, size)
            at, size = self.hole(self.resent)

    def probe(self) -> Iterator[Piece]:
        """RFC 8985 7: the last segment again, which draws a SACK that shows the holes before it; or the holes that
        are known, once more."""
        self.probes += 1
        if self.sacked:
            self.resent = self.una
            yield from self.holes()
        elif self.fin is not None:
            yield self.fin, None
        else:
            start, data = self.queue[-1]
            size = min(len(data), self.mss)
            yield from self._again(add(start, len(data) - size), size)

    def go_back(self) -> None:
        """After a timeout: to the first unacknowledged byte, and from there on slowly."""
        self.duplicates, self.recover = 0, None
        if self.retries > 1:
            self.sacked.clear()  # the guest may have thrown away what it had (RFC 2018 8)
        self.nxt = self.una
        self.congestion = self.burst

    def onward(self) -> Iterator[Piece]:
        """From SND.NXT on, as far as window and congestion allow."""
        bound = min(self.wnd, self.congestion)
        while self.nxt != self.max:
            self.nxt, size = self.hole(self.nxt)
            if self.nxt == self.max:
                break
            if self.nxt == self.fin:
                yield self.fin, None
                self.nxt = self.max
                break
            data = self.at(self.nxt)[:size]
            sent = distance(self.una, self.nxt)
            room = bound - sent
            if room < len(data) and (room <= 0 or (sent and room < self.mss)):
                break
            data = data[: int(min(room, len(data)))]
            at = self.nxt
            self.nxt = add(at, len(data))
            yield at, data

    def _again(self, seq: int, size: int) -> Iterator[Piece]:
        self.timed = None
        while size:
            data = self.at(seq)[:size]
            yield seq, data
            seq, size = add(seq, len(data)), size - len(data)
