"""The receiving half of a TCP connection: RCV of RFC 9293 3.3.1, and the bytes that the user has not taken.

It keeps the numbers and the bytes behind them; `netns_kit.stack.tcp` decides what they mean.  Every byte kept is
counted in the `Memory` of the stack.
"""

from __future__ import annotations

from collections import deque

from .seq import MASK, add, distance, less
from .windows import OVERHEAD, Memory, Tuner

CHUNK = 16384  # bytes: what is smaller is joined with what it follows

Range = tuple[int, int]


class ReceiveHalf:
    """From the guest."""

    __slots__ = (
        "ack",
        "fin",
        "held",
        "later",
        "memory",
        "nxt",
        "recent",
        "sack",
        "scale",
        "starved",
        "tuner",
        "urgent",
        "wnd",
    )

    def __init__(self, wnd: int, memory: Memory) -> None:
        self.memory = memory
        self.nxt = 0  # next expected
        self.ack = 0  # next to be taken by the user; what we acknowledge
        self.wnd = wnd  # the window, counted from `ack`
        self.scale = 0
        self.tuner = Tuner(0)
        self.held: deque[bytes] = deque()  # from `ack` to `nxt`
        self.starved = False  # memory is full: the guest has been turned away, and waits for an ACK
        self.later: list[tuple[int, bytearray, bool]] = []  # beyond a hole: number, bytes, FIN after them
        self.sack = False  # the guest is told of those (RFC 2018)
        self.recent = 0  # where the last of them arrived
        self.urgent: int | None = None  # the number of a byte yet to be taken, the last that is urgent
        self.fin = False  # the guest's FIN is at `nxt`, behind what is held

    def start(self, irs: int) -> None:
        self.nxt = self.ack = add(irs, 1)
        self.tuner = Tuner(self.nxt)

    def point(self, urgent: int) -> None:
        """RCV.UP (3.10.7.4, sixth): the furthest that is told, and nothing that has been taken."""
        if not less(urgent, self.ack) and (self.urgent is None or less(self.urgent, urgent)):
            self.urgent = urgent

    def tune(self, now: float, rtt: float, most: int) -> None:
        """Open the window to what crosses, `most` at most."""
        if self.memory.full:
            rtt = 0.0
        self.wnd = max(self.wnd, min(self.tuner.grown(self.wnd, self.ack, now, rtt), most))

    def hold(self, data: memoryview) -> int:
        """Keep a copy until the user takes it.  How much: all of it, or nothing if memory is full."""
        if self.memory.full:
            self.starved = True
            return 0
        # many small ones would cost more than they hold
        if self.held and len(self.held[-1]) + len(data) <= CHUNK:
            self.held[-1] += data
        else:
            self.held.append(bytes(data))
            self.memory.held += OVERHEAD
        self.memory.held += len(data)
        return len(data)

    def take(self, size: int) -> None:
        """The user has taken that many of the first bytes held."""
        self.ack = (self.ack + size) & MASK
        self.memory.held -= size
        if size < len(self.held[0]):
            self.held[0] = self.held[0][size:]
        else:
            self.held.popleft()
            self.memory.held -= OVERHEAD

    def keep(self, seq: int, data: memoryview, fin: bool, limit: int) -> bool:
        """Bytes beyond a hole, in runs, in order of number.  Runs do not overlap: what a run has is cut
        off, so that all of them together are never more than the window.  False if there was no room."""
        later = self.later
        if self.memory.full:
            return False
        at = len(later)
        while at and less(seq, later[at - 1][0]):
            at -= 1
        self.recent = seq
        if at < len(later) and (room := distance(seq, later[at][0])) < len(data) + fin:
            data, fin = data[:room], False
        if at:
            start, run, ended = later[at - 1]
            known = len(run) - distance(start, seq)
            if known >= 0:  # it continues that run
                if not ended and known <= len(data):
                    run += data[known:]
                    self.memory.held += len(data) - known
                    later[at - 1] = (start, run, fin)
                return True
        if not data and not fin:
            return True
        if len(later) < limit:
            later.insert(at, (seq, bytearray(data), fin))
            self.memory.held += len(data) + OVERHEAD
            return True
        return False

    def first_later(self) -> tuple[int, memoryview, bool]:
        """The first of what is kept beyond a hole, which it keeps no longer."""
        seq, run, fin = self.later.pop(0)
        self.memory.held -= len(run) + OVERHEAD
        return seq, memoryview(run), fin

    def blocks(self) -> list[Range]:
        """What there is beyond the hole, the most recent first, as an option has room for (RFC 2018 4)."""
        runs = [(start, add(start, len(run) + fin)) for start, run, fin in self.later]
        runs.sort(key=lambda run: distance(run[0], self.recent) >= distance(*run))
        return runs[:4]

    def clear(self) -> None:
        if self.held or self.later:
            pieces = [*self.held, *(run for _, run, _ in self.later)]
            self.memory.held -= sum(len(each) + OVERHEAD for each in pieces)
            self.held.clear()
            self.later.clear()
