"""SendHalf: what a TCP connection sends.  It has SND of RFC 9293 3.3.1, and the bytes that are not acknowledged.

It keeps the sequence numbers and their bytes.  `netns_kit.stack.tcp` decides what they mean, and
`netns_kit.stack.recovery` what is sent again.  Every byte that is kept counts in the stack's `Memory`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING

from .rto import RetransmissionTimeout
from .seq import HALF, MASK, distance, less
from .windows import BUFFER, OVERHEAD, Memory, Tuner

if TYPE_CHECKING:
    from .limits import Limits

PIECES = 64  # queued pieces from which on small ones are joined
CHUNK = 16384  # bytes of a joined piece, at most
_NO_PAYLOAD = memoryview(b"")


class SendHalf:
    """The sending half of a connection: bytes to the guest.

    `una` is SND.UNA, the oldest unacknowledged number.  `nxt` is SND.NXT, the number to send next.  `max` is the
    number after the highest one ever sent; `nxt` is less only while a `Recovery` goes back.  `mss` is the number of
    bytes in a segment, `burst` the number that the link takes at once.
    """

    __slots__ = (
        "blocked", "burst", "fin", "iss", "limit", "max", "memory", "most", "mss", "nxt",
        "queue", "rto", "scale", "timed", "timed_at", "tuner", "una", "urgent", "wl1", "wnd", "wnd_max"
    )  # fmt: skip

    def __init__(self, iss: int, mss: int, limits: Limits, memory: Memory) -> None:
        self.memory = memory
        self.iss = self.una = self.nxt = self.max = iss
        self.wnd = self.wnd_max = 0
        self.wl1 = 0  # at most RCV.NXT; WL2 is not needed, since SND.UNA never lies before it
        self.scale = 0
        # our bound on `flight`, and how far it may grow
        self.limit, self.most = (limits.tcp_send, limits.tcp_send_max)
        self.tuner = Tuner(iss)
        self.mss = self.burst = mss
        # (sequence number, bytes), from `una` to `max`
        self.queue: deque[tuple[int, bytes | memoryview]] = deque()
        self.fin: int | None = None  # the sequence number of our FIN
        self.urgent: int | None = None  # SND.UP: one past the last urgent byte, until that is acknowledged
        self.blocked = False  # whether the user waits for room
        self.rto = RetransmissionTimeout()
        self.timed: int | None = None  # an ACK of this number ends the round trip that began at `timed_at`
        self.timed_at = -math.inf

    @property
    def flight(self) -> int:
        """Number of sequence numbers that are not acknowledged."""
        return (self.max - self.una) & MASK

    def append(self, data: bytes | memoryview) -> int:
        """Queue `data`, which is sent at once; return its sequence number.  A view must come from `Memory.take`."""
        seq, queue, size = self.max, self.queue, len(data)
        if len(queue) > PIECES and len(queue[-1][1]) + size <= CHUNK:
            # many small pieces would cost more than they hold; a few are kept as they were sent
            start, last = queue[-1]
            queue[-1] = start, b"".join((last, data))
            self.memory.held += size
        else:
            queue.append((seq, data))
            self.memory.held += BUFFER if isinstance(data, memoryview) else size + OVERHEAD
        self.nxt = self.max = (seq + size) & MASK
        return seq

    def acknowledge(self, ack: int, now: float) -> None:
        """Forget the bytes before `ack`, which is after `una` and not after `max`."""
        queue, forget = self.queue, self.memory.forget
        self.una = ack
        if ack == self.max:
            for _, data in queue:
                forget(data)
            queue.clear()
        while queue:
            start, data = queue[0]
            if not len(data) <= (ack - start) & MASK < HALF:
                break
            del queue[0]
            forget(data)
        if self.timed is not None and not less(ack, self.timed):
            self.rto.sample(now - self.timed_at, now)
            self.timed = None
        if self.urgent is not None and not less(ack, self.urgent):
            self.urgent = None
        if now >= self.tuner.due:
            rtt = 0.0 if self.memory.full else self.rto.smallest
            self.limit = min(self.tuner.grown(self.limit, ack, now, rtt), self.most)

    def at(self, position: int) -> memoryview:
        """Return queued bytes, from `position` to the end of the piece that it lies in."""
        queue = self.queue
        if not queue:
            return _NO_PAYLOAD
        base = queue[0][0]
        index = bisect_right(queue, distance(base, position), key=lambda piece: distance(base, piece[0]))
        start, data = queue[index - 1]
        return memoryview(data)[distance(start, position) :]

    def clear(self) -> None:
        """Forget all bytes."""
        while self.queue:
            self.memory.forget(self.queue.pop()[1])
