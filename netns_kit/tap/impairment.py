"""Impairment: a bad link from a seed, pure.

A `BadLink` is one direction of a cable.  Frames go in by `BadLink.send` and come out by `BadLink.receive`, later and
perhaps changed.  Time is an argument of both, and `BadLink.deadline` is the time of the next frame.  A frame's fate
is decided once, when it goes in, by a generator seeded from the `Impairment`: the same seed, frames and times give
the same result on any machine.

A frame passes these steps in order: it may be lost; damaged; refused because the queue is full; serialised at the
rate; delayed; held back so that later frames overtake it; duplicated, with the copy right behind it.  The line is a
FIFO: delay and jitter alone never reorder.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from random import Random

from netns_kit import arguments
from netns_kit.frozen import frozen

__all__ = ["FRAME_COST", "REORDER_DEPTH", "REORDER_HOLD", "BadLink", "Impairment"]

# Law of this file: no descriptor, no clock, no log; every random number comes from the seed.

REORDER_DEPTH = 3
"""A frame held back is overtaken by one to this many later frames..."""
REORDER_HOLD = 0.02
"""...or released this many seconds after its time, when fewer follow."""
FRAME_COST = 256
"""Bytes of memory that a frame is taken to use beside its own."""


@frozen
class Impairment:
    """The faults of one direction of a link; the default has none.

    Raises:
        ArgumentError: A value is out of range.
        ArgumentTypeError: An argument is no number.
    """

    loss: float = 0.0
    """Probability that a frame is lost, 0 to 1."""
    duplicate: float = 0.0
    """Probability that a frame is duplicated, 0 to 1."""
    reorder: float = 0.0
    """Probability that a frame is held back until one to `REORDER_DEPTH` later ones have passed, but for at most
    `REORDER_HOLD` seconds."""
    corrupt: float = 0.0
    """Probability that one bit behind the Ethernet header is flipped; see `BadLink` for when that makes sense."""
    delay: float = 0.0
    """Seconds that each frame takes."""
    jitter: float = 0.0
    """Seconds of which an evenly distributed part is added to the delay."""
    rate: float | None = None
    """Bytes per second, None for no limit."""
    queue: int = 1000
    """Number of frames that the link holds, those under way included; one more is dropped."""
    memory: float = math.inf
    """Bytes that the frames it holds may use, each with `FRAME_COST` bytes beside its own.  A frame that would use
    more is dropped."""
    seed: int = 0
    """Seed of all random decisions."""

    def __post_init__(self) -> None:
        for name in ("loss", "duplicate", "reorder", "corrupt"):
            arguments.number(
                name, getattr(self, name), "a probability, 0 to 1", lambda value: 0 <= value <= 1
            )
        for name in ("delay", "jitter"):
            arguments.number(
                name, getattr(self, name), "seconds, 0 or more", lambda value: 0 <= value < math.inf
            )
        if self.rate is not None:
            expected = "bytes per second, more than 0, or None"
            arguments.number("rate", self.rate, expected, lambda value: 0 < value < math.inf)
        arguments.whole_number("queue", self.queue, 1)
        arguments.number("memory", self.memory, "bytes, more than 0", lambda value: value > 0)
        arguments.instance("seed", self.seed, int, "a whole number")


class _Held:
    """A frame that waits for `left` others to pass, until `limit` at the latest."""

    __slots__ = ("frame", "left", "limit")

    def __init__(self, frame: bytes, left: int, limit: float) -> None:
        self.frame = frame
        self.left = left
        self.limit = limit


class BadLink:
    """A direction of a link: for each frame that goes in, none, one or two come out later.

    `protect` bytes at the start of a frame are never damaged: the Ethernet header (14, the default), and a vnet
    header before it, which no cable carries.  Damage tests checksums, so it makes sense only where they are complete:
    between devices without offloads.  A frame that still needs its checksum gets a correct one over wrong bytes.

    `overhead` bytes of each frame take no time at a rate: a vnet header, likewise.

    `deadline` is the time at which `receive` next has a frame, `math.inf` while the link is empty.  `lost`,
    `duplicated`, `reordered`, `corrupted` and `overflowed` count frames: as many came out as were sent, minus `lost`
    and `overflowed`, plus `duplicated`.
    """

    __slots__ = (
        "_amounts", "_free_at", "_held", "_last_due", "_line", "_order", "_strikes", "_used",
        "corrupted", "deadline", "duplicated", "impairment", "lost", "overflowed", "overhead", "protect",
        "reordered",
    )  # fmt: skip

    def __init__(self, impairment: Impairment, *, protect: int = 14, overhead: int = 0) -> None:
        self.deadline = math.inf
        self.overhead = overhead
        self.lost = self.duplicated = self.reordered = self.corrupted = self.overflowed = 0
        self.protect = protect
        self._used = 0  # bytes of memory
        self._line: list[tuple[float, int, bytes]] = []  # a heap of (due, order, frame)
        self._held: list[_Held] = []  # their limits increase
        self._order = 0  # frames due at the same time leave in the order they were put on the line
        self._free_at = -math.inf  # when the last bit of the last frame has left the sender
        self._last_due = -math.inf
        self.change(impairment)

    def change(self, impairment: Impairment) -> None:
        """Have other faults from now on, with their seed from its beginning.

        The frames that the link holds keep their time, and those that follow do not overtake them.
        """
        self.impairment = impairment
        self._strikes = Random(impairment.seed)  # four draws for every frame: one fault moves no other
        self._amounts = Random(f"amounts {impairment.seed}")

    def clear(self) -> list[bytes]:
        """Return all frames that the link holds, in their order.  It is empty then."""
        for held in self._held[:]:
            self._release(held, held.limit)
        frames = [frame for _, _, frame in sorted(self._line)]
        self._line.clear()
        self._used = 0
        self._set_deadline()
        return frames

    def send(self, frame: bytes, now: float) -> None:
        """Put a frame in at time `now`, which never decreases from call to call."""
        chance, asked = self._strikes.random, self.impairment
        lost, damaged = chance() < asked.loss, chance() < asked.corrupt
        late, twice = chance() < asked.reorder, chance() < asked.duplicate
        if lost:
            self.lost += 1
            return
        if damaged and len(frame) > self.protect:
            frame = self._damage(frame)
        self._queue(frame, now, late)
        if twice:
            self.duplicated += 1
            self._queue(frame, now, late=False)

    def receive(self, now: float) -> list[bytes]:
        """Return the frames due by `now` in order of time, and those of the same time in the order they went in."""
        if now < self.deadline:
            return []
        while self._held and self._held[0].limit <= now:
            self._release(self._held[0], self._held[0].limit)
        due = []
        while self._line and self._line[0][0] <= now:
            due.append(heappop(self._line)[2])
            self._used -= len(due[-1]) + FRAME_COST
        self._set_deadline()
        return due

    def _queue(self, frame: bytes, now: float, late: bool) -> None:
        asked = self.impairment
        used = self._used + len(frame) + FRAME_COST
        is_full = len(self._line) + len(self._held) >= asked.queue
        if is_full or used > asked.memory:
            self.overflowed += 1
            return
        self._used = used
        self._free_at = max(self._free_at, now)
        if asked.rate is not None:
            self._free_at += max(len(frame) - self.overhead, 0) / asked.rate
        due = max(self._free_at + asked.delay + asked.jitter * self._amounts.random(), self._last_due)
        self._last_due = due
        if late:
            self.reordered += 1
            self._held.append(_Held(frame, self._amounts.randint(1, REORDER_DEPTH), due + REORDER_HOLD))
        else:
            self._put(frame, due)
            for held in self._held:
                held.left -= 1
            for held in [held for held in self._held if not held.left]:
                self._release(held, min(due, held.limit))
        self._set_deadline()

    def _release(self, held: _Held, due: float) -> None:
        self._held.remove(held)
        self._put(held.frame, due)

    def _put(self, frame: bytes, due: float) -> None:
        self._order += 1
        heappush(self._line, (due, self._order, frame))

    def _set_deadline(self) -> None:
        first = self._line[0][0] if self._line else math.inf
        self.deadline = min(first, self._held[0].limit) if self._held else first

    def _damage(self, frame: bytes) -> bytes:
        self.corrupted += 1
        bit = self._amounts.randrange(self.protect * 8, len(frame) * 8)
        damaged = bytearray(frame)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        return bytes(damaged)
