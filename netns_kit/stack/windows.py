"""Windows: how much a TCP connection may keep, and the memory that all connections share.

A window, and the bound on what is in flight, is twice the bytes delivered in one minimum RTT (dynamic right-sizing).
It stops growing when growth no longer raises throughput.  So a long path is used fully, and no queue is filled.
"""

from __future__ import annotations

import math

from .seq import MASK

BUFFER = 1 << 16  # bytes of a buffer; no burst is longer
LARGE = BUFFER // 2  # bytes from which on a piece keeps its buffer
SPARE = 64  # unused buffers that are kept
GAIN = 1.1  # factor of throughput since the last growth that lets a window grow again
TUNE_INTERVAL = 0.01  # seconds between two measurements of throughput, at least
OVERHEAD = 192  # bytes that each kept piece counts in addition to its own


class Memory:
    """The memory that the connections of a stack share.

    `held` is the number of bytes that they keep, including the cost of keeping them.  From `limit` on, they keep no
    more than they must.

    Users read what they are about to send into `buffer`, and then call `take`.  A large piece stays in the buffer
    that it was read into.  The buffer is used again when the piece has been acknowledged.  New memory for each 64 KiB
    would be allocated from the kernel and returned to it each time, with a page fault for each 4 KiB.
    """

    __slots__ = ("_spare", "buffer", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.buffer = memoryview(bytearray(BUFFER))
        self._spare: list[memoryview] = []

    def take(self, size: int) -> bytes | memoryview:
        """Return the first `size` bytes of `buffer`, which are kept until `forget` is called with them.

        The caller adds them to `held`.  If the result is a view, the whole buffer counts.
        """
        data = self.buffer[:size]
        if size < LARGE:
            return bytes(data)
        self.buffer = self._spare.pop() if self._spare else memoryview(bytearray(BUFFER))
        return data

    def buffers(self, size: int, total: int) -> list[memoryview]:
        """Return buffers of `size` bytes each, for reading `total` bytes.  They are in the order in which `take` uses
        them.
        """
        count = -(-total // size)
        while len(self._spare) < count - 1:
            self._spare.insert(0, memoryview(bytearray(BUFFER)))
        found = [self.buffer[:size], *(self._spare[-at][:size] for at in range(1, count))]
        found[-1] = found[-1][: total - (count - 1) * size]
        return found

    def forget(self, data: bytes | memoryview) -> None:
        """Subtract the piece from `held`, and reuse its buffer."""
        if not isinstance(data, memoryview):
            self.held -= len(data) + OVERHEAD
            return
        self.held -= BUFFER
        if len(self._spare) < SPARE:
            self._spare.append(memoryview(data.obj))

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.held >= self.limit


class Tuner:
    """The size that a window should have.

    It counts the delivered bytes at least once per round trip, also beyond the 32 bits of sequence numbers.  `due` is
    the time when `grown` must be called next.
    """

    __slots__ = ("_crossed", "_position", "_rate", "_since", "due")

    def __init__(self, position: int) -> None:
        self.due = self._since = -math.inf
        self._position = position
        self._crossed = 0  # bytes delivered before `_position`
        self._rate = 0.0  # bytes per second at the last growth

    def begin(self, position: int, now: float) -> None:
        """Begin to count at the sequence number `position`."""
        self._position, self._since, self.due = position, now, now + TUNE_INTERVAL

    def grown(self, window: int, position: int, now: float, rtt: float) -> int:
        """Return the new size of a window: the old one, or more if throughput calls for it.

        Args:
            window: The old size, in bytes.
            position: The sequence number up to which everything has been delivered.
            now: The time.
            rtt: The minimum round-trip time of late; 0: the window must not grow.
        """
        crossed, elapsed = (position - self._position) & MASK, now - self._since
        self.due = now + max(rtt, TUNE_INTERVAL)
        self._since, self._position = now, position
        self._crossed += crossed
        rate = crossed / elapsed if elapsed > 0 else 0.0
        if 2 * rate * rtt <= window or rate < GAIN * self._rate:
            return window
        self._rate = rate
        return int(2 * rate * rtt)

    def crossed(self, position: int) -> int:
        """Return the number of sequence numbers that have been delivered so far, SYN and FIN included."""
        return self._crossed + ((position - self._position) & MASK)
