"""The receiving half of a TCP connection: RCV of RFC 9293 3.3.1, and the bytes that the user has not taken.

It keeps the numbers and the bytes behind them; `netns_kit.stack.tcp` decides what they mean.  Every byte kept is
counted in the `Memory` of the stack.
"""

from __future__ import annotations

from collections import deque

from .ranges import Range, RangeSet
from .seq import MASK, add, distance, less
from .windows import OVERHEAD, Memory, Tuner

CHUNK = 16384  # bytes: a smaller piece is joined with the one that it follows
BLOCKS = 4  # that a SACK option has room for (RFC 2018 3)


class ReceiveHalf:
    """What comes from the guest.

    `nxt` is the number expected next, `ack` the next that the user has not taken: we acknowledge that, and count the
    window `wnd` from there.  `field` is the window as segments show it, shifted by `scale`.  `out_of_order` is what
    has arrived beyond a hole, None on a link that loses nothing.
    """

    __slots__ = (
        "ack", "field", "fin", "memory", "nxt", "out_of_order", "over_limit", "sack", "scale", "tuner",
        "unread", "urgent", "wnd"
    )  # fmt: skip

    def __init__(self, wnd: int, memory: Memory) -> None:
        self.memory = memory
        self.nxt = 0
        self.ack = 0
        self.wnd = wnd
        self.scale = 0
        self.field = 0
        self.tuner = Tuner(0)
        self.unread: deque[bytes] = deque()  # from `ack` to `nxt`
        self.over_limit = False  # memory is full: the guest has been turned away, and waits for an ACK
        self.out_of_order: OutOfOrder | None = None
        self.sack = False  # the guest is told of what is out of order (RFC 2018)
        self.urgent: int | None = None  # the number of a byte yet to be taken, the last that is urgent
        self.fin = False  # the guest's FIN is at `nxt`, behind what is unread

    def start(self, irs: int, now: float) -> None:
        """Begin behind the guest's SYN, which has the number `irs`."""
        self.nxt = self.ack = (irs + 1) & MASK
        self.tuner.begin(self.nxt, now)

    def set_scale(self, scale: int) -> None:
        """Show the window with this scale from now on; without one it has to fit its field."""
        self.scale = scale
        if not scale:
            self.wnd = min(self.wnd, 0xFFFF)
        self.field = min(self.wnd >> scale, 0xFFFF)

    def set_urgent_pointer(self, urgent: int) -> None:
        """Set RCV.UP to the furthest that is told, and to nothing that has been taken (3.10.7.4, sixth)."""
        if not less(urgent, self.ack) and (self.urgent is None or less(self.urgent, urgent)):
            self.urgent = urgent

    def tune(self, now: float, rtt: float, most: int) -> None:
        """Open the window as far as throughput calls for, to `most` at most."""
        if self.memory.full:
            rtt = 0.0
        self.wnd = max(self.wnd, min(self.tuner.grown(self.wnd, self.ack, now, rtt), most))
        self.field = min(self.wnd >> self.scale, 0xFFFF)

    def hold(self, data: memoryview) -> int:
        """Keep a copy until the user takes it.  Return how much: all of it, or nothing if memory is full."""
        if self.memory.full:
            self.over_limit = True
            return 0
        # many small ones would cost more than they hold
        if self.unread and len(self.unread[-1]) + len(data) <= CHUNK:
            self.unread[-1] += data
        else:
            self.unread.append(bytes(data))
            self.memory.held += OVERHEAD
        self.memory.held += len(data)
        return len(data)

    def take(self, size: int) -> None:
        """Remove the first `size` unread bytes, which the user has taken."""
        self.ack = (self.ack + size) & MASK
        self.memory.held -= size
        if size < len(self.unread[0]):
            self.unread[0] = self.unread[0][size:]
        else:
            self.unread.popleft()
            self.memory.held -= OVERHEAD

    def keep(self, seq: int, data: memoryview, fin: bool, limit: int) -> bool:
        """Keep text from beyond a hole, in `limit` pieces at most.  Return False if there was no room for all."""
        if self.memory.full:
            return False
        kept = self.out_of_order or OutOfOrder()
        before = kept.cost
        complete = kept.keep(seq, data, fin, limit)
        self.memory.held += kept.cost - before
        self.out_of_order = kept if kept.pieces else None
        return complete

    def next_piece(self) -> tuple[int, memoryview, bool] | None:
        """Remove what is out of order no more: number, bytes, whether a FIN follows.  None: there is a hole still."""
        kept = self.out_of_order
        if kept is None or less(self.nxt, kept.pieces[0][0]):
            return None
        before = kept.cost
        piece = kept.pop()
        self.memory.held += kept.cost - before
        if not kept.pieces:
            self.out_of_order = None
        return piece

    def clear(self) -> None:
        """Forget all bytes."""
        if self.unread:
            self.memory.held -= sum(len(each) + OVERHEAD for each in self.unread)
            self.unread.clear()
        if self.out_of_order is not None:
            self.memory.held -= self.out_of_order.cost
            self.out_of_order = None


