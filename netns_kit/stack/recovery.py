"""Loss recovery: which bytes are sent again, and in which order.

A `Recovery` begins with the first sign of a loss and is over when nothing is missing; a connection on a link that
loses nothing has none.  Where the guest speaks SACK (RFC 2018), all holes that it tells of are filled in a round trip
(RFC 6675, without its congestion control), and probes come before the timeout (RFC 8985 7).  Without SACK, three
duplicate ACKs bring one segment again (RFC 5681 3.2), and so does each partial ACK (RFC 6582).  A timeout goes back
to the first unacknowledged byte, and opens up again by doubling.

It decides what is sent again; `netns_kit.stack.tcp` decides when, and sends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .ranges import Range, RangeSet
from .send_half import SendHalf
from .seq import add, distance, less

DUPLICATE_ACKS = 3  # RFC 5681 3.2
RESENT = 1 << 18  # bytes that are sent again at one time: the rest when the next ACK comes
SACKED = 256  # ranges that are remembered: a guest may acknowledge every other byte

Piece = tuple[int, "memoryview | None"]
"""A sequence number and bytes; None: our FIN."""


class Recovery:
    """What is known of a loss in what `snd` has sent.

    `retries` and `probes` are timeouts and probes since something was last acknowledged.
    """

    __slots__ = (
        "_congestion", "_duplicates", "_point", "_resent", "_resent_at", "_snd", "probes", "retries",
        "sacked"
    )  # fmt: skip

    def __init__(self, snd: SendHalf) -> None:
        self._snd = snd
        self.retries = 0
        self.probes = 0
        self.sacked = RangeSet()  # beyond SND.UNA: the guest has these (RFC 2018)
        self._duplicates = 0
        self._point: int | None = None  # RFC 6582's "recover": what was lost before is being sent again
        self._congestion: float = math.inf  # a bound on flight, in bytes, only after a timeout
        self._resent = snd.una  # HighRxt of RFC 6675: holes before it have been sent again
        self._resent_at = snd.una  # SND.MAX when that was

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to recover from."""
        return (
            self._point is None
            and not self.sacked
            and self._snd.nxt == self._snd.max
            and not (self.retries or self.probes or self._duplicates)
        )

    def is_partial(self, ack: int) -> bool:
        """Return whether an ACK up to `ack` leaves something to repair (RFC 6582)."""
        return self._point is not None and less(ack, self._point)

    def may_be_timed(self, ack: int) -> bool:
        """Return whether `ack` tells of something sent again, which only a timestamp can time (RFC 7323 4.1)."""
        return self.retries > 0 or self.probes > 0 or self.is_partial(ack)

    def acknowledge(self, ack: int, now: float) -> None:
        """Move SND.UNA to `ack`."""
        snd, sacked = self._snd, self.sacked
        if not self.is_partial(ack):
            self._point = None
        if self._congestion != math.inf:
            self._congestion += 2 * distance(snd.una, ack)
        snd.acknowledge(ack, now)
        if less(snd.nxt, ack):
            snd.nxt = ack
        self._duplicates = self.probes = 0
        if self.retries:
            self.retries = 0
            snd.rto.settle()
        sacked.discard_before(ack)
        if sacked and sacked.start == ack:  # it would be acknowledged too: the guest has thrown it away
            sacked.discard_before(next(iter(sacked))[1])

    def sack(self, blocks: Iterable[Range]) -> bool:
        """Note that the guest has `blocks`, and return whether that is news.

        Old blocks lie outside of SND.UNA to SND.MAX, and so do lies.
        """
        una, flight = self._snd.una, self._snd.flight
        news = False
        for start, end in blocks:
            if 0 < distance(una, start) < distance(una, end) <= flight:
                news |= self.sacked.add(start, end)
        self.sacked.bound(SACKED)  # the last is what is news
        return news

    def duplicate(self) -> Iterable[Piece]:
        """Return what is lost, as a duplicate ACK (RFC 5681 2) or news by SACK tells.

        Going back makes duplicates of its own, and a shut window is no news of a loss.
        """
        snd, sacked = self._snd, self.sacked
        if snd.nxt != snd.max or not snd.wnd:
            return ()
        self._duplicates += 1
        tail_arrived = sacked and sacked.end == snd.max  # nothing will come to make it three
        if self._point is None and (self._duplicates >= DUPLICATE_ACKS or tail_arrived):
            self._point, self._resent, self._resent_at = snd.max, snd.una, snd.max
            if not sacked:
                return self.first()
        if self._point is not None and sacked:
            return self._holes()
        return ()

    def first(self) -> Iterator[Piece]:
        """Return the first unacknowledged segment."""
        snd = self._snd
        if snd.una == snd.fin:
            snd.timed = None
            yield snd.una, None
        else:
            yield from self._again(snd.una, min(len(snd.at(snd.una)), snd.burst))

    def _holes(self) -> Iterator[Piece]:
        """Return every hole before what has arrived, once; and all of them once more when something has arrived that
        was sent after that."""
        snd, arrived = self._snd, self.sacked.end
        if less(self._resent_at, arrived) or less(self._resent, snd.una):
            self._resent = snd.una
        budget = RESENT
        for start, end in self.sacked.missing(self._resent, arrived):
            size = min(distance(start, end), budget)
            yield from self._again(start, size)
            budget -= size
            self._resent_at = snd.max
            self._resent = add(start, size)
            if budget <= 0:
                break

    def probe(self) -> Iterator[Piece]:
        """Return the last segment, which draws a SACK that shows the holes before it; or the holes that are known."""
        snd = self._snd
        self.probes += 1
        if self.sacked:
            self._resent = snd.una
            yield from self._holes()
        elif snd.fin is not None:
            yield snd.fin, None
        else:
            start, data = snd.queue[-1]
            size = min(len(data), snd.mss)
            yield from self._again(add(start, len(data) - size), size)

    def go_back(self) -> None:
        """Return to the first unacknowledged byte, after a timeout, and go on slowly from there."""
        snd = self._snd
        self._duplicates, self._point = 0, None
        if self.retries > 1:
            self.sacked.clear()  # the guest may have thrown away what it had (RFC 2018 8)
        snd.nxt = snd.una
        self._congestion = snd.burst

    def resume_from_nxt(self) -> Iterator[Piece]:
        """Return what lies from SND.NXT on, as far as window and congestion allow."""
        snd = self._snd
        bound = min(snd.wnd, self._congestion)
        while snd.nxt != snd.max:
            start, end = next(self.sacked.missing(snd.nxt, snd.max), (snd.max, snd.max))
            snd.nxt = start
            if start == snd.max:
                break
            if start == snd.fin:
                snd.nxt = snd.max
                yield start, None
                break
            data = snd.at(start)[: distance(start, end)]
            sent = distance(snd.una, start)
            room = bound - sent
            if room < len(data) and (room <= 0 or (sent and room < snd.mss)):
                break
            data = data[: int(min(room, len(data)))]
            snd.nxt = add(start, len(data))
            yield start, data

    def _again(self, seq: int, size: int) -> Iterator[Piece]:
        """Return what was sent before, and do not time it."""
        snd = self._snd
        snd.timed = None
        while size:
            data = snd.at(seq)[:size]
            yield seq, data
            seq, size = add(seq, len(data)), size - len(data)
