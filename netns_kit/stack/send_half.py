"""The sending half of a TCP connection: SND of RFC 9293 3.3.1, and the bytes that are not acknowledged.

It keeps the numbers and the bytes behind them; `netns_kit.stack.tcp` decides what they mean, and
`netns_kit.stack.recovery` what is sent again.  Every byte kept is counted in the `Memory` of the stack.
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

PIECES = 64  # beyond so many, small ones are joined:
CHUNK = 16384  # bytes of a joined one, at most
_NO_PAYLOAD = memoryview(b"")


class SendHalf:
    """What goes to the guest.

    `una` is the oldest number not acknowledged, `max` one past the last ever sent, `nxt` the next to send: it lies
    behind `max` only while a `Recovery` goes back.  `mss` is the bytes of a segment, `burst` those that the link
    takes at once.
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
        self.limit, self.most = limits.tcp_send, limits.tcp_send_max  # our own bound on flight, and its own
        self.tuner = Tuner(iss)
        self.mss = self.burst = mss
        # (sequence number, bytes), from `una` to `max`
        self.queue: deque[tuple[int, bytes | memoryview]] = deque()
        self.fin: int | None = None  # the sequence number of our FIN
        self.urgent: int | None = None  # SND.UP: one past the last urgent byte, until that is acknowledged
        self.blocked = False  # the user found no room and waits to be told
        self.rto = RetransmissionTimeout()
        self.timed: int | None = None  # an ACK of this number ends the round trip that began at `timed_at`
        self.timed_at = -math.inf

    @property
    def flight(self) -> int:
        """How many numbers are not acknowledged."""
        return (self.max - self.una) & MASK

    def append(self, data: bytes | memoryview) -> int:
        """Queue `data`, to be sent at once, and return its number.  A view is one that `Memory.take` has returned."""
        seq, queue, size = self.max, self.queue, len(data)
        if len(queue) > PIECES and len(queue[-1][1]) + size <= CHUNK:
            # many small ones would cost more than they hold; few are sent again as they were
            start, last = queue[-1]
            queue[-1] = start, b"".join((last, data))
            self.memory.held += size
        else:
            queue.append((seq, data))
            self.memory.held += BUFFER if isinstance(data, memoryview) else size + OVERHEAD
        self.nxt = self.max = (seq + size) & MASK
        return seq

    def acknowledge(self, ack: int, now: float) -> None:
        """Forget what lies before `ack`, a number in (una, max]."""
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
        """Return the queued bytes from `position` to the end of the piece it lies in."""
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
