"""Recovery: which bytes are sent again after a loss, and in which order.

A connection has a `Recovery` from the first sign of a loss until nothing is missing.

- With SACK (RFC 2018), all holes that the guest reports are filled within a round trip (RFC 6675, without its
  congestion control), and probes are sent before the timeout (RFC 8985 section 7).
- Without SACK, three duplicate ACKs cause the first segment to be sent again (RFC 5681 3.2), and so does each partial
  ACK (RFC 6582).
- After a timeout, sending goes back to the first unacknowledged byte.  At first one burst may be in flight; this
  bound grows by twice the bytes that are acknowledged.

This module decides what is sent again.  `netns_kit.stack.tcp` decides when, and sends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .ranges import Range, RangeSet
from .send_half import SendHalf
from .seq import add, distance, less

DUPLICATE_ACKS = 3  # RFC 5681 3.2
RESENT = 1 << 18  # bytes that are sent again for one ACK; the rest follows with the next ACK
SACKED = 256  # ranges that are remembered; a guest could acknowledge every other byte

Piece = tuple[int, "memoryview | None"]
"""A sequence number and bytes to send; None instead of bytes stands for our FIN."""


class Recovery:
    """The state of loss recovery for the bytes that `snd` has sent.

    `retries` and `probes` are the numbers of timeouts and of probes since the last new ACK.  `sacked` are the
    sequence numbers that the guest has reported by SACK.
    """

    __slots__ = (
        "_congestion", "_duplicates", "_point", "_resent", "_resent_at", "_snd", "probes", "retries",
        "sacked"
    )  # fmt: skip

    def __init__(self, snd: SendHalf) -> None:
        self._snd = snd
        self.retries = 0
        self.probes = 0
        self.sacked = RangeSet()  # beyond SND.UNA (RFC 2018)
        self._duplicates = 0
        self._point: int | None = None  # "recover" of RFC 6582: the end of what is being repaired
        self._congestion: float = math.inf  # bound on bytes in flight after a timeout
        self._resent = snd.una  # HighRxt of RFC 6675: holes before it have been sent again
        self._resent_at = snd.una  # SND.MAX at that moment

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to recover."""
        return (
            self._point is None
            and not self.sacked
            and self._snd.nxt == self._snd.max
            and not (self.retries or self.probes or self._duplicates)
        )

    def is_partial(self, ack: int) -> bool:
        """Return whether an ACK of `ack` is a partial one: something that was lost earlier is still missing (RFC
        6582).
        """
        return self._point is not None and less(ack, self._point)

    def may_be_timed(self, ack: int) -> bool:
        """Return whether the ACK may be for something that was sent again.  Only a timestamp can time it (RFC 7323
        4.1).
        """
        return self.retries > 0 or self.probes > 0 or self.is_partial(ack)

    def acknowledge(self, ack: int, now: float) -> None:
        """Set SND.UNA to `ack`."""
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
        if sacked and sacked.start == ack:  # the guest must have dropped it, else it were acknowledged
            sacked.discard_before(next(iter(sacked))[1])

    def sack(self, blocks: Iterable[Range]) -> bool:
        """Note the SACK blocks of an ACK, and return whether they report anything new.

        Blocks outside of SND.UNA to SND.MAX are old or wrong, and are ignored.
        """
        una, flight = self._snd.una, self._snd.flight
        news = False
        for start, end in blocks:
            if 0 < distance(una, start) < distance(una, end) <= flight:
                news |= self.sacked.add(start, end)
        self.sacked.bound(SACKED)  # the last range is kept, since it is the newest
        return news

    def duplicate(self) -> Iterable[Piece]:
        """Return what to send again after a duplicate ACK (RFC 5681 section 2), or after SACK has reported something
        new.

        Nothing is sent while the window is zero, or during the recovery from a timeout, which causes duplicate ACKs
        itself.
        """
        snd, sacked = self._snd, self.sacked
        if snd.nxt != snd.max or not snd.wnd:
            return ()
        self._duplicates += 1
        tail_arrived = sacked and sacked.end == snd.max  # then no third duplicate will come
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
        """Return the holes before what SACK has reported, each one once.

        They are returned once more when SACK reports a segment that was sent after them: then they were lost again.
        """
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
        """Return the probe: the known holes, or else the last segment, whose SACK will show the holes before it."""
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
        """Go back to the first unacknowledged byte after a timeout, with one burst in flight at first."""
        snd = self._snd
        self._duplicates, self._point = 0, None
        if self.retries > 1:
            self.sacked.clear()  # the guest may have dropped it (RFC 2018 section 8)
        snd.nxt = snd.una
        self._congestion = snd.burst

    def resume_from_nxt(self) -> Iterator[Piece]:
        """Return what follows SND.NXT, as far as the guest's window and the bound after a timeout allow."""
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
        """Return queued bytes that were sent before.  Stop timing the round trip, which would be ambiguous."""
        snd = self._snd
        snd.timed = None
        while size:
            data = snd.at(seq)[:size]
            yield seq, data
            seq, size = add(seq, len(data)), size - len(data)
