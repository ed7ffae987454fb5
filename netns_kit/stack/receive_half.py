"""ReceiveHalf: what a TCP connection receives.  It has RCV of RFC 9293 3.3.1, and the bytes that the user has not
taken.

It keeps the sequence numbers and their bytes.  `netns_kit.stack.tcp` decides what they mean.  Every byte that is kept
counts in the stack's `Memory`.
"""

from __future__ import annotations

from collections import deque

from .ranges import Range, RangeSet
from .seq import MASK, add, distance, less
from .windows import OVERHEAD, Memory, Tuner

CHUNK = 16384  # bytes to which a piece grows when others are appended to it
BLOCKS = 4  # blocks in a SACK option, at most (RFC 2018 section 3)


class ReceiveHalf:
    """The receiving half of a connection: bytes from the guest.

    `nxt` is RCV.NXT, the number expected next.  `ack` is the first number that the user has not taken.  We
    acknowledge `ack`, and the window `wnd` begins there.  `field` is the window as segments have it, shifted by
    `scale`.  `out_of_order` is text that has arrived beyond a hole, or None.
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
        self.over_limit = False  # whether text was dropped because memory is full; the guest waits for an ACK
        self.out_of_order: OutOfOrder | None = None
        self.sack = False  # whether ACKs report out-of-order text (RFC 2018)
        self.urgent: int | None = None  # the number of the last urgent byte, until it is taken
        self.fin = False  # whether the guest's FIN has arrived; its number is `nxt`

    def start(self, irs: int, now: float) -> None:
        """Begin after the guest's SYN, whose sequence number is `irs`."""
        self.nxt = self.ack = (irs + 1) & MASK
        self.tuner.begin(self.nxt, now)

    def set_scale(self, scale: int) -> None:
        """Set the scale of the window that segments have.  With 0 the window must fit into the field."""
        self.scale = scale
        if not scale:
            self.wnd = min(self.wnd, 0xFFFF)
        self.field = min(self.wnd >> scale, 0xFFFF)

    def set_urgent_pointer(self, urgent: int) -> None:
        """Set RCV.UP, if `urgent` is later than before and has not been taken yet (3.10.7.4, sixth)."""
        if not less(urgent, self.ack) and (self.urgent is None or less(self.urgent, urgent)):
            self.urgent = urgent

    def tune(self, now: float, rtt: float, most: int) -> None:
        """Enlarge the window as far as throughput calls for it, to at most `most`."""
        if self.memory.full:
            rtt = 0.0
        self.wnd = max(self.wnd, min(self.tuner.grown(self.wnd, self.ack, now, rtt), most))
        self.field = min(self.wnd >> self.scale, 0xFFFF)

    def hold(self, data: memoryview) -> int:
        """Keep a copy of `data` until the user takes it.  Return the number of bytes kept: all, or 0 if memory is
        full.
        """
        if self.memory.full:
            self.over_limit = True
            return 0
        # small pieces are joined: each would cost more than it holds
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
        """Keep text from beyond a hole, in at most `limit` pieces.  Return False if not all of it could be kept."""
        if self.memory.full:
            return False
        kept = self.out_of_order or OutOfOrder()
        before = kept.cost
        complete = kept.keep(seq, data, fin, limit)
        self.memory.held += kept.cost - before
        self.out_of_order = kept if kept.pieces else None
        return complete

    def next_piece(self) -> tuple[int, memoryview, bool] | None:
        """Remove the first out-of-order piece if it now continues RCV.NXT; else return None.

        The result is its number, its bytes, and whether a FIN follows.
        """
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

    `pieces` are pairs of sequence number and bytes, in order.  They do not overlap, so all of them together are never
    more than the window.  A piece that continues another one is appended to it.  `cost` is what they count in
    `Memory`.
    """

    __slots__ = ("_arrived", "_fin", "_recent", "cost", "pieces")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = []
        self.cost = 0
        self._arrived = RangeSet()  # the numbers of the pieces, and of the FIN
        self._fin: int | None = None  # the number of the guest's FIN
        self._recent = 0  # the sequence number of the last segment

    def keep(self, seq: int, data: memoryview, fin: bool, limit: int) -> bool:
        """Keep what is new of this text.  Return False if it would be more than `limit` pieces."""
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
        """Insert text that is new.  Return False if it would be more than `limit` pieces."""
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
        """Remove and return the first piece: its number, its bytes, and whether a FIN follows."""
        start, data = self.pieces.pop(0)
        self.cost -= len(data) + OVERHEAD
        end = add(start, len(data))
        self._arrived.discard_before(end)
        return start, memoryview(data), end == self._fin

    def blocks(self) -> list[Range]:
        """Return the blocks of a SACK option, the most recent first (RFC 2018 section 4)."""
        ranges = list(self._arrived)
        ranges.sort(key=lambda each: distance(each[0], self._recent) >= distance(*each))
        return ranges[:BLOCKS]
