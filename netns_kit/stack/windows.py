"""How much a TCP connection may keep: its windows, and the memory that all connections share.

A window, and the bound on what is in flight, is twice the bytes delivered in one minimum RTT (dynamic right-sizing).
It stops growing when growth no longer raises throughput, so a long path is not held up and no queue is fed.
"""

from __future__ import annotations

import math

from .seq import MASK

BUFFER = 1 << 16  # bytes: no burst is longer
LARGE = BUFFER // 2  # bytes that are worth a buffer of their own
SPARE = 64  # buffers kept for use again
GAIN = 1.1  # by which throughput must have grown since a window last did
TUNE_INTERVAL = 0.01  # seconds, at least, between two looks at throughput
OVERHEAD = 192  # bytes counted for each piece that is kept, beside its own: small ones are not free


class Memory:
    """Bytes that all connections of a stack keep.

    `held` counts them, with the cost of keeping them; from `limit` on, connections keep no more than they must.

    Users read what they are about to send into `buffer`, and call `take`.  A large piece stays in the buffer that it
    was read into, which is used again when the piece has been acknowledged.  Fresh memory for each 64 KiB would come
    from the kernel and go back to it each time, at a page fault for each 4 KiB.
    """

    __slots__ = ("_spare", "buffer", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.buffer = memoryview(bytearray(BUFFER))
        self._spare: list[memoryview] = []

    def take(self, size: int) -> bytes | memoryview:
        """Return the first `size` bytes of `buffer`, to be kept until `forget` is called with them.

        Whoever keeps them counts them: of a view, the whole buffer.
        """
        data = self.buffer[:size]
        if size < LARGE:
            return bytes(data)
        self.buffer = self._spare.pop() if self._spare else memoryview(bytearray(BUFFER))
        return data

    def forget(self, data: bytes | memoryview) -> None:
        """Count it no more; its buffer is free."""
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

    It counts what is delivered, once per round trip at least, and so beyond the 32 bits of sequence numbers.
    `due` is when to call `grown` next.
    """

    __slots__ = ("_crossed", "_position", "_rate", "_since", "due")

    def __init__(self, position: int) -> None:
        self.due = self._since = -math.inf
        self._position = position
        self._crossed = 0  # bytes, up to `position`
        self._rate = 0.0  # bytes per second at the last growth

    def begin(self, position: int, now: float) -> None:
        """Count from here on."""
        self._position, self._since, self.due = position, now, now + TUNE_INTERVAL

    def grown(self, window: int, position: int, now: float, rtt: float) -> int:
        """Return `window`, or more if throughput calls for it.

        Args:
            window: What it is now, in bytes.
            position: The sequence number up to which everything is delivered.
            now: The time.
            rtt: The minimum round-trip time of late; 0 is none to grow for.
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
        """Return how much has been delivered since the beginning, sequence numbers that are no bytes included."""
        return self._crossed + ((position - self._position) & MASK)
