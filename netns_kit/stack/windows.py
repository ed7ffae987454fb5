"""How much a TCP connection may keep: its windows, and the memory that all connections share.

Windows, and what is in flight, are sized by what crosses (dynamic right-sizing): twice what one round trip brings,
the smallest of late, as long as that makes more cross: a long path is not held up, and a queue feeds nothing.
"""

from __future__ import annotations

import math

from .seq import distance

BUFFER = 1 << 16  # bytes: no burst is longer
LARGE = BUFFER // 2  # bytes that are worth a buffer of their own
SPARE = 64  # buffers kept for later
GAIN = 1.1  # by which what crosses must have grown since a window last did
TUNE_INTERVAL = 0.01  # seconds, at least, between two looks at what crosses
OVERHEAD = 192  # bytes counted for each piece that is kept, beside its own: small ones are not free


class Memory:
    """`held`: bytes kept for all connections of a stack, with the cost of keeping them.  `limit`: beyond it
    they get by with little.

    `buffer`: where users read to what they are about to send, until `take` is called.  What is large stays in the
    buffer that it was read to, and that is used again when it has been given back: fresh memory for each 64 KiB would
    be taken from the kernel and given back to it over and over, at a page fault for each 4 KiB.
    """

    __slots__ = ("_spare", "buffer", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.buffer = memoryview(bytearray(BUFFER))
        self._spare: list[memoryview] = []

    def take(self, size: int) -> bytes | memoryview:
        """The first `size` bytes of `buffer`, to be kept: give it back to `forget`."""
        data = self.buffer[:size]
        if size < LARGE:
            return bytes(data)
        self.buffer = self._spare.pop() if self._spare else memoryview(bytearray(BUFFER))
        return data

    def buffers(self, size: int, total: int) -> list[memoryview]:
        """Return so many buffers of `size` bytes that `total` bytes can be read to, in the order of `take`."""
        count = -(-total // size)
        while len(self._spare) < count - 1:
            self._spare.insert(0, memoryview(bytearray(BUFFER)))
        found = [self.buffer[:size], *(self._spare[-at][:size] for at in range(1, count))]
        found[-1] = found[-1][: total - (count - 1) * size]
        return found

    def forget(self, data: bytes | memoryview) -> None:
        """It is held no more."""
        if not isinstance(data, memoryview):
            self.held -= len(data) + OVERHEAD
            return
        self.held -= BUFFER
        if len(self._spare) < SPARE:
            self._spare.append(memoryview(data.obj))

    def hold(self, data: bytes | memoryview) -> None:
        """It is held from now on: of a view, the whole buffer."""
        self.held += BUFFER if isinstance(data, memoryview) else len(data) + OVERHEAD

    @property
    def full(self) -> bool:
        return self.held >= self.limit


class Tuner:
    """What a window should be for what crosses.  It grows while that brings more: a queue would only get longer.

    It looks once in a round trip at least, and so can count what has crossed beyond the 32 bits of sequence numbers.
    """

    __slots__ = ("_crossed", "_position", "_rate", "_since", "due")

    def __init__(self, position: int) -> None:
        self.due = -math.inf
        self._since = -math.inf
        self._position = position
        self._crossed = 0  # until `_position`
        self._rate = 0.0  # at the last growth, bytes per second

    def grown(self, window: int, position: int, now: float, rtt: float) -> int:
        """`window`, or more: twice what has crossed per `rtt` since the last look.  `position`: how far it got.  An
        `rtt` of 0 is none to grow for.
        """
        crossed, elapsed = distance(self._position, position), now - self._since
        self.due = now + max(rtt, TUNE_INTERVAL)
        self._since, self._position = now, position
        self._crossed += crossed
        rate = crossed / elapsed if elapsed > 0 else 0.0
        if 2 * rate * rtt <= window or rate < GAIN * self._rate:
            return window
        self._rate = rate
        return int(2 * rate * rtt)

    def crossed(self, position: int) -> int:
        """How much has crossed since the beginning, sequence numbers that are no bytes included."""
        return self._crossed + distance(self._position, position)