class OutOfOrder:
    """Text from beyond a hole.

    `pieces` are numbers and bytes, in order.  They do not overlap, so that all of them together are never more than
    the window; one that continues another is joined with it.  `cost` is what they count in memory.
    """

    __slots__ = ("_arrived", "_fin", "_recent", "cost", "pieces")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = []
        self.cost = 0
        self._arrived = RangeSet()  # the numbers of the pieces, and of the FIN
        self._fin: int | None = None  # the number of the guest's FIN
        self._recent = 0  # where the last segment began

    def keep(self, seq: int, data: memoryview, fin: bool, limit: int) -> bool:
        """Keep what is new of this text.  Return False if there are `limit` pieces, and one more is needed."""
        self._recent = seq
        end = add(seq, len(data))
        arrived = self._arrived
        if self._fin is not None and less(self._fin, end):
            end = self._fin if less(seq, self._fin) else seq  # nothing follows a FIN
        if fin and self._fin is None and (not arrived or not less(end, arrived.end)):
            self._fin = end
        for start, stop in arrived.missing(seq, end):
            if not self._insert(start, data[distance(seq, start) : distance(seq, stop)], limit):
                return False
        if self._fin == end and not arrived.overlaps(end, end):
            follows = bool(self.pieces) and arrived.end == end
            if not (follows or self._insert(end, data[:0], limit)):
                self._fin = None
                return False
            arrived.add(end, add(end, 1))
        return True

    def _insert(self, start: int, data: memoryview, limit: int) -> bool:
        """Keep text that is not here.  Return False if it would be one piece too many."""
        pieces = self.pieces
        at = len(pieces)
        while at and less(start, pieces[at - 1][0]):
            at -= 1
        if at and add(pieces[at - 1][0], len(pieces[at - 1][1])) == start:
            pieces[at - 1][1].extend(data)
        elif len(pieces) < limit:
            pieces.insert(at, (start, bytearray(data)))
            self.cost += OVERHEAD
        else:
            return False
        self.cost += len(data)
        self._arrived.add(start, add(start, len(data)))
        return True

    def pop(self) -> tuple[int, memoryview, bool]:
        """Remove the first piece, and return it: number, bytes, whether a FIN follows."""
        start, data = self.pieces.pop(0)
        self.cost -= len(data) + OVERHEAD
        end = add(start, len(data))
        self._arrived.discard_before(end)
        return start, memoryview(data), end == self._fin

    def blocks(self) -> list[Range]:
        """Return what there is, the most recent first, as an option has room for (RFC 2018 4)."""
        ranges = list(self._arrived)
        ranges.sort(key=lambda each: distance(each[0], self._recent) >= distance(*each))
        return ranges[:BLOCKS]
